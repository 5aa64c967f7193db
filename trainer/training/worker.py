"""One training worker: trains from the newest checkpoint to the stage's last step. Imports no Ray.

All workers take the same steps on equal weights. Rank 0 writes checkpoints and logs.
"""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from pipeline.core.errors import JobFailed
from trainer.diffusion.conditioning import pads_text
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import SamplingSettings
from trainer.drawing.sheet import grid_png
from trainer.encoders.latents import Codec
from trainer.encoders.load_codec import load_codec
from trainer.encoders.text import TextEncoder, load_text_encoder
from trainer.encoders.vision import VisionModel, load_vision_model
from trainer.evaluation.tagger import Tagger, tag_agreement
from trainer.health.gpu_state import GpuReader, gpu_metrics
from trainer.health.hangs import Activity
from trainer.health.notify import Notice
from trainer.model.xut import Standardization
from trainer.recipe.training import Training
from trainer.runs.checkpoint import Checkpoints, Saver
from trainer.runs.checkpoint_copy import Copier
from trainer.runs.ema_snapshots import Snapshots
from trainer.runs.run_folder import write_config
from trainer.samples.data import Batch, TrainingData, concatenate, example_texts
from trainer.training import choose_attention, fit_memory
from trainer.training.encoding import by_length, encode
from trainer.training.loop import Reading, TrainingInputs
from trainer.training.loop_setup import all_tensors, build_loop, from_newest
from trainer.training.metrics import (
    COMPILE,
    FIRST_STEP,
    Counts,
    EarlierCost,
    JobContext,
    Line,
    Snapshot,
    batch_counts,
    log_line,
    peak_teraflops,
)
from trainer.training.replaced import Replaced
from trainer.training.run_log import Log, append_line
from trainer.training.step_times import RankTimes, SlowWorkers, device_name
from trainer.training.validation import draw_share, interleave, validation_line, validation_losses
from trainer.training.worker_group import WorkerGroup

# Skipped steps in a row that cause a rollback: then the weights have diverged, it is not just a bad batch.
_MAX_SKIPPED: Final = 3
_MAX_ROLLBACKS: Final = 3  # in a row to the same checkpoint
# After a stop was requested, for the last checkpoint and its copy: Ray kills a stopped job after 300 s, see
# deploy/start-ray.sh, of which the step in progress and the end of the job take some.
_STOP_SECONDS: Final = 150.0
_LEAST_COPY_SECONDS: Final = 5.0
_STATISTICS_TEXTS: Final = 512  # whose features are standardized: tens of thousands of tokens
_VALIDATION_SAMPLES: Final = 256  # more would change little and take longer than a log line is worth


class Reporter(Protocol):
    """A worker's connection to the driver of the job."""

    def stop_requested(self) -> bool:
        """True if the worker should save and end."""
        ...

    def report(self, line: Line) -> None:
        """Sends metrics, named as in `metrics.METRICS`."""
        ...

    def warn(self, text: str) -> None:
        """Sends a message about a problem that the metrics do not show."""
        ...

    def notify(self, notice: Notice) -> None:
        """Sends a message that is also an event of the run."""
        ...


@dataclass(frozen=True)
class SampleSource:
    """Where a worker's samples come from."""

    data: TrainingData
    batches: Callable[[Training], Iterator[Batch]]  # endless micro batches of this worker from start_step on
    held_out: Callable[[Sequence[int]], Batch]  # held-out samples by number


class Worker:
    def __init__(
        self, training: Training, group: WorkerGroup, device: torch.device, source: SampleSource, reporter: Reporter
    ) -> None:
        self.group, self.device, self.source, self.reporter = group, device, source, reporter
        self.activity = Activity()
        # Rank 0 looks for it alone. Otherwise a checkpoint that appears meanwhile would be loaded by some workers only.
        self.training, checkpoint = group.broadcast(
            from_newest(training, reporter.warn) if group.is_rank_zero else (training, None)
        )
        stage = training.stage
        self.stage = stage
        on_gpu = device.type == "cuda"
        self.device_name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
        self.first_device = group.broadcast(self.device_name)  # under which micro batches are recorded and looked up
        probes = not self._recall_micro_batch()
        if not probes:
            self.batches = source.batches(self.training)  # reading begins while the models load
        with self._phase("encoders"):
            self.codec: Codec = load_codec(stage.codec, device, compiled=stage.compiled and on_gpu)
            self.encoder: TextEncoder = load_text_encoder(
                training.text_encoder, device, training.model.text_layers, training.model.text_prefix
            )
            self.vision: VisionModel | None = None
        with self._phase("model"):
            self.loop = build_loop(self.training, checkpoint, self.codec, device)
            self._load_or_free_vision_model()
            self._choose_attention()
            if checkpoint is None and training.weights is None and training.lora is None:
                self._standardize_text()
        if probes:
            with self._phase("memory probe"):
                self._probe_micro_batch()
            self.batches = source.batches(self.training)
        self.gpu = GpuReader.of(device)
        self.copier: Copier | None = None
        self.saver: Saver | None = None
        self.log: Log | None = None
        if group.is_rank_zero:
            checkpoints = Checkpoints(training.checkpoints)
            self.saver = Saver(checkpoints, stage.keep_last, stage.keep_every)
            if training.copies is not None:
                self.copier = Copier(training.run, training.copies, reporter.warn, stage.keep_last, stage.keep_every)
                self.saver.then = self.copier.submit
                if checkpoint is not None and checkpoint != training.branch:
                    self.copier.submit(checkpoint)  # which the last start may not have copied
            record = self.training.record()
            self._write(lambda: write_config(Path(training.run), training.stage_name, record))  # with its micro batch
            self.log = Log(Path(training.folder), self.training.start_step, training.wandb, record)
        self.context = JobContext(
            start_step=self.training.start_step,
            stop_step=training.stop_step,
            workers=group.size,
            peak_teraflops=peak_teraflops(self.device_name) if on_gpu else None,
            price_per_hour=training.price_per_hour,
            before=self.log.before if self.log else EarlierCost(),
        )
        self.started = time.perf_counter()
        self.counts, self.times = Counts(), self.loop.times
        self.slow_workers = SlowWorkers(group.gather(device_name(device, socket.gethostname())))
        self.last = Snapshot(step=self.training.start_step)  # at the last log line
        self.reported_failures = 0
        self.unwritable: set[Path] = set()
        self.replaced = Replaced(training.folder, len(source.data.row_index.counts_G), self._append, reporter.warn)
        self.rollbacks = 0
        self.stopped_at: float | None = None
        self.held_out: Batch | None = None
        if group.is_rank_zero and not source.data.row_index.held_out_count:
            reporter.warn(
                f"none of the {training.selection.count} pictures is held out, so there is no validation loss; "
                "--set hold_out=0.1 holds out a tenth"
            )
        tagger = training.tagger if group.is_rank_zero else None
        self.tagger = Tagger.load(Path(tagger), str(device)) if tagger else None

    def run(self) -> int:
        """Trains and returns the number of steps taken: the stage's last one, or fewer if a stop was requested.

        JobFailed if a restart would fail in the same way. If memory runs out, the next start uses half the micro batch.
        """
        try:
            return self._train()
        except (RuntimeError, MemoryError) as error:
            if fit_memory.is_out_of_memory(error):
                self._lower_micro_batch(error)
            raise

    def _train(self) -> int:
        stops = False
        while self.loop.steps_taken < self.training.stop_step and not stops:
            self._step(self.batches)
            self.activity.finish_step()
            taken = self.loop.steps_taken
            stops = self.group.any(self.reporter.stop_requested())
            if stops:
                self.stopped_at = time.monotonic()
            ends = stops or taken == self.training.stop_step
            saves = ends or taken % self.stage.checkpoint_every == 0
            if (saves or taken % self.stage.log_every == 0) and self._report().worst_run >= _MAX_SKIPPED:
                with self.activity.waiting():
                    self._roll_back()
                continue
            with self.activity.waiting():
                if self.training.takes_snapshot(taken):
                    self._save_snapshot(taken)
                if saves:
                    self._save()
                # Not after a stop request: a spot machine may be gone before the evaluation ends.
                if not stops and (ends or taken % self.stage.evaluate_every == 0):
                    self._evaluate()
        with self.activity.waiting():
            self._finish()
        return self.loop.steps_taken

    def _write(self, write: Callable[[], None]) -> None:
        """Writes to the run folder at the start. A full disk does not end the training."""
        try:
            write()
        except OSError as error:
            self.reporter.warn(f"{self.training.folder} cannot be written ({error}); training goes on")

    def _choose_attention(self) -> None:
        """All workers take the kernel that is fastest on rank 0, so that they round alike."""
        chosen = None
        if self.group.is_rank_zero:
            chosen = choose_attention.choose(self.training, self.device, self.device_name)
        kernel, seconds = self.group.gather(chosen)[0] or ("default", {})
        self.loop.model.attention_kernel = kernel
        if seconds and self.group.is_rank_zero:
            times = ", ".join(f"{name} {each * 1e3:.2f} ms" for name, each in seconds.items())
            self.reporter.warn(f"attention by {kernel}: {times}")

    @contextmanager
    def _phase(self, name: str, shown: bool = True) -> Iterator[None]:
        """A phase of the start. Reports its time, first as None: the driver shows what takes so long."""
        began = time.perf_counter()
        if shown and self.group.is_rank_zero:
            self.reporter.report({f"startup_seconds/{name}": None})
        yield
        if shown and self.group.is_rank_zero:
            self.reporter.report({f"startup_seconds/{name}": time.perf_counter() - began})

    # --- Memory -------------------------------------------------------------------------------------------------------

    def _recall_micro_batch(self) -> bool:
        """Takes over the recorded or given micro batch. False if it is to be probed, beginning with the estimate."""
        training = self.training
        recalled = self.group.broadcast(fit_memory.remembered(training, self.first_device))
        if recalled is not None:
            self.training = recalled
        elif self.device.type == "cuda" and not fit_memory.is_chosen_by_stage(training):
            available = min(self.group.gather(torch.cuda.mem_get_info(self.device)[0]))
            self.training = fit_memory.with_fit(training, fit_memory.estimated(training, available))
            return False
        return True

    def _probe_micro_batch(self) -> None:
        """Chooses the largest micro batch that fits on the GPUs of all workers, and records it."""
        text_is_padded = pads_text(self.training.model)
        size, figures = fit_memory.probe(
            self.training, self.loop, self.codec, self.encoder, text_is_padded, self.vision
        )
        smallest = min(self.group.gather(size))
        if smallest == 0:
            error = torch.OutOfMemoryError("a probe of one sample does not fit")
            self._lower_micro_batch(error)
            raise error
        self.training = replace(self.training, micro_batch=smallest)
        if self.group.is_rank_zero:
            self._write(lambda: fit_memory.record(self.training, self.device_name, figures))
            self.reporter.warn(
                f"micro batch {smallest}, recomputed blocks: {self.training.checkpointing}; {figures} on one "
                f"{self.device_name}"
            )

    def _load_or_free_vision_model(self) -> None:
        """Has the vision model in memory if the next step needs it. A rollback may need it again."""
        name = self.stage.repa.features
        if not self.loop.aligns or name is None:
            if self.vision is not None:
                self.vision = None
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        elif self.vision is None:
            self.vision = load_vision_model(name, self.device)

    def _lower_micro_batch(self, error: BaseException) -> None:
        """Records the smaller micro batch with which the next start goes on from the newest checkpoint."""
        lower = fit_memory.lowered(self.training, error)
        fit_memory.record(lower, self.first_device, f"memory was full with {self.training.micro_batch} samples")
        self.reporter.warn(
            f"memory is full with a micro batch of {self.training.micro_batch} ({fit_memory.first_line(error)}): going "
            f"on from the newest checkpoint with {lower.micro_batch}, recomputed blocks: {lower.checkpointing}"
        )

    def _standardize_text(self) -> None:
        """Gives new weights the statistics of the selection's texts. Every worker gets those of rank 0."""
        standard = self.loop.model.text_standard
        if not isinstance(standard, Standardization):
            return
        mean_D, deviation_D = standard.mean, standard.deviation
        if self.group.is_rank_zero:
            texts = example_texts(self.training.selection, _STATISTICS_TEXTS)
            mean_D, deviation_D = self.encoder.statistics(texts, self.stage.text_tokens)
        standard.set(*self.group.broadcast((mean_D, deviation_D)))

    # --- A step -------------------------------------------------------------------------------------------------------

    def _step(self, batches: Iterator[Batch]) -> None:
        is_first = not self.context.startup_seconds
        self._load_or_free_vision_model()
        with self._phase("first batch", is_first), self.times.data.running(), self.activity.waiting():
            batch = concatenate([self._read(batches) for _ in range(self.training.accumulation)])
        compiles = self.stage.compiled and self.device.type == "cuda"
        with self._phase(COMPILE if compiles else FIRST_STEP, is_first):
            with self.times.step.running():
                self.loop.step(self._encoded(batch))
            if is_first and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        if is_first:
            self.context = replace(self.context, startup_seconds=time.perf_counter() - self.started)
        if self.training.audit:
            line = {"step": self.loop.steps_taken, "rank": self.group.rank, "ids": batch.ids}
            self._append(Path(self.training.audit), line)

    def _read(self, batches: Iterator[Batch]) -> Batch:
        """The next micro batch. JobFailed if too many samples were replaced."""
        batch = next(batches)
        self.replaced.note(self.loop.steps_taken + 1, self.stage.batch_size, batch.replaced)
        self.counts += Counts(replaced=len(batch.replaced))
        return batch

    def _encoded(self, batch: Batch) -> Iterator[TrainingInputs]:
        """This worker's share of a step in micro batches of texts of about the same length, so that little is padded.

        Which samples share a micro batch changes only the order of a sum.
        """
        with self.times.text.running():
            lengths = self.encoder.lengths(batch.texts, self.stage.text_tokens)
        for numbers in by_length(lengths, self.training.micro_batch):
            cut_before = self.encoder.cut_texts
            inputs = self._encode(batch.take(numbers), self.vision)
            image_tokens = (inputs.latents_BCHW.shape[-1] // self.stage.patch_size) ** 2
            self.counts += batch_counts(
                self.training.model, len(numbers), image_tokens, inputs.text_BTD.shape[1], self.stage.selection_rate,
                cut_texts=self.encoder.cut_texts - cut_before, frozen=self.training.lora is not None,
            )  # fmt: skip
            yield inputs

    def _encode(self, batch: Batch, vision: VisionModel | None = None) -> TrainingInputs:
        times = self.times
        return encode(
            batch, self.codec, self.encoder, self.stage, self.device, pads_text(self.training.model), times.text,
            times.vae, vision,
        )  # fmt: skip

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        """Appends a line. A full disk does not end the training."""
        try:
            append_line(path, line)
        except OSError as error:
            if path not in self.unwritable:
                self.unwritable.add(path)
                self.reporter.warn(f"{path} cannot be written ({error}): lines are missing; training goes on")

    # --- Logs, checkpoints and evaluation -----------------------------------------------------------------------------

    def _report(self) -> Reading:
        """Logs and reports the metrics since the last log line."""
        reading = self.loop.read()
        now = self._snapshot()
        line = log_line(
            self.context, self.last, now, loss=reading.loss, grad_norm=reading.grad_norm,
            learning_rate=reading.learning_rate, grad_norm_limit=reading.grad_norm_limit,
            loss_by_time=reading.loss_by_time, repa_loss=reading.repa_loss,
            skipped_steps=reading.skipped, outlier_steps=reading.outliers,
            gpu_memory_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
            failed_saves=len(self.saver.failures) if self.saver else 0,
            failed_writes=self.log.failures if self.log else 0,
        )  # fmt: skip
        if self.device.type == "cuda":
            line |= gpu_metrics(self.group.gather(self.gpu.read()))
        slow = self.slow_workers.update([times.step for times in now.ranks], now.step - self.last.step)
        self.last = now
        self.times.forget_steps()
        if self.log and self.saver:
            self.log.metrics(line)
            self.reporter.report(line)
            for message in slow:
                self.reporter.warn(message)
            for failure in self.saver.failures[self.reported_failures :]:
                self.reporter.warn(failure)
            self.reported_failures = len(self.saver.failures)
        return reading

    def _snapshot(self) -> Snapshot:
        counts = replace(self.counts, **self.times.totals()).numbers()
        own = self.times.of_steps()
        # One sum for all: each worker adds its times at places of its own.
        by_rank = [own if rank == self.group.rank else RankTimes(0, 0) for rank in range(self.group.size)]
        placed = [number for times in by_rank for number in (times.step, times.data_wait)]
        summed = self.group.sum(counts + placed)
        ranks = tuple(RankTimes(*pair) for pair in zip(*[iter(summed[len(counts) :])] * 2, strict=True))
        seconds = time.perf_counter() - self.started
        return Snapshot(step=self.loop.steps_taken, seconds=seconds, counts=Counts(*summed[: len(counts)]), ranks=ranks)

    def _save(self) -> None:
        self.rollbacks = 0
        if self.saver:
            taken = self.loop.steps_taken
            [epoch], _ = self.source.data.order.epochs([self.training.position(taken)])
            self.saver.submit(taken, self.loop.tensors(), self.training.state(taken, int(epoch)))

    def _save_snapshot(self, step: int) -> None:
        if self.saver and self.loop.power_ema:
            snapshots = Snapshots(self.training.checkpoints)
            tensors = self.loop.power_ema.state_dict()
            self.saver.submit_snapshot(step, tensors, lambda copies: snapshots.save(step, copies))

    def _roll_back(self) -> None:
        """Loads the newest checkpoint and continues with the samples after the current position."""
        if self.saver:
            self.saver.wait()
        newest = Checkpoints(self.training.checkpoints).newest() if self.group.is_rank_zero else None
        found = self.group.broadcast(newest)
        step, self.rollbacks = self.loop.steps_taken, self.rollbacks + 1
        if found is None or self.rollbacks > _MAX_ROLLBACKS:
            raise JobFailed(
                f"steps are skipped since step {step} (loss or gradient not finite, or gradient outliers), "
                + ("and there is no checkpoint yet" if found is None else f"also after {_MAX_ROLLBACKS} rollbacks")
                + "; start a new run with a lower rate: --set optimizer.learning_rate=..."
            )
        position = self.training.position(step)
        self.loop.roll_back(all_tensors(found), found.step)
        self.training = replace(self.training, start_step=found.step, start_position=position)
        self.last = self._snapshot()
        if self.log:
            self.log.rewind(found.step)
            reason = (
                f"{_MAX_SKIPPED} steps in a row were skipped before step {step} (loss or gradient not finite, or "
                f"gradient outliers): back to step {found.step}, going on with other samples"
            )
            self.reporter.notify(Notice("rolled back", reason))

    def _evaluate(self) -> None:
        """Validation loss and picture grid of the averaged weights. The workers share both."""
        line: Line = {"step": self.loop.steps_taken}
        count = min(_VALIDATION_SAMPLES, self.source.data.row_index.held_out_count)
        if count:
            with self.loop.evaluation_model() as velocity:
                sums = validation_losses(
                    velocity, self._held_out_inputs(count), resolution=self.stage.resolution,
                    config=self.training.model, loss_weight_C=self.codec.loss_weight_C,
                )  # fmt: skip
            line |= validation_line(self.group.sum(sums.tolist()))
        prompts = self.training.prompts
        seeds = [self.stage.seed + number for number in range(len(prompts))]
        settings = SamplingSettings(width=self.stage.resolution, height=self.stage.resolution)
        model = PictureModel(
            self.loop.model, self.codec, self.encoder, self.stage.text_tokens, self.device, self.loop.steps_taken,
            self.training.record(), self.loop.precision,
        )  # fmt: skip
        with self._eager():
            share = draw_share(model, self.loop.ema, prompts, seeds, settings, self.group.rank, self.group.size)
        pictures = interleave(self.group.gather(share))
        if self.log:
            if self.tagger:
                agreement = tag_agreement(prompts, self.tagger.asked(prompts), self.tagger.found(pictures))
                line |= agreement.line()
            self.log.evaluation(line, grid_png(prompts, pictures, seeds, settings))
            results = {"validation_loss": line.get("loss"), "tag_agreement": line.get("tag_agreement")}
            self.reporter.report({name: value for name, value in results.items() if value is not None})
        # The time of the evaluation does not count as training.
        self.last = self._snapshot()

    def _eager(self) -> AbstractContextManager[object]:
        """Runs blocks without compiling them: a grid of pictures has other shapes than a training step."""
        is_compiled = self.stage.compiled and self.device.type == "cuda"
        return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()

    def _held_out_inputs(self, count: int) -> Iterator[TrainingInputs]:
        numbers = range(count)[self.group.rank :: self.group.size]
        if self.held_out is None and numbers:
            self.held_out = self.source.held_out(numbers)
        for start in range(0, len(numbers), self.training.micro_batch):
            assert self.held_out
            yield self._encode(self.held_out.part(slice(start, start + self.training.micro_batch)))

    def _finish(self) -> None:
        """JobFailed if the last checkpoint could not be saved."""
        if not (self.saver and self.log):
            return
        self.saver.wait()
        newest = Checkpoints(self.training.checkpoints).newest()
        if newest is None or newest.step != self.loop.steps_taken:
            why = self.saver.failures[-1] if self.saver.failures else "it is not there"
            raise JobFailed(f"{why}; fix that and run the same command again")
        if self.copier and self.stopped_at is None:
            self.copier.close()
        elif self.copier and self.stopped_at is not None:
            left = _STOP_SECONDS - (time.monotonic() - self.stopped_at)
            self.copier.close(max(_LEAST_COPY_SECONDS, left))
        self.log.close()
