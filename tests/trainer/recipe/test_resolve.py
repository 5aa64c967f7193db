"""A command line against a run folder: where training starts, which settings may change, and what is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.core.errors import UsageError
from pipeline.core.records import SELECTION, TEXT_CATEGORIES
from trainer.model import float8
from trainer.recipe.command import Command
from trainer.recipe.memory import check_device
from trainer.recipe.resolve import resolve
from trainer.recipe.stage_config import micro_batch, stage_config
from trainer.recipe.stages import STAGES
from trainer.recipe.training import Training
from trainer.runs.checkpoint import Checkpoints
from trainer.runs.checkpoint_copy import Copier
from trainer.runs.run_folder import find_checkpoint

ROOT = Path(__file__).parents[3]
ROWS = 40
TINY = ("model=tiny", "batch_size=8")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Selections demo, 256 and 512 of the same rows."""
    folder = tmp_path_factory.mktemp("dataset")
    colours = ("red", "blue", "green", "pink")
    rows = [
        {name: [] for name in TEXT_CATEGORIES}
        | {"id": f"test:{i}", "row": i, "general": [f"{colours[i % 4]} ball", f"thing {i}"], "caption": None}
        | {"quality": "masterpiece", "era": "newest", "rating": "general"}
        for i in range(ROWS)
    ]
    (folder / "images").mkdir()
    pictures = pa.table({"id": [row["id"] for row in rows], "image": [b"none"] * ROWS})
    pq.write_table(pictures, folder / "images/one.parquet", row_group_size=10)
    for name in ("demo", "256", "512"):
        (folder / "selections" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, SELECTION), folder / "selections" / name / "one.parquet")
    curated_as(folder, "first")
    return folder


def curated_as(dataset: Path, digest: str) -> None:
    for folder in (dataset / "selections").iterdir():
        (folder / "selection.json").write_text(json.dumps({"shards": {"one": ROWS}, "hash": digest}))


@pytest.fixture
def ask(dataset: Path, tmp_path: Path) -> Any:
    """ask("demo", "samples=80", steps=3) -> the resolved training of tmp_path/run."""

    def resolved(stage: str, *settings: str, run: str = "run", **flags: Any) -> Training:
        command = Command(stage=stage, dataset=str(dataset), run=str(tmp_path / run), settings=settings, **flags)
        return resolve(command)

    return resolved


def save(training: Training, step: int) -> Path:
    """A checkpoint after `step` steps, as a training without held-out rows saves it."""
    tensors = {name: {"weight": torch.zeros(1)} for name in ("model", "ema", "optimizer")}
    epoch = training.first_epoch + training.position(step) // ROWS
    return Path(Checkpoints(training.checkpoints).save(step, tensors, training.state(step, epoch)).folder)


def refused(ask: Any, *settings: str, **flags: Any) -> str:
    with pytest.raises(UsageError) as error:
        ask(*settings, **flags)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Files of a run -------------------------------------------------------------------------------------------------


def test_a_first_start_begins_with_new_weights_and_writes_its_config(ask: Any, tmp_path: Path) -> None:
    training = ask("demo")
    assert (training.start_step, training.start_position, training.first_epoch) == (0, 0, 0)
    assert training.stop_step == 36_000 // 32
    assert "new weights" in training.notes[-1]
    config = json.loads((tmp_path / "run/demo/config.json").read_text())
    assert config == json.loads(json.dumps(training.record()))
    assert config["stage"] == json.loads(json.dumps(asdict(STAGES["demo"])))
    assert training.text_encoder == str(tmp_path / "run/text_encoder"), "shared by the stages"
    assert training.checkpoints == str(tmp_path / "run/demo/checkpoints")


def test_a_run_remembers_the_folder_of_its_checkpoints(ask: Any, tmp_path: Path) -> None:
    home = str(tmp_path / "elsewhere")
    first = ask("256", *TINY, checkpoints=home)
    assert first.checkpoints == f"{home}/256/checkpoints"
    save(first, 5)
    assert ask("256", *TINY).start_step == 5
    assert ask("512", *TINY).weights.step == 5, "the next stage finds it"
    assert ask("512", *TINY, checkpoints=str(tmp_path / "third")).weights.step == 5


# --- Resuming -------------------------------------------------------------------------------------------------------


def test_a_run_resumes_at_its_position_and_lists_changed_settings(ask: Any) -> None:
    first = ask("demo")
    save(first, 7)
    further = ask("demo", "samples=72_000", "optimizer.learning_rate=1e-3", workers=2)
    assert (further.start_step, further.start_position, further.first_epoch) == (7, 7 * 32, 0)
    assert further.position(9) == 9 * 32
    notes = "\n".join(further.notes)
    for line in (
        "going on from step 7",
        "samples: 36000 -> 72000",
        "steps: 1125 -> 2250",
        "cosine now ends with 1e-05 at step 2250, not at step 1125",
        "optimizer.learning_rate: 0.003 -> 0.001",
        "workers: 1 -> 2",
    ):
        assert line in notes


def test_an_anneal_continues_a_checkpoint_in_its_own_folder(ask: Any, tmp_path: Path) -> None:
    wsd = ("optimizer.schedule=wsd", "samples=3200")
    stage = ask("demo", *wsd)
    save(stage, 5)
    newest = save(stage, 50)
    first = ask("demo", *wsd, anneal=20)
    assert first.folder == str(tmp_path / "run/demo-anneal-50-20")
    assert (first.start_step, first.stop_step, first.start_position) == (50, 70, 50 * 32), "data order goes on"
    assert first.branch.folder == str(newest)
    rates = [first.schedule().rate(step) for step in (49, 69)]
    assert rates == pytest.approx([3e-3, 3e-5])
    assert "falls from 0.003 to 3e-05 at step 70" in "\n".join(first.notes)
    assert ask("demo", *wsd).folder == stage.folder, "the stage itself is unchanged"

    save(first, 60)
    again = ask("demo", *wsd, anneal=20)
    assert (again.start_step, again.stop_step, again.anneal) == (60, 70, first.anneal)
    assert again.schedule().rate(69) == pytest.approx(3e-5)
    assert find_checkpoint(str(tmp_path / "run")).step == 60, "saved last"
    assert find_checkpoint(first.folder).step == 60
    earlier = ask("demo", *wsd, anneal=3, start_from=str(newest.with_name("step-00000005")))
    assert (earlier.start_step, earlier.stop_step) == (5, 8)


def test_an_anneal_without_a_checkpoint_of_its_stage_is_refused(ask: Any, tmp_path: Path) -> None:
    assert "demo has no checkpoint; train that stage first" in refused(ask, "demo", anneal=5)
    other = save(ask("256", *TINY), 5)
    assert "is of stage 256, not of demo" in refused(ask, "demo", anneal=5, start_from=str(other))
    assert "--anneal 0" in refused(ask, "demo", anneal=0)
    assert "leave out --steps" in refused(ask, "demo", anneal=5, steps=9)


def test_a_checkpoint_stores_its_position_in_the_data_order(ask: Any) -> None:
    training = ask("demo")
    state = training.state(3, epoch=3)
    assert (state["position"], state["epoch"], state["first_epoch"]) == (96, 3, 0)
    again = training.resumed_from(state | {"step": 3})
    assert (again.start_step, again.position(3), again.position(4)) == (3, 96, 128)
    assert again.state(5, 5) == training.state(5, 5)


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("model.heads=4", "model.heads: 2 -> 4"),
        ("model.text_layers=average", "model.text_layers: last -> average"),
        ("codec=pixel", "codec: dct -> pixel"),
        ("patch_size=2", "model.patch_size: 1 -> 2"),
        ("optimizer.kind=adamw", "optimizer.kind: muon -> adamw"),
    ],
)
def test_settings_that_weights_or_optimizer_depend_on_cannot_change(ask: Any, setting: str, field: str) -> None:
    save(ask("demo"), 7)
    message = refused(ask, "demo", setting, new_order=True)
    assert field in message
    assert "another --run" in message


@pytest.mark.parametrize(
    "setting", ["batch_size=16", "seed=1", "streams=8", "window=2", "hold_out=0.1", "resolution=128"]
)
def test_settings_of_the_data_order_change_only_with_new_order(ask: Any, setting: str) -> None:
    save(ask("demo"), 7)
    message = refused(ask, "demo", setting)
    assert setting.partition("=")[0] in message
    assert "--new-order" in message
    assert ask("demo", setting, new_order=True).start_position == 0


def test_a_new_selection_is_refused_or_begins_one_new_epoch(ask: Any, dataset: Path) -> None:
    first = ask("demo")
    save(first, 3)
    epoch = 3 * 32 // ROWS
    curated_as(dataset, "second")
    try:
        assert "selection.hash: first -> second" in refused(ask, "demo")
        new = ask("demo", new_order=True)
        assert (new.start_step, new.start_position, new.first_epoch) == (3, 0, epoch + 1)
        assert f"epoch {epoch + 1} begins" in new.notes[-1]
        save(new, 4)
        again = ask("demo", new_order=True)
        assert (again.start_step, again.start_position, again.first_epoch) == (4, 32, epoch + 1)
        assert "the data order has not changed" in again.notes[-1]
    finally:
        curated_as(dataset, "first")


@pytest.mark.parametrize("record", ['{"shards"', "[]", '{"shards": {"one": 40}}', '{"shards": ["one"], "hash": "x"}'])
def test_a_damaged_record_of_the_selection_is_refused(ask: Any, dataset: Path, record: str) -> None:
    (dataset / "selections/demo/selection.json").write_text(record)
    try:
        assert "selection.json is damaged; run pipeline/curate.py" in refused(ask, "demo")
    finally:
        curated_as(dataset, "first")


def test_a_config_file_that_contradicts_the_checkpoints_is_refused(ask: Any, tmp_path: Path) -> None:
    save(ask("demo"), 7)
    path = tmp_path / "run/demo/config.json"
    config = json.loads(path.read_text())
    config["model"]["dim"] = 256
    path.write_text(json.dumps(config))
    assert "model.dim: 128 -> 256" in refused(ask, "demo")
    path.write_text("{")
    assert "damaged" in refused(ask, "demo")
    path.unlink()
    assert ask("demo").start_step == 7


def test_weights_that_are_older_than_a_model_field_keep_the_design_that_they_were_trained_with(ask: Any) -> None:
    assert ask("256", *TINY).model.text_prefix, "the default of new weights"
    folder = save(ask("256", *TINY), 5)
    for path in (folder / "state.json", folder.parents[1] / "config.json"):
        record = json.loads(path.read_text())
        for name in ("text_prefix", "text_features"):
            del record.get("config", record)["model"][name]
        path.write_text(json.dumps(record))
    for stage in ("256", "512"):
        model = ask(stage, *TINY).model
        assert (model.text_prefix, model.text_features) == (False, "raw")
    assert "model.text_prefix: false -> true" in refused(ask, "256", *TINY, "model.text_prefix=true")


# --- Initial weights ------------------------------------------------------------------------------------------------


def test_a_stage_begins_with_the_newest_weights_of_the_previous_stage(ask: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"weights of stage 256, of which .* has no checkpoint; .*--from nothing"):
        ask("512", *TINY)
    assert ask("512", *TINY, run="new", start_from="nothing").weights is None
    before = ask("256", *TINY)
    save(before, 5)
    folder = save(before, 9)
    encoder = (tmp_path / "run/text_encoder/tokenizer.json").stat().st_mtime_ns
    training = ask("512", *TINY)
    assert training.weights.folder == str(folder)
    assert (training.start_step, training.start_position) == (0, 0), "schedule and data order start anew"
    assert str(folder) in training.notes[-1]
    assert (tmp_path / "run/text_encoder/tokenizer.json").stat().st_mtime_ns == encoder, "the weights need this one"
    save(training, 2)
    going_on = ask("512", *TINY, start_from=str(tmp_path / "run"))
    assert (going_on.start_step, going_on.weights) == (2, None), "its own checkpoint takes precedence"
    assert going_on.began_from == str(folder)
    assert ask("256", *TINY).start_step == 9


def test_a_lost_run_gets_the_copy_of_the_stage_back_that_the_command_begins_with(ask: Any, tmp_path: Path) -> None:
    """Of the previous stage, or of the one that is annealed, each told in one line."""
    copies = str(tmp_path / "copy")
    for stage in ("256", "demo"):
        first = ask(stage, *TINY, checkpoints_copy=copies)
        copier = Copier(first.run, first.copies, pytest.fail)
        copier.submit(find_checkpoint(str(save(first, 5))))
        copier.close()
    shutil.rmtree(tmp_path / "run")
    following = ask("512", *TINY, checkpoints_copy=copies)
    assert following.weights == find_checkpoint(str(tmp_path / "run/256"))
    assert following.text_encoder == str(tmp_path / "run/text_encoder")
    [line] = [note for note in following.notes if "restored" in note]
    assert "/run/256/checkpoints has no checkpoint: step 5, saved" in line
    assert not any("restored" in note for note in ask("512", *TINY, checkpoints_copy=copies).notes), "once"
    annealed = ask("demo", *TINY, anneal=3, checkpoints_copy=copies)
    assert (annealed.start_step, annealed.stop_step) == (5, 8)
    assert sum("restored" in note for note in annealed.notes) == 1


def test_from_takes_a_run_stage_or_checkpoint_with_its_text_encoder_or_nothing(ask: Any, tmp_path: Path) -> None:
    other = ask("256", *TINY, run="other")
    older, newer = save(other, 5), save(other, 9)
    for place, found in ((tmp_path / "other", newer), (tmp_path / "other/256", newer), (older, older)):
        training = ask("512", *TINY, start_from=str(place))
        assert training.weights.folder == str(found)
    tokenizers = [(tmp_path / run / "text_encoder/tokenizer.json").read_bytes() for run in ("run", "other")]
    assert tokenizers[0] == tokenizers[1]
    assert ask("512", *TINY, start_from="nothing").weights is None
    assert "no checkpoint" in refused(ask, "512", *TINY, start_from=str(tmp_path))


def test_initial_weights_of_another_model_or_encoder_are_refused_by_field(ask: Any) -> None:
    save(ask("256", *TINY), 5)
    assert "model.mlp_dim: 256 -> 512" in refused(ask, "512", *TINY, "model.mlp_dim=512")
    assert "codec: dct -> pixel" in refused(ask, "512", *TINY, "codec=pixel")
    assert "--from nothing" in refused(ask, "512", *TINY, "model.dim=256")
    assert ask("512", *TINY, "model.dim=256", start_from="nothing").model.dim == 256


# --- The settings ---------------------------------------------------------------------------------------------------


def test_a_tiny_model_uses_local_encoders_unless_others_are_set() -> None:
    stage, model, notes = stage_config("256", {"model": "tiny", "model.qk_norm": "true"})
    assert (stage.model, stage.codec, stage.text_encoder) == ("tiny", "dct", "local")
    assert model == {"qk_norm": True}
    assert "codec=dct and text_encoder=local" in notes[0]
    stage, _, notes = stage_config("256", {"model": "tiny", "codec": "/vae", "text_encoder": "/qwen"})
    assert (stage.codec, stage.text_encoder, notes) == ("/vae", "/qwen", [])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": "1"}, ["optimizer.learning_rate"]),
        ({"model.text_layer": "average"}, ["model.text_layers"]),
        ({"model.in_channels": "8"}, ["follows from codec"]),
        ({"model": "huge"}, ["tiny, small, base, large"]),
        ({"batch_size": "0"}, ["--set batch_size=0", "at least 1"]),
        ({"captions.tag_dropout": "2"}, ["--set captions.tag_dropout=2", "probability"]),
        ({"optimizer.learning_rate": "-1"}, ["learning_rate", "above 0"]),
    ],
)
def test_an_invalid_setting_is_refused_in_one_line(settings: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        stage_config("256", settings)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_workers_and_micro_batches_always_add_up_to_the_batch(ask: Any) -> None:
    for name, stage in STAGES.items():
        for workers in (1, 2, 4, 8, 16):
            micro = micro_batch(stage, workers)
            assert micro <= 32, "auto, without a GPU"
            assert stage.batch_size % (micro * workers) == 0, name
    assert micro_batch(replace(STAGES["demo"], batch_size=48, micro_batch=10), 2) == 8
    training = ask("demo", "micro_batch=5", workers=2)
    assert (training.micro_batch, training.accumulation, training.checkpointing) == (4, 4, "none")
    assert ask("demo", "micro_batch=auto", "checkpointing=all").checkpointing == "all"
    assert "auto" in refused(ask, "demo", "micro_batch=many")


@pytest.mark.parametrize(("workers", "nearest"), [(3, "[2, 4]"), (0, "[1, 2]"), (100, "[64, 128]")])
def test_a_number_of_workers_that_does_not_divide_the_batch_is_refused(workers: int, nearest: str) -> None:
    with pytest.raises(UsageError, match="does not divide") as error:
        micro_batch(STAGES["256"], workers)
    assert nearest in str(error.value)
    odd = replace(STAGES["256"], batch_size=2046, micro_batch=128)
    assert micro_batch(odd, 3) == 62, "3 does not divide the 16 streams"


def test_impossible_commands_are_refused_with_a_remedy(ask: Any, tmp_path: Path) -> None:
    assert "resolution=64 or 80" in refused(ask, "256", *TINY, "resolution=70")
    assert "less than one batch" in refused(ask, "demo", "samples=5")
    assert refused(ask, "768", *TINY).endswith("--stage 768")
    assert refused(ask, "256", *TINY, "selection=mine").endswith("--stage 256 --name mine")
    assert "--prompts" in refused(ask, "demo", prompts=str(tmp_path / "none.txt"))
    assert "--tagger" in refused(ask, "demo", tagger=str(tmp_path / "none"))
    assert "--price-per-hour" in refused(ask, "demo", price_per_hour=-1.0)
    assert "--max-failures" in refused(ask, "demo", max_failures=-1)
    assert "--s3-wait" in refused(ask, "demo", s3_wait=-1.0)
    assert "--audit" in refused(ask, "demo", audit=str(tmp_path))
    assert "gone" in _without_text_encoder(ask, tmp_path)


def _without_text_encoder(ask: Any, tmp_path: Path) -> str:
    save(ask("demo"), 3)
    (tmp_path / "run/text_encoder").rename(tmp_path / "moved")
    return refused(ask, "demo")


def test_the_folder_of_an_audit_file_is_created(ask: Any, tmp_path: Path) -> None:
    audit = ask("demo", audit=str(tmp_path / "new/folder/audit")).audit
    assert Path(audit).read_bytes() == b""


def test_prompts_come_from_a_file_or_the_selection(ask: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red ball\n\n  a blue one \n")
    assert ask("demo", prompts=str(file)).prompts == ["a red ball", "a blue one"]
    assert ask("demo").prompts == ask("demo").example_prompts


def test_a_large_model_without_a_gpu_is_refused_with_its_memory_and_an_alternative(ask: Any) -> None:
    tiny = ask("256", *TINY)
    check_device(tiny, gpus=0)
    base = replace(tiny, stage=STAGES["256"], model=replace(tiny.model, dim=1024, heads=8, mlp_dim=3072, depth=4))
    check_device(base, gpus=1)
    with pytest.raises(UsageError) as error:
        check_device(base, gpus=0)
    message = str(error.value)
    assert "\n" not in message
    assert all(
        word in message for word in ("parameters", "at least about", "GB", "--set model=tiny", "--set codec=dct")
    )


def test_help_imports_no_heavy_package_and_names_every_stage() -> None:
    """Importing torch takes seconds."""
    code = (
        "import runpy, sys; sys.argv = ['run.py', '--help']\n"
        "try: runpy.run_path(sys.path.pop(), run_name='__main__')\n"
        "except SystemExit: assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    script = f"import sys; sys.path.append({str(ROOT / 'trainer/run.py')!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in STAGES)


@pytest.mark.parametrize(
    ("given", "counts"), [("1-4", [1, 2, 4]), (2, [2]), ("3-5", [4]), ("2-2", [2]), ("5-16", [8, 16])]
)
def test_a_range_of_workers_leaves_out_those_that_do_not_divide_the_batch(
    ask: Any, given: int | str, counts: list[int]
) -> None:
    training = ask("demo", workers=given)
    assert training.worker_counts() == counts
    assert training.workers == counts[-1]
    for count in counts:
        on = training.with_workers(count)
        assert on.accumulation * on.micro_batch * count == on.stage.batch_size


@pytest.mark.parametrize(
    ("given", "why"),
    [("5-7", "--workers 5-7 does not divide .*nearest: .*--set batch_size"), ("4-1", "1-4"), ("1-", "such as 1-4")],
)
def test_an_impossible_range_of_workers_is_refused(ask: Any, given: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        ask("demo", workers=given)


def test_float8_without_a_gpu_bfloat16_or_torchao_is_refused(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fp8 must be false unless precision is bf16" in refused(ask, "demo", "fp8=true")
    settings = ("fp8=true", "precision=bf16")
    training = ask("demo", *settings)
    with pytest.raises(UsageError, match="there is none: set fp8=false"):
        check_device(training, gpus=0)
    check_device(training, gpus=1)
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    assert 'pip install -c deploy/constraints.txt -e ".[fp8]"' in refused(ask, "demo", *settings, run="other")


def test_a_vision_model_that_cannot_be_used_is_refused(ask: Any, vision_folder: Path, tmp_path: Path) -> None:
    assert "is not a folder" in refused(ask, "demo", f"repa.features={tmp_path / 'nothing'}")
    encoder = ask("demo").text_encoder
    assert "No such file" in refused(ask, "demo", f"repa.features={encoder}"), "it has no preprocessor_config.json"
    fields = (f"repa.features={vision_folder}", "repa.samples=80")
    assert "repa.block must be at most 6" in refused(ask, "demo", *fields, "repa.block=7")
    assert "repa.weight must be above 0" in refused(ask, "demo", *fields, "repa.weight=0")
    training = ask("demo", *fields, "repa.block=6")
    assert (training.stage.repa.features, training.stage.repa.samples) == (str(vision_folder), 80)
    save(training, 2)
    assert "repa.weight: 0.5 -> 0.25" in "\n".join(ask("demo", *fields, "repa.block=6", "repa.weight=0.25").notes)
