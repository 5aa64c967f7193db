"""A worker without Ray: what it does when losses, pictures, disks fail, and when it is asked to stop."""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from pipeline.core.errors import JobFailed
from trainer.drawing.pictures import PictureModel
from trainer.encoders.text import build_local_text_encoder
from trainer.recipe.resolve import Command, Training, resolve
from trainer.runs.checkpoint import Checkpoints
from trainer.samples.data import Batch, TrainingData, held_out_batch, load_batch
from trainer.samples.order import micro_batches
from trainer.training.metrics import Line
from trainer.training.process_group import Team
from trainer.training.worker import Source, Worker

SETTINGS = ("log_every=1", "checkpoint_every=2", "evaluate_every=1000", "batch_size=4", "streams=4")


@dataclass
class Heard:
    """A bulletin that remembers, and asks for an end after some steps."""

    stops_after: int = 1000
    lines: list[Line] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def stop_is_asked(self) -> bool:
        return len(self.lines) >= self.stops_after

    def tell(self, line: Line) -> None:
        (self.lines if "step" in line else self.evaluations).append(line)

    def remark(self, text: str) -> None:
        self.remarks.append(text)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def resolved(dataset: Path, run: Path, steps: int, *settings: str) -> Training:
    command = Command(stage="demo", dataset=str(dataset), run=str(run), steps=steps, settings=(*SETTINGS, *settings))
    return resolve(command)


def source(training: Training, replaced: tuple[tuple[str, str], ...] = ()) -> Source:
    stage = training.stage
    data = TrainingData.load(
        training.selection, training.crop(), batch_size=stage.batch_size, streams=stage.streams,
        hold_out=stage.hold_out, first_epoch=training.first_epoch,
    )  # fmt: skip

    def batches(training: Training) -> Iterator[Batch]:
        for step in itertools.count(training.position(training.start_step) // stage.batch_size):
            for positions in micro_batches(step, stage.batch_size, 0, 1, training.micro_batch):
                yield replace(load_batch(data, positions), replaced=list(replaced))

    return Source(data, batches, lambda numbers: held_out_batch(data, numbers))


def worker(training: Training, heard: Heard, source_: Source | None = None) -> Worker:
    return Worker(training, Team.assemble(), torch.device("cpu"), source_ or source(training), heard)


def saved(run: Path) -> list[int]:
    return [found.step for found in Checkpoints.of_stage(run, "demo").finished()]


def test_asked_to_stop_it_saves_what_it_has_and_goes_on_from_there(dataset: Path, tmp_path: Path) -> None:
    whole, parts = Heard(), Heard(stops_after=2)
    assert worker(resolved(dataset, tmp_path / "whole", 5), whole).run() == 5
    assert worker(resolved(dataset, tmp_path / "parts", 5), parts).run() == 3
    assert saved(tmp_path / "parts") == [2, 3]
    again = Heard()
    assert worker(resolved(dataset, tmp_path / "parts", 5), again).run() == 5
    assert [line["loss"] for line in parts.lines + again.lines] == [line["loss"] for line in whole.lines]


def test_a_loss_that_stays_infinite_goes_back_and_then_gives_up(dataset: Path, tmp_path: Path) -> None:
    worker(resolved(dataset, tmp_path, 4), Heard()).run()
    heard = Heard()
    wild = resolved(dataset, tmp_path, 100, "optimizer.muon_learning_rate=1e30", "checkpoint_every=1000")
    with pytest.raises(
        JobFailed, match=r"not finite since step \d+, also after 3 rollbacks; .*optimizer.learning_rate"
    ):
        worker(wild, heard).run()
    assert [remark.split(": ")[1] for remark in heard.remarks] == ["back to step 4, and on with other samples"] * 3
    assert saved(tmp_path)[-1] == 4, "no checkpoint of what went astray"
    skipped = [line["skipped_steps"] for line in heard.lines]
    assert skipped == sorted(skipped), "those of before a rollback stay counted"
    assert skipped[-1] >= 4 * 3


def test_without_a_checkpoint_there_is_nowhere_to_go_back_to(dataset: Path, tmp_path: Path) -> None:
    wild = resolved(dataset, tmp_path, 50, "optimizer.muon_learning_rate=1e30", "checkpoint_every=1000")
    with pytest.raises(JobFailed, match=r"not finite since step .*no checkpoint yet"):
        worker(wild, Heard()).run()


def test_replaced_pictures_are_named_and_too_many_end_the_job(dataset: Path, tmp_path: Path) -> None:
    training = resolved(dataset, tmp_path, 20)
    broken = source(training, replaced=(("danbooru:1", "truncated"),))
    with pytest.raises(JobFailed, match=r"11 of 44 pictures could not be read, .* such as danbooru:1 \(truncated\)"):
        worker(training, Heard(), broken).run()
    lines = [json.loads(line) for line in (tmp_path / "demo/replaced.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "id": "danbooru:1", "reason": "truncated"}
    assert len(lines) == 11


def test_replaced_pictures_that_cannot_be_written_down_are_told(dataset: Path, tmp_path: Path) -> None:
    training, heard = resolved(dataset, tmp_path, 2), Heard()
    (tmp_path / "demo/replaced.jsonl").mkdir(parents=True)
    assert worker(training, heard, source(training, replaced=(("danbooru:1", "truncated"),))).run() == 2
    assert [line["replaced_samples"] for line in heard.lines] == [1, 2]
    [remark] = heard.remarks
    assert "replaced.jsonl cannot be written" in remark


def test_asked_to_stop_it_saves_at_once_and_leaves_the_evaluation_out(dataset: Path, tmp_path: Path) -> None:
    heard = Heard(stops_after=1)
    assert worker(resolved(dataset, tmp_path, 9, "evaluate_every=2"), heard).run() == 2
    assert saved(tmp_path) == [2]
    assert not (tmp_path / "demo/evaluation.jsonl").exists()


def test_a_checkpoint_that_is_gone_when_workers_start_is_no_reason_to_begin_anew(dataset: Path, tmp_path: Path) -> None:
    worker(resolved(dataset, tmp_path, 2), Heard()).run()
    training = resolved(dataset, tmp_path, 4)
    shutil.rmtree(tmp_path / "demo/checkpoints")
    with pytest.raises(JobFailed, match=r"checkpoint of step 2 .* is gone"):
        worker(training, Heard())


def test_saves_that_fail_do_not_end_training_but_the_last_one_is_missed(dataset: Path, tmp_path: Path) -> None:
    training = replace(resolved(dataset, tmp_path, 5), checkpoints=str(tmp_path / "file" / "checkpoints"))
    (tmp_path / "file").write_text("no folder can be made here")
    heard = Heard()
    with pytest.raises(JobFailed, match=r"checkpoint of step 5 could not be saved .* run the same command again"):
        worker(training, heard).run()
    assert heard.lines[-1]["step"] == 5
    assert heard.lines[-1]["failed_saves"] == 2
    assert "step 2 could not be saved" in heard.remarks[0]


def test_a_new_order_of_the_data_begins_a_new_epoch(dataset: Path, tmp_path: Path) -> None:
    worker(resolved(dataset, tmp_path, 4), Heard()).run()
    command = Command(
        stage="demo", dataset=str(dataset), run=str(tmp_path), steps=6, settings=(*SETTINGS, "hold_out=0.2"),
        new_order=True,
    )  # fmt: skip
    training = resolve(command)
    assert (training.start_step, training.start_position, training.first_epoch) == (4, 0, 1)
    assert worker(training, Heard()).run() == 6
    state = Checkpoints.of_stage(tmp_path, "demo").newest().state()
    assert (state["position"], state["first_epoch"], state["epoch"]) == (8, 1, 1)


def test_a_stage_of_256_pixels_trains_on_latents_of_a_vae_and_a_language_models_embeddings(
    dataset: Path, tmp_path: Path
) -> None:
    """Both saved in the layouts of the real ones, from folders."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=4,
        )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    build_local_text_encoder(["1girl, red star", "blue fish"], tmp_path / "language model", seed=0)
    settings = (
        "model=tiny", "batch_size=2", "log_every=1", "evaluate_every=3", "selection=demo",
        f"codec={tmp_path / 'vae'}", f"text_encoder={tmp_path / 'language model'}",
    )  # fmt: skip
    command = Command(stage="256", dataset=str(dataset), run=str(tmp_path / "run"), steps=3, settings=settings)
    training, heard = resolve(command), Heard()
    assert (training.model.in_channels, training.model.text_dim) == (4, 128)
    assert worker(training, heard).run() == 3
    [figures] = heard.evaluations
    assert (figures["validation_loss"] or 0) > 0
    assert (tmp_path / "run/256/grids/step-00000003.png").exists()
    PictureModel.load(tmp_path / "run", torch.device("cpu"))
