"""One resolved training job: everything a worker needs to know. Plain data that is sent to every worker."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.model.config import XUTConfig
from trainer.model.xut import Checkpointing
from trainer.optimization.schedule import Anneal, Schedule
from trainer.recipe.stage_config import dividing_counts, micro_batch
from trainer.recipe.stages import StageConfig
from trainer.runs.checkpoint import Checkpoint
from trainer.runs.training_state import training_state
from trainer.runs.weights import Lora
from trainer.samples.data import CropConfig
from trainer.samples.row_index import Selection


@dataclass(frozen=True, kw_only=True)
class Training:
    """Paths are absolute and visible to every worker."""

    stage_name: str  # of the folder: a stage, or an anneal (`run_folder.anneal_name`)
    stage: StageConfig
    model: XUTConfig
    selection: Selection
    codec_factor: int  # pixels per latent, along a side
    run: str  # run folder, shared by all stages
    folder: str  # folder of this stage: config.json, metrics.jsonl
    checkpoints: str  # folder or s3:// prefix of this stage's checkpoints
    checkpoint_home: str | None  # value of --checkpoints
    copies: str | None  # folder or s3:// prefix of their second copies
    text_encoder: str  # folder or hub name
    example_prompts: list[str]  # texts of the selection that serve as example prompts
    workers: int  # of a range, the most
    fewest_workers: int  # the number may change between this one and `workers` as nodes come and go
    # Samples per forward pass of a worker, and the blocks that are recomputed. Where the stage says "auto", a worker on
    # a GPU replaces them before its first step, see trainer/training/fit_memory.py.
    micro_batch: int
    checkpointing: Checkpointing
    start_step: int  # optimizer steps already taken; above 0 the weights come from the stage's newest checkpoint
    stop_step: int  # last step of this job and of the learning rate schedule
    anneal: Anneal | None  # decay of the learning rate from a checkpoint on; None: the schedule of the stage
    branch: Checkpoint | None  # of another folder, which an anneal without checkpoints of its own continues
    start_position: int  # position in the data order at start_step; a multiple of batch_size
    first_epoch: int  # number of the epoch that starts at position 0
    weights: Checkpoint | None  # checkpoint of another stage or run whose model and EMA initialize step 0
    lora: Lora | None  # adapters to train and their base weights; None: the whole model is trained
    began_from: str | None  # folder of the initial weights, kept when the run is resumed
    notes: tuple[str, ...]  # lines to print before training starts
    prompts: list[str]  # prompts of the picture grid
    audit: str | None  # file that gets the sample ids of every step and worker
    price_per_hour: float | None  # dollars, for the whole cluster
    wandb: bool
    tagger: str | None  # folder of the classifier that scores the picture grid
    s3_wait: float  # hours to wait while S3 or a network folder cannot be reached
    max_failures: int  # in a row without a new checkpoint, after which the job ends; each resumes from the newest one

    @property
    def accumulation(self) -> int:
        """Micro batches of one worker per optimizer step."""
        return self.stage.batch_size // (self.workers * self.micro_batch)

    def worker_counts(self) -> list[int]:
        """The numbers of workers of the range that divide the batch, ascending."""
        return dividing_counts(self.stage, self.fewest_workers, self.workers)

    def with_workers(self, workers: int) -> "Training":
        """The job on this number of workers, with a micro batch for it."""
        if workers == self.workers:
            return self
        return replace(self, workers=workers, micro_batch=micro_batch(self.stage, workers))

    def position(self, step: int) -> int:
        """Position in the data order of the first sample of step `step`, which is at least start_step."""
        return self.start_position + (step - self.start_step) * self.stage.batch_size

    def takes_snapshot(self, step: int) -> bool:
        """True if the power-function averages are saved after `step` steps: at equal distances in the stage."""
        first = self.anneal.start if self.anneal else 0
        count = self.stage.ema_snapshots
        return count > 0 and (step - first) % max(1, (self.stop_step - first) // count) == 0

    def schedule(self) -> Schedule:
        return Schedule(self.stage.optimizer, self.stop_step, self.anneal)

    def crop(self) -> CropConfig:
        return CropConfig(self.stage.resolution, self.stage.captions, self.stage.seed, self.stage.flip)

    def record(self) -> dict[str, Any]:
        """What is trained on what, as JSON. Stored in config.json and in every checkpoint."""
        selection = {
            "dataset": self.selection.dataset,
            "name": self.selection.name,
            "hash": self.selection.digest,
            "images": self.selection.images,
        }
        return {
            "stage_name": self.stage_name,
            "stage": asdict(self.stage),
            "model": self.model.to_dict(),
            "selection": selection,
            "steps": self.stop_step,
            "anneal": asdict(self.anneal) if self.anneal else None,
            "workers": self.workers,
            "micro_batch": self.micro_batch,
            "checkpointing": self.checkpointing,
            "checkpoints": self.checkpoint_home,
            "began_from": self.began_from,
            "lora": asdict(self.lora) if self.lora else None,
            "run": self.run,
            "example_prompts": self.example_prompts,
        }

    def state(self, step: int, epoch: int) -> dict[str, Any]:
        """state.json of a checkpoint taken after `step` steps, when `epoch` is in progress."""
        return training_state(
            stage_name=self.stage_name,
            epoch=epoch,
            position=self.position(step),
            first_epoch=self.first_epoch,
            seed=self.stage.seed,
            config=self.record(),
            selection=self.selection.digest,
        )

    def resumed_from(self, state: dict[str, Any]) -> "Training":
        """The same job, continued from a checkpoint with this state.json."""
        return replace(
            self,
            weights=None,
            start_step=state["step"],
            start_position=state["position"],
            first_epoch=state["first_epoch"],
        )
