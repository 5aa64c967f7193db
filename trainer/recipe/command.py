"""The command line of trainer/run.py as one frozen dataclass. Imports neither torch nor Ray, so --help is instant."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_dataset, default_run, local_path
from pipeline.core.text_files import read_text
from trainer.health.notify import check_address


@dataclass(frozen=True, kw_only=True)
class Command:
    """The flags as given. UsageError for a price or a number of failures out of range."""

    stage: str
    dataset: str
    run: str
    checkpoints: str | None = None  # folder or s3:// prefix that holds <stage>/checkpoints; None: the run folder
    checkpoints_copy: str | None = None  # folder or s3:// prefix of a second copy; None: there is none
    workers: int | str = 1  # N, or FEWEST-MOST
    steps: int | None = None  # optimizer steps in total; None: the stage's own number
    anneal: int | None = None  # optimizer steps of a decay from a checkpoint; None: train the stage
    settings: Sequence[str] = ()  # the FIELD=VALUE of each --set
    start_from: str | None = None  # run, stage or checkpoint folder, or "nothing"; None: the previous stage of this run
    lora: int | None = None  # rank of the adapters to train; None: train the whole model
    new_order: bool = False  # start a new epoch if the data order differs from the checkpoint's
    audit: str | None = None
    price_per_hour: float | None = None  # dollars, for the whole cluster
    wandb: bool = False
    tagger: str | None = None
    prompts: str | None = None
    max_failures: int = 3
    s3_wait: float = 6.0  # hours
    notify: str | None = field(default=None, repr=False)  # address that gets events; may hold a secret

    def __post_init__(self) -> None:
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise UsageError(
                f"--price-per-hour {self.price_per_hour}: give the dollars per hour of the whole cluster, at least 0"
            )
        if self.anneal is not None and self.anneal < 1:
            raise UsageError(f"--anneal {self.anneal}: give the number of steps of the decay, at least 1")
        if self.anneal is not None and self.steps is not None:
            raise UsageError("--anneal N ends N steps after its checkpoint: leave out --steps")
        if self.anneal is not None and self.start_from == "nothing":
            raise UsageError("--anneal continues a checkpoint: leave out --from, or name a checkpoint")
        if self.max_failures < 0:
            raise UsageError(f"--max-failures {self.max_failures}: must be at least 0")
        if not 0 <= self.s3_wait < math.inf:
            raise UsageError(f"--s3-wait {self.s3_wait}: give the hours to wait for S3 or a network folder, at least 0")
        if self.notify is not None:
            check_address(self.notify)

    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers. UsageError unless --workers is N or FEWEST-MOST."""
        fewest, dash, most = str(self.workers).partition("-")
        if not (fewest.isdecimal() and (most.isdecimal() if dash else True)):
            raise UsageError(f"--workers {self.workers!r}: give a number, such as 4, or a range, such as 1-4")
        if dash and int(fewest) > int(most):
            raise UsageError(f"--workers {self.workers}: the range begins with the smaller number: {most}-{fewest}")
        return int(fewest), int(most) if dash else int(fewest)

    def grid_prompts(self) -> list[str] | None:
        """The non-empty lines of the file given by --prompts, or None without the flag."""
        if self.prompts is None:
            return None
        path = local_path("--prompts", self.prompts)
        try:
            prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts {path}: {error}; give a text file with one prompt per line") from error
        if not prompts:
            raise UsageError(f"--prompts {path} is empty; give a text file with one prompt per line")
        return prompts

    def audit_file(self) -> str | None:
        """Absolute path of the file given by --audit. Opened once, so that an unwritable file fails here."""
        if self.audit is None:
            return None
        file = local_path("--audit", self.audit).resolve()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("ab").close()
        except OSError as error:
            raise UsageError(f"--audit {file}: {error.strerror}; give a file that can be written") from error
        return str(file)

    def tagger_folder(self) -> str | None:
        """Absolute path of the classifier folder given by --tagger."""
        if self.tagger is None:
            return None
        folder = local_path("--tagger", self.tagger).resolve()
        if not any(Path(folder, name).is_file() for name in ("model.onnx", "config.json")):
            raise UsageError(
                f"--tagger {folder} has neither model.onnx nor config.json; give a classifier folder, as for "
                "pipeline/score.py --model"
            )
        return str(folder)


def parse_args(description: str | None) -> Command:
    parser = Parser(prog="run.py", description=description)
    add = parser.add_argument
    add("--stage", required=True, help="Stage to train: demo, 256, 512, 768 or 1024.")
    add(
        "--dataset", default=default_dataset(), metavar="ROOT",
        help="Folder or s3:// prefix of the dataset. Default: $HDM_DATASET, then ./dataset.",
    )  # fmt: skip
    add(
        "--run", default=default_run(), metavar="DIR",
        help="Run folder of all stages. Metrics and checkpoints go to DIR/<stage>. Default: $HDM_RUN, then ./run.",
    )  # fmt: skip
    add(
        "--checkpoints", metavar="HOME",
        help="Folder or s3:// prefix for checkpoints, which go to HOME/<stage>/checkpoints. Default: the run folder.",
    )  # fmt: skip
    add(
        "--checkpoints-copy", metavar="COPY",
        help="Keep a second copy of the checkpoints in COPY/<stage>/checkpoints, a folder or s3:// prefix. A run that "
        "has lost its checkpoints goes on from there.",
    )  # fmt: skip
    add(
        "--workers", default=os.environ.get("HDM_WORKERS") or 1, metavar="N",
        help="Training processes, one per GPU. A range, such as 1-4, starts with as many as there is room for, goes on "
        "with fewer when a node is lost, and with more when one joins. Default: $HDM_WORKERS, then 1.",
    )  # fmt: skip
    add("--steps", type=int, metavar="N", help="Optimizer steps in total. Default: the stage's samples / batch_size.")
    add(
        "--anneal", type=int, metavar="N",
        help="Decay the learning rate to its end within N steps from a checkpoint of the stage: the newest one, or the "
        "one that --from names. Writes to DIR/STAGE-anneal-STEP-N and leaves the stage as it is.",
    )  # fmt: skip
    add(
        "--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE",
        help="Change a field of the stage, such as samples=1000, optimizer.learning_rate=1e-3, "
        "captions.tag_dropout=0.1, model=tiny or model.text_layers=average. Repeatable.",
    )  # fmt: skip
    add(
        "--from", dest="start_from", metavar="FOLDER",
        help="Start from the weights of this run, stage or checkpoint folder, or from random weights with 'nothing'. "
        "Default: the newest checkpoint of the previous stage. With --lora also a model folder of export.py "
        "--from-released.",
    )  # fmt: skip
    add(
        "--lora", type=int, metavar="RANK",
        help="Train low-rank adapters on the frozen weights given by --from instead of a whole model.",
    )  # fmt: skip
    add(
        "--new-order", action="store_true",
        help="Start a new epoch if the selection, batch_size, seed or anything else the data order depends on has "
        "changed since the checkpoint.",
    )  # fmt: skip
    add("--audit", metavar="FILE", help="Append a JSON line per step and worker with the sample ids it trained on.")
    add(
        "--price-per-hour",
        type=float,
        metavar="DOLLARS",
        help="Price of the whole cluster. Logs the cost.",
    )
    add("--wandb", action="store_true", help="Also log to Weights & Biases.")
    add("--tagger", metavar="FOLDER", help="Classifier that scores the pictures drawn during training.")
    add("--prompts", metavar="FILE", help="Prompts of those pictures, one per line. Default: texts of the selection.")
    add(
        "--max-failures", type=int, default=3, metavar="N",
        help="Failures in a row, without a new checkpoint in between, after which the job gives up. Default: 3.",
    )  # fmt: skip
    add(
        "--s3-wait", type=float, default=6.0, metavar="HOURS",
        help="How long to wait while S3 or a network folder cannot be reached. Default: 6.",
    )  # fmt: skip
    add(
        "--notify", default=os.environ.get("HDM_NOTIFY") or None, metavar="URL",
        help="Post JSON to this http or https address when the run ends, fails, stalls or rolls back. Default: "
        "$HDM_NOTIFY, which suits addresses with a secret: others can see a command line.",
    )  # fmt: skip
    return Command(**vars(parser.parse_args()))
