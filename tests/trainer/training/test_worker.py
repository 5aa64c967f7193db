"""A worker without Ray: failing losses, pictures and disks, and stop requests."""

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from pipeline.core.errors import JobFailed
from trainer.drawing.picture_model import PictureModel
from trainer.encoders.text import build_local_text_encoder
from trainer.health.notify import Notice
from trainer.recipe.command import Command
from trainer.recipe.resolve import resolve
from trainer.recipe.training import Training
from trainer.runs.checkpoint import Checkpoints
from trainer.runs.checkpoint_copy import Copier
from trainer.runs.ema_snapshots import Snapshots, averages_of_length
from trainer.runs.weights import trained_model
from trainer.samples.data import Batch, TrainingData, example_texts, held_out_batch, load_batch
from trainer.samples.order import micro_batches
from trainer.training.metrics import Line
from trainer.training.worker import SampleSource, Worker
from trainer.training.worker_group import WorkerGroup

SETTINGS = (
    *("log_every=1", "checkpoint_every=2", "evaluate_every=1000", "batch_size=4", "streams=4", "resolution=32"),
    *("model.depth=1", "model.dim=64"),
)


@dataclass
class Recorder:
    """A Reporter that records everything and requests a stop after some steps."""

    stops_after: int = 1000
    lines: list[Line] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)
    phases: list[tuple[str, float | None]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def stop_requested(self) -> bool:
        return len(self.lines) >= self.stops_after

    def report(self, line: Line) -> None:
        phases = [(name.partition("/")[2], seconds) for name, seconds in line.items() if name.startswith("startup_")]
        self.phases += phases
        if not phases:
            (self.lines if "step" in line else self.evaluations).append(line)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def notify(self, notice: Notice) -> None:
        self.events.append(notice.event)
        self.warnings.append(notice.reason)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def resolved(dataset: Path, run: Path, steps: int | None, *settings: str, **flags: Any) -> Training:
    flags = {"prompts": str(dataset.with_name("prompts.txt"))} | flags
    return resolve(
        Command(stage="demo", dataset=str(dataset), run=str(run), steps=steps, settings=(*SETTINGS, *settings), **flags)
    )


def source(training: Training, replaced: tuple[tuple[str, str], ...] = ()) -> SampleSource:
    stage = training.stage
    data = TrainingData.load(
        training.selection, training.crop(), batch_size=stage.batch_size, streams=stage.streams,
        hold_out=stage.hold_out, first_epoch=training.first_epoch,
    )  # fmt: skip

    def batches(training: Training) -> Iterator[Batch]:
        for step in itertools.count(training.position(training.start_step) // stage.batch_size):
            for positions in micro_batches(step, stage.batch_size, 0, 1, training.micro_batch):
                yield replace(load_batch(data, positions), replaced=list(replaced))

    return SampleSource(data, batches, lambda numbers: held_out_batch(data, numbers))


def worker(
    training: Training, recorder: Recorder, samples: SampleSource | None = None, group: WorkerGroup | None = None
) -> Worker:
    group = group or WorkerGroup.from_process_group()
    return Worker(training, group, torch.device("cpu"), samples or source(training), recorder)


def saved(run: Path) -> list[int]:
    return [found.step for found in Checkpoints.of_stage(run, "demo").finished()]


def test_a_worker_resumes_after_a_stop_request_with_equal_losses(dataset: Path, tmp_path: Path) -> None:
    whole, parts = Recorder(), Recorder(stops_after=2)
    assert worker(resolved(dataset, tmp_path / "whole", 5), whole).run() == 5
    assert worker(resolved(dataset, tmp_path / "parts", 5), parts).run() == 3
    assert saved(tmp_path / "parts") == [2, 3]
    again = Recorder()
    assert worker(resolved(dataset, tmp_path / "parts", 5), again).run() == 5
    assert [line["loss"] for line in parts.lines + again.lines] == [line["loss"] for line in whole.lines]


def test_a_stopped_worker_waits_for_its_second_copy_only_for_what_is_left(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray kills a stopped job after 300 s."""
    given: list[float] = []
    monkeypatch.setattr(Copier, "close", lambda _, longest=3600.0: given.append(longest))
    copies = str(tmp_path / "copy")
    worker(resolved(dataset, tmp_path / "run", 3, checkpoints_copy=copies), Recorder(stops_after=1)).run()
    worker(resolved(dataset, tmp_path / "run", 3, checkpoints_copy=copies), Recorder()).run()
    stopped, finished = given
    assert 0 < stopped <= 150
    assert finished == 3600
    assert saved(tmp_path / "run")[-1] == 3


def test_a_worker_says_that_it_waits_but_not_during_a_step(dataset: Path, tmp_path: Path) -> None:
    waits: dict[str, list[bool]] = {"reads": [], "steps": [], "saves": []}
    recorder, training = Recorder(), resolved(dataset, tmp_path, 4)
    samples = source(training)

    def batches(training: Training) -> Iterator[Batch]:
        for batch in samples.batches(training):
            waits["reads"].append(it.activity.waits)
            yield batch

    it = worker(training, recorder, replace(samples, batches=batches))
    step, save = it.loop.step, it._save
    it.loop.step = lambda inputs: (waits["steps"].append(it.activity.waits), step(inputs))[1]  # type: ignore[method-assign]
    it._save = lambda: (waits["saves"].append(it.activity.waits), save())[1]  # type: ignore[method-assign]
    it.run()
    assert waits == {"reads": [True] * 4, "steps": [True, False, False, False], "saves": [True, True]}
    assert it.activity.steps == 4


def test_phases_of_the_start_are_reported_when_they_begin_and_end(dataset: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    worker(resolved(dataset, tmp_path, 3), recorder).run()
    names = ("encoders", "model", "first batch", "first step")
    assert [name for name, _ in recorder.phases] == [name for name in names for _ in range(2)]
    assert [seconds is None for _, seconds in recorder.phases] == [True, False] * 4
    assert all(seconds is None or seconds > 0 for _, seconds in recorder.phases)


def test_a_line_says_which_part_of_a_step_takes_the_time(dataset: Path, tmp_path: Path) -> None:
    """Here a text encoder as slow as a language model on a CPU."""
    recorder = Recorder()
    slow = worker(resolved(dataset, tmp_path, 4, "log_every=2"), recorder)
    encode = slow.encoder.encode

    def encode_slowly(*arguments: Any) -> Any:
        time.sleep(1)
        return encode(*arguments)

    slow.encoder.encode = encode_slowly  # type: ignore[method-assign]
    slow.run()
    line = recorder.lines[-1]
    parts = ("data_wait_share", "text_encoder_share", "vae_share", "model_share", "sums_share")
    shares = [line[name] or 0.0 for name in parts]
    assert max(shares) == line["text_encoder_share"]
    assert all(share >= 0 for share in shares)
    assert line["sums_share"] == 0
    assert 0.5 < sum(shares) <= 1
    assert line["rank_step_seconds/0"] >= slow.training.accumulation
    assert line["step_seconds"] >= line["rank_step_seconds/0"]


class BesideASlowWorker(WorkerGroup):
    """Rank 0 of two workers, of which the other one works three times as long on each step."""

    def gather(self, item: Any) -> list[Any]:
        return [item, f"another {item}" if isinstance(item, str) else item]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        if len(numbers) == 1:
            return list(numbers)
        *others, step, wait, _, _ = numbers
        return [*others, step, wait, 3 * step, wait + 0.5]


def test_a_worker_that_slows_down_the_others_is_named(dataset: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    training = resolved(dataset, tmp_path, 60, "log_every=10", "checkpoint_every=100")
    worker(training, recorder, group=BesideASlowWorker(0, 2, None)).run()
    [message] = [text for text in recorder.warnings if "slows down" in text]
    assert message.startswith("worker 1 (another CPUs of ")
    assert "3.0 times as long as they do, for 50 steps" in message
    for line in recorder.lines:
        assert line["rank_step_seconds/1"] == pytest.approx(3 * line["rank_step_seconds/0"])
        assert line["rank_data_wait_seconds/1"] == pytest.approx(0.5 + line["rank_data_wait_seconds/0"])


def test_new_weights_get_the_statistics_of_the_selections_texts_and_keep_them(dataset: Path, tmp_path: Path) -> None:
    training = resolved(dataset, tmp_path / "run", 2)
    first = worker(training, Recorder())
    texts = example_texts(training.selection, 512)
    mean, deviation = first.encoder.statistics(texts, training.stage.text_tokens)
    standard = first.loop.model.text_standard
    assert torch.equal(standard.mean, mean)
    assert torch.equal(standard.deviation, deviation)
    assert first.encoder.prefix
    first.run()
    found = Checkpoints.of_stage(tmp_path / "run", "demo").newest()
    assert found is not None
    assert torch.equal(found.tensors("model")["text_standard.mean"], mean)
    picture = PictureModel.load(tmp_path / "run", torch.device("cpu"))
    assert torch.equal(picture.model.text_standard.deviation, deviation)
    assert picture.encoder.prefix
    resumed = worker(resolved(dataset, tmp_path / "run", 4), Recorder())
    assert torch.equal(resumed.loop.model.text_standard.mean, mean)


def test_an_anneal_goes_on_with_the_weights_moments_and_samples_of_its_checkpoint(
    dataset: Path, tmp_path: Path
) -> None:
    whole, parts = Recorder(), Recorder()
    worker(resolved(dataset, tmp_path / "whole", 5), whole).run()
    worker(resolved(dataset, tmp_path / "parts", 5), Recorder(stops_after=2)).run()
    training = resolved(dataset, tmp_path / "parts", None, anneal=2)
    assert worker(training, parts).run() == 5
    assert parts.lines[0]["loss"] == whole.lines[3]["loss"], "of the step after the checkpoint of step 3"
    assert parts.lines[1]["learning_rate"] == pytest.approx(0.01 * training.stage.optimizer.learning_rate)
    assert saved(tmp_path / "parts") == [2, 3], "the stage stays as it is"
    assert Checkpoints(str(tmp_path / "parts/demo-anneal-3-2/checkpoints")).newest().step == 5


def test_a_run_keeps_averages_of_two_lengths_from_which_others_are_made(dataset: Path, tmp_path: Path) -> None:
    """Also after a resume, and in an anneal, whose window begins with it."""
    settings = ("ema_snapshots=4",)
    worker(resolved(dataset, tmp_path, 8, *settings), Recorder(stops_after=4)).run()
    worker(resolved(dataset, tmp_path, 8, *settings), Recorder()).run()
    checkpoints = Checkpoints.of_stage(tmp_path, "demo")
    found = Snapshots(checkpoints.root).found()
    assert [(step, began, updates) for _, step, began, updates in found] == [(n, 0, n) for n in (2, 4, 6, 8)]
    newest = checkpoints.newest()
    assert newest is not None
    averages, error = averages_of_length(newest, 0.08)
    assert averages.keys() == newest.tensors("ema").keys() - {"updates"}
    assert error < 0.05
    kept = newest.tensors("power_ema")
    name = "patch_out.weight"
    assert not torch.equal(kept[f"0.05/{name}"], kept[f"0.1/{name}"])
    assert torch.equal(trained_model(newest, 0.1).state_dict()[name], averages_of_length(newest, 0.1)[0][name])

    anneal = resolved(dataset, tmp_path, None, *settings, anneal=4)
    worker(anneal, Recorder()).run()
    assert [(step, began) for _, step, began, _ in Snapshots(anneal.checkpoints).found()] == [
        (n, 8) for n in range(9, 13)
    ]


def test_a_checkpoint_without_the_newer_averages_and_norms_still_loads(dataset: Path, tmp_path: Path) -> None:
    worker(resolved(dataset, tmp_path, 4, "ema_snapshots=0"), Recorder(stops_after=1)).run()
    older = Checkpoints.of_stage(tmp_path, "demo").newest()
    assert older is not None
    assert sorted(older.state()["files"]) == ["ema.safetensors", "model.safetensors", "optimizer.safetensors"]
    optimizer = {name: t for name, t in older.tensors("optimizer").items() if "." in name or name == "skipped_steps"}
    tensors = {"model": older.tensors("model"), "ema": older.tensors("ema"), "optimizer": optimizer}
    Checkpoints.of_stage(tmp_path, "demo").save(older.step, tensors, older.state())
    assert worker(resolved(dataset, tmp_path, 4), Recorder()).run() == 4
    newer = Checkpoints.of_stage(tmp_path, "demo").newest()
    assert newer is not None
    assert int(newer.tensors("power_ema")["began"]) == older.step


def test_a_loss_that_stays_infinite_rolls_back_three_times_and_then_fails(dataset: Path, tmp_path: Path) -> None:
    worker(resolved(dataset, tmp_path, 4), Recorder()).run()
    recorder = Recorder()
    wild = resolved(dataset, tmp_path, 100, "optimizer.muon_learning_rate=1e30", "checkpoint_every=1000")
    with pytest.raises(
        JobFailed, match=r"skipped since step \d+ \(.*\), also after 3 rollbacks; .*optimizer.learning_rate"
    ):
        worker(wild, recorder).run()
    assert [text.split(": ")[1] for text in recorder.warnings] == ["back to step 4, going on with other samples"] * 3
    assert recorder.events == ["rolled back"] * 3
    assert saved(tmp_path)[-1] == 4, "diverged weights are not saved"
    skipped = [line["skipped_steps"] for line in recorder.lines]
    assert skipped == sorted(skipped), "steps skipped before a rollback stay counted"
    assert skipped[-1] >= 4 * 3


def test_a_loss_that_stays_infinite_without_a_checkpoint_fails(dataset: Path, tmp_path: Path) -> None:
    wild = resolved(dataset, tmp_path, 50, "optimizer.muon_learning_rate=1e30", "checkpoint_every=1000")
    with pytest.raises(JobFailed, match=r"skipped since step .*no checkpoint yet"):
        worker(wild, Recorder()).run()


def test_replaced_pictures_are_listed_and_too_many_end_the_job(dataset: Path, tmp_path: Path) -> None:
    training = resolved(dataset, tmp_path, 20)
    broken = source(training, replaced=(("danbooru:1", "truncated"),))
    with pytest.raises(JobFailed, match=r"11 of 44 pictures could not be read, .* such as danbooru:1 \(truncated\)"):
        worker(training, Recorder(), broken).run()
    lines = [json.loads(line) for line in (tmp_path / "demo/replaced.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "id": "danbooru:1", "reason": "truncated"}
    assert len(lines) == 11


def test_replaced_pictures_that_cannot_be_listed_give_a_warning(dataset: Path, tmp_path: Path) -> None:
    training, recorder = resolved(dataset, tmp_path, 2), Recorder()
    (tmp_path / "demo/replaced.jsonl").mkdir(parents=True)
    assert worker(training, recorder, source(training, replaced=(("danbooru:1", "truncated"),))).run() == 2
    assert [line["replaced_samples"] for line in recorder.lines] == [1, 2]
    [warning] = recorder.warnings
    assert "replaced.jsonl cannot be written" in warning


def test_a_stop_request_saves_at_once_without_an_evaluation(dataset: Path, tmp_path: Path) -> None:
    recorder = Recorder(stops_after=1)
    assert worker(resolved(dataset, tmp_path, 9, "evaluate_every=2"), recorder).run() == 2
    assert saved(tmp_path) == [2]
    assert not (tmp_path / "demo/evaluation.jsonl").exists()


def test_a_checkpoint_that_disappears_before_the_workers_start_ends_the_job(dataset: Path, tmp_path: Path) -> None:
    worker(resolved(dataset, tmp_path, 2, "evaluate_every=1"), Recorder(stops_after=1)).run()
    training = resolved(dataset, tmp_path, 4)
    shutil.rmtree(tmp_path / "demo/checkpoints")
    with pytest.raises(JobFailed, match=r"checkpoint of step 2 .* is gone"):
        worker(training, Recorder())


def test_a_run_that_has_lost_its_folder_goes_on_from_the_copies(dataset: Path, tmp_path: Path) -> None:
    whole, first, second = Recorder(), Recorder(stops_after=2), Recorder()
    run, copy = tmp_path / "run", str(tmp_path / "copy")
    worker(resolved(dataset, tmp_path / "whole", 5), whole).run()
    assert worker(resolved(dataset, run, 5, checkpoints_copy=copy), first).run() == 3
    assert saved(tmp_path / "copy")[-1] == saved(run)[-1] == 3
    shutil.rmtree(run)
    training = resolved(dataset, run, 5, checkpoints_copy=copy)
    assert training.start_step == 3
    assert training.notes[0].endswith(f"was restored from the copy in {copy}/demo/checkpoints")
    shutil.rmtree(run / "demo/checkpoints")  # again, while the job waits for its workers
    assert worker(training, second).run() == 5
    assert second.warnings[0].startswith(f"{run}/demo/checkpoints has no checkpoint: step 3")
    assert [line["loss"] for line in first.lines + second.lines] == [line["loss"] for line in whole.lines]
    assert saved(run) == [3, 4, 5]
    assert saved(tmp_path / "copy")[-1] == 5, "4 may be left out"


def test_copies_that_fail_cost_a_warning_each_and_not_the_run(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder can be created here")
    recorder = Recorder()
    training = replace(resolved(dataset, tmp_path / "run", 3), copies=str(tmp_path / "file/demo/checkpoints"))
    assert worker(training, recorder).run() == 3
    assert saved(tmp_path / "run") == [2, 3]
    failed = [line for line in recorder.warnings if f"could not be copied to {tmp_path}/file/demo" in line]
    assert len(failed) in (1, 2), "the copy of step 2 may be left out for that of step 3"
    assert "step 3" in failed[-1]
    assert recorder.lines[-1]["failed_saves"] == 0


def test_failed_saves_do_not_end_training_unless_it_is_the_last_one(dataset: Path, tmp_path: Path) -> None:
    training = replace(
        resolved(dataset, tmp_path, 5, "ema_snapshots=0"), checkpoints=str(tmp_path / "file" / "checkpoints")
    )
    (tmp_path / "file").write_text("no folder can be created here")
    recorder = Recorder()
    with pytest.raises(JobFailed, match=r"checkpoint of step 5 could not be saved .* run the same command again"):
        worker(training, recorder).run()
    assert recorder.lines[-1]["step"] == 5
    assert recorder.lines[-1]["failed_saves"] == 2
    assert "step 2 could not be saved" in recorder.warnings[0]


def test_a_new_data_order_begins_a_new_epoch(dataset: Path, tmp_path: Path) -> None:
    worker(resolved(dataset, tmp_path, 4), Recorder(stops_after=3)).run()
    training = resolved(dataset, tmp_path, 6, "hold_out=0.2", new_order=True)
    assert (training.start_step, training.start_position, training.first_epoch) == (4, 0, 1)
    assert worker(training, Recorder(stops_after=1)).run() == 6
    state = Checkpoints.of_stage(tmp_path, "demo").newest().state()
    assert (state["position"], state["first_epoch"], state["epoch"]) == (8, 1, 1)


def test_stage_256_trains_with_a_vae_and_a_language_model_from_folders(dataset: Path, tmp_path: Path) -> None:
    """Both are saved in the layout of the real models."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=4,
        )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    build_local_text_encoder(["1girl, red star", "blue fish"], tmp_path / "language model", seed=0)
    settings = (
        "model=tiny", "batch_size=2", "resolution=64", "log_every=1", "evaluate_every=2", "selection=demo",
        f"codec={tmp_path / 'vae'}", f"text_encoder={tmp_path / 'language model'}",
    )  # fmt: skip
    command = Command(stage="256", dataset=str(dataset), run=str(tmp_path / "run"), steps=2, settings=settings)
    training, recorder = resolve(command), Recorder()
    assert (training.model.in_channels, training.model.text_dim) == (4, 128)
    assert worker(training, recorder).run() == 2
    [results] = recorder.evaluations
    assert (results["validation_loss"] or 0) > 0
    assert (tmp_path / "run/256/grids/step-00000002.png").exists()
    PictureModel.load(tmp_path / "run", torch.device("cpu"))


# --- Alignment with a vision model ------------------------------------------------------------------------------------


def test_tokens_are_aligned_with_a_vision_model_for_the_stages_first_samples(
    dataset: Path, vision_folder: Path, tmp_path: Path
) -> None:
    """For three of five steps of two micro batches. Then the model is freed, and what is saved is that of any run."""
    settings = ("micro_batch=2", f"repa.features={vision_folder}", "repa.width=32", "repa.samples=12")
    recorder = Recorder()
    live = worker(resolved(dataset, tmp_path / "whole", 5, *settings), recorder)
    assert live.vision is not None
    seen: list[tuple[int, ...]] = []
    live.vision.model.register_forward_hook(lambda _, __, out: seen.append(tuple(out.last_hidden_state.shape)))
    assert live.run() == 5
    assert seen == [(2, 1 + 16, 24)] * 6, "32 pixels are 4 x 4 tokens of the codec's blocks"
    assert live.vision is None
    assert [line["repa_loss"] is not None for line in recorder.lines] == [True] * 3 + [False] * 2
    live.loop.steps_taken = 1  # as after a rollback
    live._load_or_free_vision_model()
    assert live.vision is not None

    stopped, again = Recorder(stops_after=1), Recorder()
    assert worker(resolved(dataset, tmp_path / "parts", 5, *settings), stopped).run() == 2
    assert worker(resolved(dataset, tmp_path / "parts", 5, *settings), again).run() == 5
    for name in ("loss", "repa_loss", "grad_norm"):
        assert [line[name] for line in stopped.lines + again.lines] == [line[name] for line in recorder.lines]

    plain = resolved(dataset, tmp_path / "plain", 2)
    assert worker(plain, Recorder()).run() == 2
    [wanted] = Checkpoints.of_stage(tmp_path / "plain", "demo").finished()
    for found in Checkpoints.of_stage(tmp_path / "whole", "demo").finished():
        aligned = {"repa.safetensors"} if found.step == 2 else set()
        assert set(found.state()["files"]) == set(wanted.state()["files"]) | aligned
        for part in ("model", "ema", "power_ema", "optimizer"):
            assert found.tensors(part).keys() == wanted.tensors(part).keys()
        assert trained_model(found).state_dict().keys() == trained_model(wanted).state_dict().keys()


def test_an_alignment_can_be_turned_off_and_on_when_a_run_is_resumed(
    dataset: Path, vision_folder: Path, tmp_path: Path
) -> None:
    on = (f"repa.features={vision_folder}", "repa.width=32")
    for steps, settings, aligned in ((2, on, True), (4, (), False), (6, on, True)):
        recorder = Recorder()
        assert worker(resolved(dataset, tmp_path, steps, *settings), recorder).run() == steps
        assert [line["repa_loss"] is not None for line in recorder.lines] == [aligned] * 2
