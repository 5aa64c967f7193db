"""The recipe's numbers against the HDM report's table, and what a stage refuses."""

from dataclasses import replace

import pytest

from pipeline.curation.stage_rules import RULES
from trainer.recipe.stage_config import PRESETS
from trainer.recipe.stages import STAGES

# HDM report, section 4.2: samples, rate at base width 1, batch per GPU, global batch, TREAD rate, text tokens, hours,
# and images/s of the four GPUs.
PAPER = {
    "256": (152.5e6, 0.5, 128, 2048, 0.5, 256, 174, 243),
    "512": (42.34e6, 0.1, 64, 512, 0.5, 256, 120, 98),
    "768": (8.469e6, 0.05, 64, 512, 0.5, 256, 42, 56),
    "1024": (3.649e6, 0.02, 16, 256, 0.0, 512, 49, 20.7),
}


@pytest.mark.parametrize("name", PAPER)
def test_a_stage_has_the_numbers_of_the_report(name: str) -> None:
    stage = STAGES[name]
    samples, rate, _, batch_size, selection_rate, text_tokens, hours, images_per_s = PAPER[name]
    assert (stage.samples, stage.batch_size) == (samples, batch_size)
    assert (stage.micro_batch, stage.checkpointing) == ("auto", "auto")
    assert (stage.selection_rate, stage.text_tokens, stage.resolution) == (selection_rate, text_tokens, int(name))
    assert (stage.model, stage.patch_size, stage.optimizer.kind) == ("base", 2, "adamw")
    assert stage.samples / images_per_s / 3600 == pytest.approx(hours, abs=0.5)
    assert stage.optimizer.learning_rate * stage.optimizer.base_width == pytest.approx(rate), (
        "hidden rates are the report's"
    )
    first = name == "256"
    assert stage.optimizer.betas == ((0.9, 0.98) if first else (0.9, 0.995))
    assert stage.clip_norm == (3.0 if first else 1.0)
    assert (stage.optimizer.warmup_steps, stage.optimizer.final_ratio) == (1000, 0.01)


@pytest.mark.parametrize("name", PAPER)
def test_checkpoints_are_30_to_60_minutes_apart_on_the_reports_gpus(name: str) -> None:
    stage, images_per_s = STAGES[name], PAPER[name][-1]
    minutes = stage.checkpoint_every * stage.batch_size / images_per_s / 60
    assert 30 <= minutes <= 60
    assert stage.keep_every % stage.checkpoint_every == 0, "such checkpoints exist"


@pytest.mark.parametrize("name", PAPER)
def test_the_half_life_of_the_averaged_weights_is_at_most_a_tenth_of_the_stage(name: str) -> None:
    stage = STAGES[name]
    steps = stage.samples // stage.batch_size
    assert stage.ema_decay ** (steps / 10) <= 0.5


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_a_selection_of_its_name_and_follows_a_smaller_one(name: str) -> None:
    stage = STAGES[name]
    assert stage.selection == name
    assert name in RULES
    assert stage.model in PRESETS
    if stage.after is not None:
        assert STAGES[stage.after].resolution < stage.resolution


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("batch_size", 0, "at least 1"),
        ("samples", -5, "at least 1"),
        ("checkpoint_every", 0, "at least 1"),
        ("hold_out", 1.0, "below 1"),
        ("selection_rate", 1.0, "below 1"),
        ("selection_rate", float("nan"), "below 1"),
        ("ema_decay", -0.1, "at least 0"),
        ("flip", 1.5, "from 0 to 1"),
        ("clip_norm", 0.0, "above 0"),
        ("timestep_shift", -1.0, "above 0"),
        ("seed", -1, "at least 0"),
        ("text_multiple", 2, "at least 4, for no more than 64 text lengths"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(field: str, value: float, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*{wanted}.*{value}"):
        replace(STAGES["256"], **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", 0.0), ("weight_decay", -1.0), ("betas", (0.9, 1.0)), ("warmup_steps", -1), ("final_ratio", 2.0)],
)
def test_an_optimizer_number_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(STAGES["256"].optimizer, **{field: value})
