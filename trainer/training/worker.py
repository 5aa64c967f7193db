"""One training worker: from the newest checkpoint to the stage's last step. Knows nothing of Ray.

All workers take the same steps on equal weights; the first of them, the leader, writes checkpoints and figures.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import JobFailed
from trainer.diffusion.conditioning import pads_text
from trainer.drawing.grid import grid_png
from trainer.drawing.pictures import PictureModel
from trainer.encoders.latents import Codec
from trainer.encoders.load_codec import load_codec
from trainer.encoders.text import TextEncoder, load_text_encoder
from trainer.evaluation.tagger import Tagger, tag_agreement
from trainer.model.xut import XUT
from trainer.recipe.resolve import Training
from trainer.recipe.stages import StageConfig
from trainer.runs.checkpoint import Checkpoint, Checkpoints, Saver
from trainer.runs.lora import add_adapters
from trainer.runs.run_folder import config_of
from trainer.runs.weights import Lora, trained_model
from trainer.samples.data import Batch, TrainingData
from trainer.training.loop import Inputs, Loop, LoopConfig, Reading
from trainer.training.metrics import Counts, Line, Mark, Pace, Stopwatch, batch_counts, log_line, peak_teraflops
from trainer.training.process_group import Team
from trainer.training.run_log import Log, LogConfig, append_line
from trainer.training.validation import GridConfig, Validation, dealt_back, draw_share, validation_losses

# Steps in a row without a finite loss: not a bad batch, but weights that have gone astray.
_MOST_SKIPPED: Final = 3
_MOST_ROLLBACKS: Final = 3  # to the same checkpoint
_HELD_OUT: Final = 256  # samples: more would say little more, and take longer than a log line is worth
# Samples that may be replaced: one in a thousand, and a few that happen to come early.
_REPLACED_EARLY, _REPLACED_SHARE = 10, 1e-3


class Bulletin(Protocol):
    """What a worker hears from whoever started the job, and tells them."""

    def stop_is_asked(self) -> bool:
        """Whether to save and end."""
        ...

    def tell(self, line: Line) -> None:
        """Figures, as `metrics.METRICS` names them."""
        ...

    def remark(self, text: str) -> None:
        """Something that went wrong and is not in the figures."""
        ...


@dataclass(frozen=True)
class Source:
    """Where a worker's samples come from."""

    data: TrainingData
    batches: Callable[[Training], Iterator[Batch]]  # endless micro batches: its share of each step from start_step on
    held_out: Callable[[Sequence[int]], Batch]  # by number


def from_newest(training: Training) -> tuple[Training, Checkpoint | None]:
    """The job as it goes on from its newest checkpoint, and that: workers that are started again find one further on
    than where the job itself began. JobFailed where the one is gone that it began from."""
    found = Checkpoints(training.checkpoints).newest()
    if found is None:
        if training.start_step:
            raise JobFailed(f"the checkpoint of step {training.start_step} in {training.checkpoints} is gone")
        return training, None
    return training if found.step == training.start_step else training.going_on_from(found.state()), found


class Worker:
    def __init__(
        self, training: Training, team: Team, device: torch.device, source: Source, bulletin: Bulletin
    ) -> None:
        self.team, self.device, self.source, self.bulletin = team, device, source, bulletin
        # Looked for once: one that appears meanwhile would be loaded by some workers and not by others.
        self.training, begun_from = team.of_leader(from_newest(training) if team.leads else (training, None))
        stage = training.stage
        self.stage = stage
        on_gpu = device.type == "cuda"
        self.codec: Codec = load_codec(stage.codec, device, compiled=stage.compiled and on_gpu)
        self.encoder: TextEncoder = load_text_encoder(training.text_encoder, device, layers=training.model.text_layers)
        self.loop = build_loop(self.training, begun_from, self.codec, device)
        self.saver: Saver | None = None
        self.log: Log | None = None
        if team.leads:
            checkpoints = Checkpoints(training.checkpoints)
            self.saver = Saver(checkpoints, keep_last=stage.keep_last, keep_every=stage.keep_every)
            config = LogConfig(wandb="homemade-diffusion" if training.wandb else None)
            self.log = Log(Path(training.folder), self.training.start_step, config, training.record())
        self.pace = Pace(
            start_step=self.training.start_step,
            stop_step=training.stop_step,
            workers=team.size,
            peak_teraflops=peak_teraflops(torch.cuda.get_device_name(device)) if on_gpu else None,
            price_per_hour=training.price_per_hour,
            **({"before": self.log.before} if self.log else {}),
        )
        self.started = time.perf_counter()
        self.counts, self.encoding = Counts(), Stopwatch(device)
        self.last = Mark(step=self.training.start_step)
        self.told_failures = 0
        self.unwritable: set[Path] = set()
        self.rollbacks = 0
        self.held_out: Batch | None = None
        if team.leads and not source.data.layout.held_out_count:
            bulletin.remark(
                f"none of the {training.selection.count} pictures is held out, so there is no validation loss; "
                "--set hold_out=0.1 holds out a tenth"
            )
        self.tagger = Tagger.load(Path(training.tagger), str(device)) if training.tagger and team.leads else None

    def run(self) -> int:
        """Steps taken when it ended: the stage's last one, or fewer where it was asked to stop.

        JobFailed where going on makes no sense: the caller should not try again.
        """
        batches = self.source.batches(self.training)
        stops = False
        while self.loop.steps_taken < self.training.stop_step and not stops:
            self._step(batches)
            taken = self.loop.steps_taken
            stops = self.team.any(self.bulletin.stop_is_asked())
            ends = stops or taken == self.training.stop_step
            saves = ends or taken % self.stage.checkpoint_every == 0
            if (saves or taken % self.stage.log_every == 0) and self._report().worst_run >= _MOST_SKIPPED:
                self._roll_back()
                continue
            if saves:
                self._save()
            # Never where it is asked to stop: a spot machine may be gone before the evaluation is done.
            if not stops and (ends or taken % self.stage.evaluate_every == 0):
                self._evaluate()
        self._finish()
        return self.loop.steps_taken

    # --- A step -------------------------------------------------------------------------------------------------------

    def _step(self, batches: Iterator[Batch]) -> None:
        ids: list[str] = []

        def encoded() -> Iterator[Inputs]:
            for _ in range(self.training.accumulation):
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                ids.extend(batch.ids)
                self._note_replaced(batch)
                inputs = self._encode(batch)
                image_tokens = (inputs.latents_BCHW.shape[-1] // self.stage.patch_size) ** 2
                self.counts += batch_counts(
                    self.training.model, len(batch.ids), image_tokens, inputs.text_BTD.shape[1],
                    self.stage.selection_rate, waited, len(batch.replaced), frozen=self.training.lora is not None,
                )  # fmt: skip
                yield inputs

        self.loop.step(encoded())
        if self.training.audit:
            self._append(Path(self.training.audit), {"step": self.loop.steps_taken, "rank": self.team.rank, "ids": ids})

    def _encode(self, batch: Batch) -> Inputs:
        with self.encoding.running():
            return encode(batch, self.codec, self.encoder, self.stage, self.device, pads_text(self.training.model))

    def _note_replaced(self, batch: Batch) -> None:
        for name, why in batch.replaced:
            line = {"step": self.loop.steps_taken + 1, "id": name, "reason": why}
            self._append(Path(self.training.folder) / "replaced.jsonl", line)
        replaced, seen = self.counts.replaced + len(batch.replaced), self.counts.images + len(batch.ids)
        if batch.replaced and replaced > _REPLACED_EARLY + _REPLACED_SHARE * seen:
            name, why = batch.replaced[0]
            raise JobFailed(
                f"{replaced:.0f} of {seen:.0f} pictures could not be read, more than 1 in 1,000, such as {name} "
                f"({why}); {self.training.folder}/replaced.jsonl names them: mend the dataset and run the same command "
                "again"
            )

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        """A disk that is full costs the lines, not the training."""
        try:
            append_line(path, line)
        except OSError as error:
            if path not in self.unwritable:
                self.unwritable.add(path)
                self.bulletin.remark(f"{path} cannot be written ({error}): lines are missing; training goes on")

    # --- What is told, kept and judged --------------------------------------------------------------------------------

    def _report(self) -> Reading:
        """Figures of the steps since the last report."""
        reading = self.loop.read()
        now = self._mark()
        line = log_line(
            self.pace, self.last, now, loss=reading.loss, grad_norm=reading.grad_norm,
            learning_rate=reading.learning_rate, skipped_steps=reading.skipped,
            gpu_memory_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
            failed_saves=len(self.saver.failures) if self.saver else 0,
            failed_writes=self.log.failures if self.log else 0,
        )  # fmt: skip
        self.last = now
        if self.log and self.saver:
            self.log.metrics(line)
            self.bulletin.tell(line)
            for failure in self.saver.failures[self.told_failures :]:
                self.bulletin.remark(failure)
            self.told_failures = len(self.saver.failures)
        return reading

    def _mark(self) -> Mark:
        counts = replace(self.counts, encoding_seconds=self.encoding.seconds())
        seconds = time.perf_counter() - self.started
        return Mark(step=self.loop.steps_taken, seconds=seconds, counts=Counts.of(self.team.sum(counts.numbers())))

    def _skip_time(self) -> None:
        """What happened since the last report is no training: the next window begins now."""
        self.last = (
            replace(self._mark(), step=self.last.step) if self.last.step < self.loop.steps_taken else self._mark()
        )

    def _save(self) -> None:
        self.rollbacks = 0
        if self.saver:
            taken = self.loop.steps_taken
            [epoch], _ = self.source.data.order.epochs([self.training.position(taken)])
            self.saver.submit(taken, self.loop.tensors(), self.training.state(taken, int(epoch)))

    def _roll_back(self) -> None:
        """To the newest checkpoint, and on with other samples than those after it."""
        if self.saver:
            self.saver.wait()
        found = self.team.of_leader(Checkpoints(self.training.checkpoints).newest() if self.team.leads else None)
        step, self.rollbacks = self.loop.steps_taken, self.rollbacks + 1
        if found is None or self.rollbacks > _MOST_ROLLBACKS:
            raise JobFailed(
                f"the loss is not finite since step {step}, "
                + ("and there is no checkpoint yet" if found is None else f"also after {_MOST_ROLLBACKS} rollbacks")
                + "; give a new run a lower rate: --set optimizer.learning_rate=..."
            )
        position = self.training.position(step)
        self.loop.go_back(all_tensors(found), found.step)
        self.training = replace(self.training, start_step=found.step, start_position=position)
        self.last = replace(self._mark(), step=found.step)
        if self.log:
            self.log.go_back(found.step)
            self.bulletin.remark(
                f"no finite loss in {_MOST_SKIPPED} steps in a row before step {step}: back to step {found.step}, and "
                "on with other samples"
            )

    def _evaluate(self) -> None:
        """Of the averaged weights, shared among the workers."""
        line: Line = {"step": self.loop.steps_taken}
        count = min(_HELD_OUT, self.source.data.layout.held_out_count)
        if count:
            with self.loop.evaluation_model() as velocity:
                sums = validation_losses(
                    velocity, self._held_out_inputs(count), resolution=self.stage.resolution,
                    config=self.training.model, loss_weight_C=self.codec.loss_weight_C,
                )  # fmt: skip
            validation = Validation.of(torch.tensor(self.team.sum(sums.tolist()), dtype=torch.float64))
            line |= validation.line()
        grid = GridConfig(prompts=tuple(self.training.prompts), seed=self.stage.seed)
        shares = draw_share(self._picture_model(), self.loop.ema, grid, self.team.rank, self.team.size)
        pictures = dealt_back(self.team.gather(shares))
        if self.log:
            if self.tagger:
                agreement = tag_agreement(grid.prompts, self.tagger.asked(grid.prompts), self.tagger.found(pictures))
                line |= agreement.line()
            settings = grid.settings(self.stage.resolution)
            self.log.evaluation(line, grid_png(grid.prompts, pictures, grid.seeds, settings))
            told = {"validation_loss": line.get("loss"), "tag_agreement": line.get("tag_agreement")}
            self.bulletin.tell({name: value for name, value in told.items() if value is not None})
        self._skip_time()

    def _held_out_inputs(self, count: int) -> Iterator[Inputs]:
        numbers = range(count)[self.team.rank :: self.team.size]
        if self.held_out is None and numbers:
            self.held_out = self.source.held_out(numbers)
        for start in range(0, len(numbers), self.training.micro_batch):
            assert self.held_out
            yield self._encode(self.held_out.part(slice(start, start + self.training.micro_batch)))

    def _picture_model(self) -> PictureModel:
        return PictureModel(
            self.loop.model, self.codec, self.encoder, self.stage.text_tokens, self.device, self.loop.steps_taken,
            self.training.record(), self.loop.config.precision,
        )  # fmt: skip

    def _finish(self) -> None:
        """JobFailed where the last checkpoint could not be saved."""
        if not (self.saver and self.log):
            return
        self.saver.wait()
        newest = Checkpoints(self.training.checkpoints).newest()
        if newest is None or newest.step != self.loop.steps_taken:
            why = self.saver.failures[-1] if self.saver.failures else "it is not there"
            raise JobFailed(f"{why}; mend that and run the same command again")
        self.log.close()


def build_loop(training: Training, begun_from: Checkpoint | None, codec: Codec, device: torch.device) -> Loop:
    """The model as it was at `start_step`: that checkpoint's, or that of the stage it comes after, or new.

    ValueError, with the mend, where the base of adapters is gone or changed.
    """
    torch.manual_seed(training.stage.seed)
    loop = new_loop(training.stage, _new_model(training), training.stop_step, codec, device)
    if begun_from:
        loop.load(all_tensors(begun_from), begun_from.step)
    elif training.weights and Lora.of(config_of(training.weights)):
        loop.load({"model": trained_model(training.weights).state_dict()}, steps_taken=0)
    elif training.weights:
        loop.load({name: training.weights.tensors(name) for name in ("model", "ema")}, steps_taken=0)
    return loop


def new_loop(stage: StageConfig, model: XUT, steps: int, codec: Codec, device: torch.device) -> Loop:
    """At its first step of `steps`, those of the whole schedule."""
    on_gpu = device.type == "cuda"
    return Loop(
        model.to(device),
        LoopConfig(
            resolution=stage.resolution,
            batch_size=stage.batch_size,
            selection_rate=stage.selection_rate,
            total_steps=steps,
            ema_decay=stage.ema_decay,
            clip_norm=stage.clip_norm,
            timestep_shift=stage.timestep_shift,
            optimizer=stage.optimizer,
            precision=stage.precision if on_gpu else "fp32",
            compile=stage.compiled and on_gpu,
        ),
        codec.loss_weight_C,
    )


def _new_model(training: Training) -> XUT:
    """Random, or a frozen base with new adapters; on the CPU, whose random numbers are the same everywhere."""
    checkpointing = training.stage.checkpointing
    if training.lora is None:
        return XUT(training.model, checkpointing)
    model = training.lora.base_model(checkpointing)
    add_adapters(model, training.lora.rank)
    return model


def all_tensors(found: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """What `Loop.load` takes."""
    return {name: found.tensors(name) for name in ("model", "ema", "optimizer")}


def encode(
    batch: Batch,
    codec: Codec,
    encoder: TextEncoder,
    stage: StageConfig,
    device: torch.device,
    padding_is_text: bool = False,
) -> Inputs:
    """Pixels -> latents and text -> embeddings, by the frozen encoders of this worker."""
    text_BTD, mask_BT = encoder.encode(batch.texts, stage.text_tokens, stage.text_multiple, padding_is_text)
    pixels_B3HW = on_device(batch.pixels_BHW3, device).permute(0, 3, 1, 2)
    return Inputs(
        latents_BCHW=codec.encode(pixels_B3HW),
        text_BTD=text_BTD,
        text_mask_BT=mask_BT,
        frame_B4=on_device(batch.frame_B4, device),
        keys_B=on_device(batch.keys_B, device),
    )


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Without making the host wait for a GPU, which needs pinned memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
