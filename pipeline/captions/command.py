"""The command line of pipeline/caption.py."""

import argparse
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from captioner.prompts import PROMPT_VERSION, TEMPLATES
from captioner.sampling import Sampling
from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_dataset
from pipeline.storage.shards import Store

if TYPE_CHECKING:
    from pipeline.captions.model_captions import CaptionTask

# By engine.
_CONCURRENCY = {"vllm": 128, "openai": 32}
_TIMEOUT = {"vllm": 900.0, "openai": 180.0}


@dataclass(frozen=True, kw_only=True)
class CaptionJob:
    dataset: str
    name: str | None  # captions/<name>/; None: captions/
    engine: str
    model: str
    url: str
    engines: int | None
    tensor_parallel: int
    at_once: int | None
    timeout: float | None  # seconds
    tries: int
    prompt: str  # version
    temperatures: tuple[float, ...]
    max_tokens: int
    max_side: int  # pixels
    restart_after: int  # images
    retry_rejected: bool
    dollars_per_hour: float | None
    trial: int | None  # rows

    @property
    def folder(self) -> str:
        return f"captions/{self.name}" if self.name else "captions"

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperatures=tuple(self.temperatures), max_tokens=self.max_tokens)

    def task(self, dataset: Store) -> "CaptionTask":
        """What each worker gets. Raises UsageError if the model cannot be used."""
        from pipeline.captions.engine_config import CaptionSettings, EngineConfig, resolve_model
        from pipeline.captions.model_captions import CaptionTask

        engine, model = resolve_model(
            EngineConfig(
                engine=self.engine, model=self.model, url=self.url, tensor_parallel=self.tensor_parallel,
                concurrency=self.at_once or _CONCURRENCY[self.engine],
                timeout=self.timeout or _TIMEOUT[self.engine], tries=self.tries,
            )
        )  # fmt: skip
        settings = CaptionSettings(
            engine=self.engine, model=model, prompt_version=self.prompt, sampling=self.sampling, max_side=self.max_side
        )
        return CaptionTask(
            dataset=dataset.root, folder=self.folder, engine=engine, settings=settings,
            restart_after=self.restart_after, retry_rejected=self.retry_rejected,
        )  # fmt: skip


def parse_args(description: str) -> CaptionJob:
    """Raises UsageError for flags that are out of range or do not go together."""
    parser = Parser(prog="caption.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--dataset", default=default_dataset(), metavar="ROOT",
        help="Folder or s3:// prefix of the dataset. Default: $HDM_DATASET, then ./dataset.")
    add("--engine", choices=("tags", "vllm", "openai"), default="tags", help="Default: tags.")
    add("--name", help="Write captions/<name>/ instead of captions/, to keep captions of several engines.")
    add("--model", default="", metavar="FOLDER|NAME",
        help="vllm: folder or Hugging Face hub name of a Pixtral. openai: name on the server. Default: its only model.")
    add("--url", default="", help="Address of the server for --engine openai, such as http://127.0.0.1:8000.")
    add("--engines", type=int, metavar="N", help="Number of engines. Default: as many as the GPUs allow, else 1.")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs per engine. Default: 1.")
    add("--at-once", type=int, metavar="N",
        help=f"Requests at a time per engine. Default: vllm {_CONCURRENCY['vllm']}, openai {_CONCURRENCY['openai']}.")
    add("--timeout", type=float, metavar="SECONDS",
        help="For one answer, including the engine's queue; with openai, for each of its --tries. "
        f"Default: vllm {_TIMEOUT['vllm']:.0f}, openai {_TIMEOUT['openai']:.0f}.")
    add("--tries", type=int, default=5, metavar="N", help="Tries of each request to a server. Default: 5.")
    add("--prompt", choices=TEMPLATES, default=PROMPT_VERSION,
        help=f"Version of the prompt. Default: {PROMPT_VERSION}.")
    add("--temperatures", type=float, nargs="+", default=Sampling.temperatures, metavar="T",
        help="One per attempt, up to 3, none above the one before. Default: 0.5 0.3 0.2.")
    add("--max-tokens", type=int, default=Sampling.max_tokens, metavar="N", help="Tokens per answer. Default: 256.")
    add("--max-side", type=int, default=768, metavar="PIXELS",
        help="Pictures with a longer side are shrunk for the model. Default: 768.")
    add("--restart-after", type=int, default=50_000, metavar="IMAGES",
        help="Restart each engine after this many images, as vLLM's memory grows over days. 0: never. Default: 50000.")
    add("--retry-rejected", action="store_true",
        help="Ask again, with new seeds, for rows that the engine or the model failed on.")
    add("--dollars-per-hour", type=float, metavar="X", help="Price of one engine, to show what the job costs.")
    add("--try", dest="trial", type=int, metavar="N",
        help="Caption N rows spread over the dataset and write only ROOT/caption-trial.html, with an estimate for all.")
    # fmt: on
    job = CaptionJob(**vars(parser.parse_args()))
    _check(job)
    return job


def _check(job: CaptionJob) -> None:
    if job.name is not None and (not re.fullmatch(r"\w[\w.-]*", job.name) or job.name == "partial"):
        raise UsageError(f"--name {job.name!r} must be a folder name of letters, digits, _ . and -, but not 'partial'")
    if job.engine == "tags" and (job.model or job.url or job.retry_rejected or job.trial):
        raise UsageError("--model, --url, --retry-rejected and --try need --engine vllm or --engine openai")
    if job.engine == "vllm" and (not job.model or job.url):
        raise UsageError("--engine vllm needs --model FOLDER or NAME, and no --url, which is for --engine openai")
    if job.engine == "openai" and (not job.url or job.tensor_parallel != 1):
        raise UsageError("--engine openai needs --url, and no --tensor-parallel, which the server itself decides")
    counts = (job.engines, job.tensor_parallel, job.at_once, job.tries, job.timeout, job.trial)
    if any(number is not None and number <= 0 for number in counts):
        raise UsageError("--engines, --tensor-parallel, --at-once, --tries, --timeout and --try must be above 0")
    if job.max_side < 64 or job.restart_after < 0 or (job.dollars_per_hour or 0) < 0:
        raise UsageError("--max-side must be at least 64, --restart-after and --dollars-per-hour at least 0")
    try:
        _ = job.sampling
    except ValueError as error:
        raise UsageError(str(error)) from None
