"""The planner: the papers' own row from their numbers, scaling by arithmetic, budgets, a real probe, refusals."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.core.records import SELECTION, TEXT_CATEGORIES
from trainer.cost import costs
from trainer.cost.budget import LATER_FLOOR, LEAST, affordable
from trainer.cost.costs import Machine, Measured, Pictures, Rates, Speed
from trainer.cost.planning import Texts, setting_of
from trainer.encoders.random_encoders import local_text_encoder
from trainer.recipe import overrides
from trainer.recipe.settings import stage_config, total_steps
from trainer.recipe.stages import STAGES

CallJob = Callable[..., CompletedProcess[str]]
Plan = Callable[..., dict[str, Any]]

# The HDM report, section 4.2: images, epochs, hours of wall time on four RTX 5090; section 4.3: dollars of these hours.
PAPERS = {"256": (7.624e6, 20, 174), "512": (8.469e6, 5, 120), "768": (8.469e6, 1, 42), "1024": (3.649e6, 1, 49)}
HOURS, DOLLARS = 385, (535, 620)


@pytest.fixture
def plan(call_job: CallJob, tmp_path: Path) -> Plan:
    """plan("--gpus", 8) -> what the command writes as JSON."""

    def call(*arguments: object) -> dict[str, Any]:
        file = tmp_path / "a new folder" / "plan.json"
        done = call_job("trainer/plan.py", "--json", file, *arguments)
        assert done.returncode == 0, done.stderr
        call.printed = done.stdout  # type: ignore[attr-defined]
        return json.loads(file.read_text())

    return call


def refused(done: CompletedProcess[str], *named: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for name in named:
        assert name in done.stderr


# --- The papers' row --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dollars", DOLLARS)
def test_the_papers_row_comes_out_of_their_numbers(plan: Plan, dollars: int) -> None:
    """From images x epochs and images a second, which are the papers' samples over their hours."""
    speeds = [f"{name}={images * epochs / hours / 3600}" for name, (images, epochs, hours) in PAPERS.items()]
    made = plan("--price", dollars / HOURS / 4, "--images-per-second", *speeds)
    for row in made["stages"]:
        images, epochs, hours = PAPERS[row["name"]]
        assert row["images"] == images
        assert row["epochs"] == pytest.approx(epochs, rel=1e-3)
        assert row["hours"] == pytest.approx(hours, rel=1e-3)
    assert made["total"]["hours"] == pytest.approx(HOURS, rel=1e-3)
    assert made["total"]["dollars"] == pytest.approx(dollars, rel=1e-3)


def test_without_flags_the_plan_is_the_papers_and_stands_beside_their_row(plan: Plan) -> None:
    made = plan()
    assert [round(row["images_per_second"]) for row in made["stages"][:3]] == [243, 98, 56]
    assert round(made["stages"][3]["images_per_second"], 1) == 20.7
    assert {row["source"] for row in made["stages"]} == {"published"}
    assert made["total"]["hours"] == pytest.approx(HOURS)
    assert DOLLARS[0] < made["total"]["dollars"] < DOLLARS[1]
    printed = plan.printed  # type: ignore[attr-defined]
    assert "385, $535-620" in printed
    assert "$0.347 to $0.403" in printed
    assert printed.startswith("An estimate")


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_the_encoders_is_what_a_counter_counts() -> None:
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3Config, Qwen3Model

    qwen3_600m = Qwen3Config(
        vocab_size=1000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    setting = replace(costs.published_setting("256"), text_tokens=48)
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            layers_per_block=2,
        )
        with FlopCounterMode(display=False) as image:
            vae.encode(torch.zeros(1, 3, 256, 256))
        with FlopCounterMode(display=False) as text:
            Qwen3Model(qwen3_600m).eval()(input_ids=torch.zeros(1, 48, dtype=torch.long))
    assert setting.work.image_encoder == pytest.approx(image.get_total_flops(), rel=1e-3)
    assert setting.work.text_encoder == pytest.approx(text.get_total_flops(), rel=1e-3)


def test_a_stage_that_recomputes_everything_takes_a_third_more() -> None:
    """A forward pass beside a forward and a backward one of twice its arithmetic."""
    setting = costs.published_setting("512")
    assert setting.stage.checkpointing == "all"
    plain = replace(setting, stage=replace(setting.stage, checkpointing="none"))
    assert setting.work.model / plain.work.model == pytest.approx(4 / 3, rel=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_padding_goes_by_the_longest_of_a_micro_batch(micro_batch: int) -> None:
    lengths = {20: 1, 60: 1}  # padded to 32 and 64
    all_short = 0.5**micro_batch
    assert costs.padded_tokens(lengths, 256, 32, micro_batch) == round(32 * all_short + 64 * (1 - all_short))


def test_padding_ends_at_the_longest_text_that_is_taken() -> None:
    assert costs.padded_tokens({0: 1, 500: 1}, 100, 32, 10_000) == 100
    assert costs.padded_tokens({0: 5}, 100, 32, 8) == 32, "an empty text has a token"


def test_twice_the_gpus_take_half_the_hours_for_the_same_money(plan: Plan) -> None:
    four, eight = plan("--gpus", 4), plan("--gpus", 8)
    assert eight["total"]["hours"] == pytest.approx(four["total"]["hours"] / 2)
    assert eight["total"]["dollars"] == pytest.approx(four["total"]["dollars"])


def test_another_gpu_is_as_fast_as_its_peak_says(plan: Plan) -> None:
    """Known by name as by its figures."""
    published = plan()["stages"]
    known = plan("--gpu", "rtx4090", "--price", 0)["stages"]
    told = plan("--gpu", "Abacus", "--teraflops", costs.gpu_peak("RTX 4090"), "--watts", 450, "--price", 0)["stages"]
    ratio = costs.gpu_peak("RTX 5090") / costs.gpu_peak("RTX 4090")
    for before, row, same in zip(published, known, told, strict=True):
        assert row["source"] == "scaled"
        assert row["hours"] == pytest.approx(ratio * before["hours"])
        assert row["share_of_peak"] == pytest.approx(before["share_of_peak"])
        assert same["hours"] == pytest.approx(row["hours"])


def test_every_gpu_has_a_peak_and_is_found_by_what_torch_calls_it() -> None:
    for kind, gpu in costs.GPUS.items():
        assert costs.gpu_peak(kind) > 0
        assert costs.find_gpu(f"NVIDIA {gpu.device}") == kind
        assert costs.find_gpu(kind.lower().replace(" ", "-")) == kind


def test_shorter_texts_take_less_time(plan: Plan) -> None:
    """By what their arithmetic saves, no more."""
    made = plan("--stages", 256, "--text-lengths", "90=1")
    [row] = made["stages"]
    assert row["text_tokens"] == 96
    full = costs.published_setting("256")
    short = replace(full, text_tokens=96)
    assert row["hours"] / 174 == pytest.approx(short.work.total / full.work.total)


# --- What hours are turned into ---------------------------------------------------------------------------------------

MACHINE = Machine(name="some GPU", count=2, teraflops=100, watts=400, gigabytes=48, price=0.5)


def test_energy_money_and_bandwidth_follow_from_the_hours() -> None:
    setting = costs.published_setting("256")
    setting = replace(setting, stage=replace(setting.stage, samples=720_000))
    rates = Rates(machine=MACHINE, host_watts=200, dollars_per_kwh=0.25)
    row = costs.stage_row(setting, Pictures("images", 1000, 5e7, 5e4), Speed(100, "given", ""), rates, 10)
    assert row.hours == 2
    assert row.dollars == 2 * 2 * 0.5
    assert row.kwh == 2 * (2 * 400 + 200) / 1000
    assert row.energy_dollars == row.kwh * 0.25
    assert row.read_bytes == 720_000 * 5e4
    assert row.bytes_per_second == 100 * 5e4
    assert row.epochs == 720


def test_a_checkpoint_has_the_bytes_of_weights_averages_and_moments() -> None:
    from trainer.encoders.load_codec import load_codec
    from trainer.model.xut import XUT, XUTConfig
    from trainer.optimization.optimizers import OptimizerConfig
    from trainer.training.worker import new_loop

    stage = replace(
        STAGES["demo"], optimizer=OptimizerConfig(), samples=32, checkpoint_every=1, keep_last=1, keep_every=0
    )
    codec = load_codec("dct")
    model = XUT(XUTConfig.tiny(in_channels=codec.channels, patch_size=1))
    loop = new_loop(stage, model, 1, codec, torch.device("cpu"))
    for parameter in loop.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loop.optimizer.step()
    saved = sum(t.numel() * t.element_size() for tensors in loop.tensors().values() for t in tensors.values())
    count = sum(p.numel() for p in loop.model.parameters())
    # One that is kept, one that is being written.
    assert costs.checkpoint_bytes(stage, count) == pytest.approx(2 * saved, rel=1e-3)


def test_captions_are_a_row_of_their_own(plan: Plan) -> None:
    made = plan("--images", "512=9000000", "--captions-per-second", 25)
    *stages, captions = made["stages"]
    assert captions["hours"] == pytest.approx(9_000_000 / 25 / 3600)
    assert captions["read_bytes"] == 9_000_000 * costs.BYTES_OF_A_PICTURE, "not of a tier of small ones"
    assert captions["dollars"] == pytest.approx(captions["hours"] * made["machine"]["price"] * 4)
    assert made["total"]["dollars"] == pytest.approx(sum(row["dollars"] for row in stages) + captions["dollars"])


def test_stages_that_read_the_same_pictures_share_their_disk(plan: Plan) -> None:
    made = plan()
    small, also_small, large, fewer = (row["pictures_bytes"] for row in made["stages"])
    assert made["total"]["pictures_bytes"] == max(small, also_small) + max(large, fewer)


# --- A dataset --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """40 rows with the demo's selection, whose texts are 5 words each; half of the rows are selected."""
    folder = tmp_path / "dataset"
    (folder / "images").mkdir(parents=True)
    pictures = pa.table({"id": [f"test:{i}" for i in range(40)], "image": [bytes(1000)] * 40})
    pq.write_table(pictures, folder / "images/one.parquet", compression="none", use_dictionary=False)
    rows = [
        {name: [] for name in TEXT_CATEGORIES}
        | {"id": f"test:{i}", "row": i, "special": ["one two three four five"], "caption": None}
        for i in range(0, 40, 2)
    ]
    selection = folder / "selections/demo"
    selection.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, SELECTION), selection / "one.parquet")
    (selection / "selection.json").write_text(json.dumps({"shards": {"one": len(rows)}, "hash": "abc"}))
    return folder


def test_a_dataset_tells_its_stages_images_bytes_and_texts(plan: Plan, dataset: Path) -> None:
    made = plan("--dataset", dataset, "--images-per-second", "demo=90", "--set", "text_multiple=1")
    [row] = made["stages"]
    size = (dataset / "images/one.parquet").stat().st_size
    assert (row["name"], row["images"], row["pictures_bytes"]) == ("demo", 20, size)
    assert row["hours"] == pytest.approx(36_000 / 90 / 3600)
    assert row["read_bytes"] == pytest.approx(36_000 / 20 * size), "an epoch reads the file once"
    assert row["text_tokens"] == 5
    assert f"--dataset {dataset}" in made["commands"][0]


def test_a_tokenizer_that_is_not_here_is_told(plan: Plan, dataset: Path) -> None:
    settings = ("--set", "text_encoder=nobody/has-this", "--set", "text_multiple=1")
    made = plan("--dataset", dataset, "--images-per-second", "demo=90", *settings)
    assert made["stages"][0]["text_tokens"] == -(-len("one two three four five") // 3)
    assert any("3 bytes a token" in line for line in made["assumptions"])


def test_what_a_dataset_does_not_have_is_refused(call_job: CallJob, dataset: Path, tmp_path: Path) -> None:
    refused(call_job("trainer/plan.py", "--dataset", tmp_path / "none"), "no selection", "curate.py")
    refused(call_job("trainer/plan.py", "--dataset", dataset, "--stages", "256"), "no selection '256'")
    (dataset / "selections/demo/selection.json").write_text(json.dumps({"shards": {"one": 0}, "hash": "abc"}))
    refused(call_job("trainer/plan.py", "--dataset", dataset), "no images")


# --- A budget ---------------------------------------------------------------------------------------------------------

COSTS = {"256": 200.0, "512": 100.0, "768": 80.0, "1024": 60.0}


def spent(shares: dict[str, float]) -> float:
    return sum(share * COSTS[name] for name, share in shares.items())


def test_what_fits_is_left_whole() -> None:
    assert set(affordable(COSTS, sum(COSTS.values())).values()) == {1.0}


def test_the_last_stage_is_shortened_before_the_others() -> None:
    assert affordable(COSTS, 410) == {"256": 1, "512": 1, "768": 1, "1024": 0.5}
    shares = affordable(COSTS, 375)
    assert shares == {"256": 1, "512": 1, "768": pytest.approx(0.75), "1024": LATER_FLOOR}


def test_below_the_floors_all_are_shortened_in_proportion() -> None:
    floor = 200 + LATER_FLOOR * 240
    shares = affordable(COSTS, 0.8 * floor)
    assert shares["256"] == pytest.approx(0.8)
    assert shares["512"] == shares["768"] == shares["1024"] == pytest.approx(0.8 * LATER_FLOOR)


@pytest.mark.parametrize("budget", range(140, 440, 37))
def test_the_whole_budget_is_spent_and_no_more(budget: int) -> None:
    assert spent(affordable(COSTS, budget)) == pytest.approx(budget)


def test_too_little_for_anything_sensible_names_what_it_takes() -> None:
    least = LEAST * (200 + LATER_FLOOR * 240)
    with pytest.raises(ValueError, match=rf"\${least:.0f}"):
        affordable(COSTS, least - 1)
    assert spent(affordable(COSTS, least)) == pytest.approx(least)


def test_the_commands_of_a_budget_carry_it_out(plan: Plan) -> None:
    """They are run.py's; planned with what they set, the recipe costs the budget but for a batch of each stage."""
    made = plan("--budget", 300)
    settings = []
    for command in made["commands"]:
        words = shlex.split(command)
        assert words[:2] == ["python", "trainer/run.py"]
        name = words[words.index("--stage") + 1]
        given = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        stage, _, _ = stage_config(name, overrides.parse(given))
        assert total_steps(stage, None) * stage.batch_size == stage.samples < STAGES[name].samples
        settings += ["--set", f"{name}.samples={stage.samples}"]
    assert plan(*settings)["total"]["dollars"] == pytest.approx(made["budget"]["total"]["dollars"])
    assert 299.9 < made["budget"]["total"]["dollars"] <= 300
    assert made["total"]["hours"] == pytest.approx(HOURS), "the whole recipe is still told"


def test_a_stage_begins_with_the_weights_of_the_one_planned_before_it(plan: Plan) -> None:
    first, second, third = plan("--stages", "256", "1024", "512")["commands"]
    assert "--from" not in first
    assert "--from" not in second, "run.py finds the stage before by itself"
    assert "--from RUN/512" in third
    [alone] = plan("--stages", "1024")["commands"]
    assert "--from FOLDER" in alone


def test_budgets_that_buy_nothing_sensible_are_refused(call_job: CallJob) -> None:
    refused(call_job("trainer/plan.py", "--budget", 100), "no sensible recipe", "$171")
    refused(call_job("trainer/plan.py", "--budget", 100, "--gpu", "H100"), "--price")
    refused(call_job("trainer/plan.py", "--budget", 9, "--captions-per-second", 1), "captions")


# --- A probe ----------------------------------------------------------------------------------------------------------


def test_a_probe_times_real_steps_and_the_plan_follows(plan: Plan) -> None:
    small = ("model.depth=1", "batch_size=16", "micro_batch=4", "text_tokens=16", "resolution=32")
    settings = [word for field in small for word in ("--set", field)]
    made = plan("--stages", "demo", "--images", "demo=100", "--measure", 3, *settings)
    [row], [probe] = made["stages"], made["measured"]
    assert probe["steps"] >= 1
    assert probe["images_per_second"] == pytest.approx(probe["steps"] * probe["micro_batch"] / probe["seconds"])
    assert row["images_per_second"] == pytest.approx(probe["images_per_second"] * made["machine"]["count"])
    assert row["hours"] == pytest.approx(36_000 / row["images_per_second"] / 3600)
    assert any(line.startswith("measured: stage demo, model tiny, 32 pixels") for line in made["assumptions"])


def test_the_embedded_text_encoder_is_as_wide_as_planned() -> None:
    setting = setting_of("demo", {}, 1, Texts(None, ""))
    assert setting.model.text_dim == local_text_encoder(torch.device("cpu")).dim


def measured(name: str, **changes: Any) -> Measured:
    setting = replace(costs.published_setting(name), **changes)
    return Measured(
        setting=setting, device="H100", peak_teraflops=100, encoders="", steps=10, seconds=20, memory_bytes=None
    )  # fmt: skip


def test_a_probe_of_other_settings_keeps_its_operations_a_second() -> None:
    probe = measured("512", text_tokens=32)
    setting = costs.published_setting("768")
    speed = costs.measured_speed(setting, MACHINE, [probe])
    assert speed.source == "scaled"
    assert speed.images_per_second * setting.work.total == pytest.approx(2 * probe.operations_per_second)


def test_a_probe_of_the_stage_itself_goes_before_others() -> None:
    probes = [measured("256"), measured("512")]
    one = replace(MACHINE, count=1)
    speed = costs.measured_speed(costs.published_setting("256"), one, probes)
    assert (speed.source, speed.images_per_second) == ("measured", probes[0].images_per_second)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a probe of a GPU says something of others")
def test_a_probe_of_a_cpu_says_nothing_of_a_gpu(call_job: CallJob) -> None:
    refused(call_job("trainer/plan.py", "--measure", "--gpu", "H100"), "--measure", "--gpu H100")


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--gpu", "RTX 1"), ("RTX 5090", "H100", "--teraflops", "--watts")),
        (("--gpu", "RTX 1", "--watts", 3), ("--teraflops",)),
        (("--price", -1), ("--price -1",)),
        (("--price", "nan"), ("--price nan",)),
        (("--kwh", "inf"), ("--kwh inf",)),
        (("--watts", 0), ("--watts 0",)),
        (("--gpus", 0), ("--gpus 0",)),
        (("--gpus", 3), ("--gpus 3", "2, 4")),
        (("--budget", "nan"), ("--budget nan",)),
        (("--measure", 61), ("60 seconds",)),
        (("--captions-per-second", 0), ("--captions-per-second",)),
        (("--images", "256=0"), ("at least 1",)),
        (("--images", "256=1.5"), ("whole number",)),
        (("--images", "256"), ("--images 256",)),
        (("--images", "257=1"), ("'257'", "1024")),
        (("--images-per-second", "256=-1"), ("--images-per-second",)),
        (("--images-per-second", "256=nan"), ("--images-per-second",)),
        (("--text-lengths", "1.5=2"), ("--text-lengths",)),
        (("--text-lengths", "64=0"), ("--text-lengths",)),
        (("--stages", "demo"), ("how many images", "demo")),
        (("--stages", "demo", "--images", "demo=1"), ("no published speed", "--measure")),
        (("--stages", "257"), ("'257'",)),
        (("--stages", "256", "--set", "512.samples=9"), ("not planned",)),
        (("--stages", "256", "--images", "512=9"), ("--images 512", "--stages 256 512")),
        (("--stages", "256", "--images-per-second", "512=9"), ("--images-per-second 512", "--stages 256 512")),
        (("--text-lengths", "64=1e308"), ("--text-lengths 64=1e308",)),
        (("--price", 1e308), ("--price 1e+308",)),
        (("--json", "."), ("--json", "folder")),
        (("--set", "256.samplse=9"), ("samples",)),
    ],
)
def test_bad_input_is_refused_in_one_line(call_job: CallJob, arguments: Sequence[object], named: Sequence[str]) -> None:
    refused(call_job("trainer/plan.py", *arguments), *named)
