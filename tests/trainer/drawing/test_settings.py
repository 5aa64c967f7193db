"""Settings and requests out of range are refused by the name of the field."""

from typing import Any

import pytest

from trainer.drawing.settings import PictureRequest, SamplingSettings

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"width": 0}, "width 0: .*4096"),
        ({"height": -64}, "height -64: .*4096"),
        ({"height": 4097}, "4096"),
        ({"steps": 0}, "sampling steps"),
        ({"steps": 1001}, "1000"),
        ({"zoom": 0.0}, "zoom"),
        ({"zoom": -1.0}, "zoom"),
        ({"zoom": 1e-30}, "zoom"),
        ({"zoom": 101.0}, "zoom"),
        ({"zoom": NAN}, "zoom"),
        ({"zoom": INF}, "zoom"),
        ({"x_shift": NAN}, "x_shift"),
        ({"y_shift": -INF}, "y_shift"),
        ({"guidance": NAN}, "guidance"),
        ({"guidance": INF}, "guidance"),
        ({"shift": 0.0}, "shift"),
        ({"shift": NAN}, "shift"),
        ({"sampler": "ddim"}, "euler, heun"),
        ({"selection_rate": 1.0}, "selection_rate"),
        ({"unconditional_rate": NAN}, "selection_rate"),
        ({"hires": 0.5}, "hires 0.5: must be from 1 to 8"),
        ({"hires_strength": 0.0}, "hires_strength"),
        ({"hires_strength": NAN}, "hires_strength"),
        ({"negative": "\udcff"}, "UTF-8"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingSettings(**{"width": 64, "height": 64, **wrong})


def test_the_ends_of_the_ranges_are_accepted() -> None:
    SamplingSettings(width=1, height=4096, steps=1000, guidance=-100.0, x_shift=100.0, zoom=0.01, shift=100.0)


def test_seeds_and_prompts_that_cannot_be_drawn_are_refused() -> None:
    settings = SamplingSettings(width=64, height=48)
    assert PictureRequest(prompt="", seed=0, settings=settings).prompt == ""
    for prompt, seed, named in (("a", -1, "seed -1"), ("a", 2**62, "seed"), ("\udcff", 0, "UTF-8")):
        with pytest.raises(ValueError, match=named):
            PictureRequest(prompt=prompt, seed=seed, settings=settings)
