"""--set: texts are converted by the annotation of their field, and everything else is refused."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from pipeline.core.errors import UsageError
from trainer.recipe import overrides


@dataclass(frozen=True, kw_only=True)
class Inner:
    low: float = 0.1
    high: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    samples: int = 1
    name: str = "a"
    quick: bool = False
    kind: Literal["adamw", "muon"] = "adamw"
    after: str | None = "256"
    limit: float | None = None
    inner: Inner = field(default_factory=Inner)


def _set(*settings: str) -> Outer:
    values = overrides.typed(overrides.parse(settings), overrides.field_types(Outer))
    return overrides.replaced(Outer(), values)


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("samples=72_000", Outer(samples=72_000)),
        ("name=/models/with=sign", Outer(name="/models/with=sign")),
        ("quick=true", Outer(quick=True)),
        ("kind=muon", Outer(kind="muon")),
        ("after=none", Outer(after=None)),
        ("limit=1e-3", Outer(limit=1e-3)),
        ("inner.betas=0.5, 0.6", Outer(inner=Inner(betas=(0.5, 0.6)))),
        (" inner.high = 3 ", Outer(inner=Inner(high=3.0))),
    ],
)
def test_a_text_is_converted_by_the_fields_annotation(setting: str, wanted: Outer) -> None:
    assert _set(setting) == wanted


def test_fields_are_set_at_once_and_the_last_value_wins() -> None:
    both = _set("inner.low=0.5", "inner.high=0.6", "samples=2", "samples=3")
    assert both == Outer(samples=3, inner=Inner(low=0.5, high=0.6))
    with pytest.raises(ValueError, match="above"):
        _set("inner.low=0.5")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("samples", ["a field and its value"]),
        ("=3", ["a field and its value"]),
        ("sample=3", ["no field sample", "samples"]),
        ("betas=1,2", ["no field betas", "inner.betas"]),
        ("inner.hihg=1", ["inner.high"]),
        ("inner=3", ["group", "inner.low", "inner.betas"]),
        ("zzz=1", ["fields: samples, name"]),
        ("samples=1e3", ["whole number"]),
        ("samples=none", ["whole number"]),
        ("inner.low=nan", ["finite"]),
        ("inner.low=x", ["a number"]),
        ("quick=yes", ["true or false"]),
        ("kind=sgd", ["adamw, muon"]),
        ("limit=x", ["a number, or none"]),
        ("inner.betas=0.9", ["2 values"]),
        ("inner.betas=0.9,x", ["a number"]),
        ("name=", ["empty"]),
    ],
)
def test_invalid_settings_are_refused_in_one_line_with_a_remedy(setting: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        _set(setting)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(f"--set {setting.strip()}")
    assert all(word in message for word in words), message
