"""The planning job: the papers' figures, scaling, datasets, budgets, a real measurement, refusals."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.core.records import SELECTION, TEXT_CATEGORIES
from trainer.cost import machines
from trainer.cost.stage_setup import stage_setup
from trainer.recipe import overrides
from trainer.recipe.stage_config import stage_config, total_steps
from trainer.recipe.stages import STAGES

CallJob = Callable[..., CompletedProcess[str]]
Plan = Callable[..., dict[str, Any]]

# HDM report, section 4.2: images, epochs and hours of wall time on four RTX 5090; section 4.3: dollars for these hours.
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


# --- The papers' figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dollars", DOLLARS)
def test_the_papers_totals_follow_from_their_speeds(plan: Plan, dollars: int) -> None:
    """The speeds are the papers' samples divided by their hours."""
    speeds = [f"{name}={images * epochs / hours / 3600}" for name, (images, epochs, hours) in PAPERS.items()]
    made = plan("--price", dollars / HOURS / 4, "--images-per-second", *speeds)
    for row in made["stages"]:
        images, epochs, hours = PAPERS[row["name"]]
        assert row["images"] == images
        assert row["epochs"] == pytest.approx(epochs, rel=1e-3)
        assert row["hours"] == pytest.approx(hours, rel=1e-3)
    assert made["total"]["hours"] == pytest.approx(HOURS, rel=1e-3)
    assert made["total"]["dollars"] == pytest.approx(dollars, rel=1e-3)


def test_without_flags_the_plan_is_the_papers_beside_their_own_figures(plan: Plan) -> None:
    made = plan()
    assert [round(row["images_per_second"]) for row in made["stages"][:3]] == [243, 98, 56]
    assert round(made["stages"][3]["images_per_second"], 1) == 20.7
    assert {row["source"] for row in made["stages"]} == {"published"}
    assert made["total"]["hours"] == pytest.approx(HOURS)
    assert DOLLARS[0] < made["total"]["dollars"] < DOLLARS[1]
    small, also_small, large, fewer = (row["pictures_bytes"] for row in made["stages"])
    assert made["total"]["pictures_bytes"] == max(small, also_small) + max(large, fewer), "stages share a folder"
    printed = plan.printed  # type: ignore[attr-defined]
    assert "385, $535-620" in printed
    assert "$0.347 to $0.403" in printed
    assert printed.startswith("An estimate")


# --- Scaling ----------------------------------------------------------------------------------------------------------


def test_twice_the_gpus_take_half_the_hours_for_the_same_money(plan: Plan) -> None:
    four, eight = plan("--gpus", 4), plan("--gpus", 8)
    assert eight["total"]["hours"] == pytest.approx(four["total"]["hours"] / 2)
    assert eight["total"]["dollars"] == pytest.approx(four["total"]["dollars"])


def test_the_speed_of_another_gpu_is_proportional_to_its_peak(plan: Plan) -> None:
    published = plan()["stages"]
    known = plan("--gpu", "rtx4090", "--price", 0)["stages"]
    told = plan("--gpu", "Abacus", "--teraflops", machines.gpu_peak("RTX 4090"), "--watts", 450)["stages"]
    ratio = machines.gpu_peak("RTX 5090") / machines.gpu_peak("RTX 4090")  # type: ignore[operator]
    for before, row, same in zip(published, known, told, strict=True):
        assert row["source"] == "scaled"
        assert row["hours"] == pytest.approx(ratio * before["hours"])
        assert row["share_of_peak"] == pytest.approx(before["share_of_peak"])
        assert same["hours"] == pytest.approx(row["hours"])


def test_shorter_texts_save_the_time_of_their_operations(plan: Plan) -> None:
    made = plan("--stages", 256, "--set", "256.text_tokens=96")
    [row] = made["stages"]
    assert row["text_tokens"] == 96
    full, short = (stage_setup("256", {"text_tokens": tokens}, 4).total_operations for tokens in ("256", "96"))
    assert row["hours"] / 174 == pytest.approx(short / full)


# --- A dataset --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """40 rows, of which the demo's selection has 20 with texts of 5 words."""
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


def test_images_bytes_and_text_lengths_come_from_the_dataset(plan: Plan, dataset: Path) -> None:
    made = plan("--dataset", dataset, "--images-per-second", "demo=90", "--set", "text_multiple=1")
    [row] = made["stages"]
    size = (dataset / "images/one.parquet").stat().st_size
    assert (row["name"], row["images"], row["pictures_bytes"]) == ("demo", 20, size)
    assert row["hours"] == pytest.approx(36_000 / 90 / 3600)
    assert row["read_bytes"] == pytest.approx(36_000 / 20 * size), "an epoch reads the file once"
    assert row["text_tokens"] == 5
    assert f"--dataset {dataset}" in made["commands"][0]


def test_text_lengths_are_estimated_without_the_tokenizer(plan: Plan, dataset: Path) -> None:
    settings = ("--set", "text_encoder=nobody/has-this", "--set", "text_multiple=1")
    made = plan("--dataset", dataset, "--images-per-second", "demo=90", *settings)
    assert made["stages"][0]["text_tokens"] == -(-len("one two three four five") // 3)
    assert any("3 bytes a token" in line for line in made["assumptions"])


def test_a_dataset_without_the_selection_is_refused(call_job: CallJob, dataset: Path, tmp_path: Path) -> None:
    refused(call_job("trainer/plan.py", "--dataset", tmp_path / "none"), "no selection", "curate.py")
    refused(call_job("trainer/plan.py", "--dataset", dataset, "--stages", "256"), "no selection '256'")
    (dataset / "selections/demo/selection.json").write_text(json.dumps({"shards": {"one": 0}, "hash": "abc"}))
    refused(call_job("trainer/plan.py", "--dataset", dataset), "no images")


# --- A budget ---------------------------------------------------------------------------------------------------------


def test_the_commands_keep_to_the_budget(plan: Plan) -> None:
    """They are commands of run.py. A plan with their settings costs the budget, except for one batch of each stage."""
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
    assert made["total"]["hours"] == pytest.approx(HOURS), "the whole recipe is still reported"
    assert "micro_batch" not in made["commands"][0], "run.py chooses it"
    assert any("micro batch of 32 and to recompute none of the blocks" in line for line in made["assumptions"])


def test_a_stage_starts_from_the_weights_of_the_one_planned_before_it(plan: Plan) -> None:
    first, second, third = plan("--stages", "256", "1024", "512")["commands"]
    assert "--from" not in first
    assert "--from" not in second, "run.py finds the previous stage by itself"
    assert "--from RUN/512" in third
    [alone] = plan("--stages", "1024")["commands"]
    assert "--from FOLDER" in alone


# --- A measurement ----------------------------------------------------------------------------------------------------


def test_a_measurement_times_real_steps_and_the_plan_uses_them(plan: Plan) -> None:
    small = ("model.depth=1", "batch_size=16", "micro_batch=4", "text_tokens=16", "resolution=32")
    settings = [word for field in small for word in ("--set", field)]
    made = plan("--stages", "demo", "--images", "demo=100", "--measure", 1, *settings)
    [row], [probe] = made["stages"], made["measured"]
    assert probe["steps"] >= 1
    assert 1 <= probe["micro_batch"] <= 4
    assert probe["images_per_second"] == pytest.approx(probe["steps"] * probe["micro_batch"] / probe["seconds"])
    assert row["images_per_second"] == pytest.approx(probe["images_per_second"] * made["machine"]["count"])
    assert row["hours"] == pytest.approx(36_000 / row["images_per_second"] / 3600)
    assert any(line.startswith("measured: stage demo, model tiny, 32 pixels") for line in made["assumptions"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a measurement on a GPU can be scaled to others")
def test_a_measurement_on_a_cpu_is_not_scaled_to_a_gpu(call_job: CallJob) -> None:
    refused(call_job("trainer/plan.py", "--measure", "--gpu", "H100"), "--measure", "--gpu H100")


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--gpu", "RTX 1"), ("RTX 5090", "H100", "--teraflops", "--watts")),
        (("--gpu", "RTX 1", "--watts", 3), ("--teraflops",)),
        (("--price", -1), ("--price", "-1 is not a number")),
        (("--price", "nan"), ("--price", "nan is not a number")),
        (("--price", 1e308), ("--price", "1e+308 is not a number")),
        (("--watts", 0), ("--watts", "0 is not a number above 0")),
        (("--watts", "inf"), ("--watts",)),
        (("--gpus", 0), ("--gpus", "0 is not a whole number above 0")),
        (("--gpus", 3), ("--gpus 3", "2, 4")),
        (("--budget", "nan"), ("--budget",)),
        (("--budget", 100), ("no sensible recipe", "$171")),
        (("--budget", 100, "--gpu", "H100"), ("--price",)),
        (("--measure", 61), ("60 seconds",)),
        (("--images", "256=0"), ("--images", "above 0")),
        (("--images", "256=1.5"), ("whole number",)),
        (("--images", "256"), ("--images", "256=1000")),
        (("--images", "257=1"), ("'257'", "1024")),
        (("--images-per-second", "256=-1"), ("--images-per-second",)),
        (("--images-per-second", "256=nan"), ("--images-per-second",)),
        (("--stages", "demo"), ("how many images", "demo")),
        (("--stages", "demo", "--images", "demo=1"), ("no published speed", "--measure")),
        (("--stages", "257"), ("'257'",)),
        (("--stages", "256", "--set", "512.samples=9"), ("not planned", "--stages 256 512")),
        (("--stages", "256", "--images", "512=9"), ("--images 512", "--stages 256 512")),
        (("--stages", "256", "--images-per-second", "512=9"), ("--images-per-second 512", "--stages 256 512")),
        (("--json", "."), ("folder",)),
        (("--set", "256.samplse=9"), ("samples",)),
    ],
)
def test_bad_input_is_refused_in_one_line(call_job: CallJob, arguments: Sequence[object], named: Sequence[str]) -> None:
    refused(call_job("trainer/plan.py", *arguments), *named)
