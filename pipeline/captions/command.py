"""The command line of pipeline/caption.py."""

import argparse
import os
import re
from dataclasses import dataclass
from typing import Final

from captioner.prompts import PROMPT_VERSION, TEMPLATES
from captioner.sampling import Sampling
from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_dataset

MODEL_VARIABLE: Final = "HDM_CAPTION_MODEL"  # environment variable with the default of --model

# By engine.
_CONCURRENCY = {"vllm": 128, "openai": 32}
_TIMEOUT = {"vllm": 900.0, "openai": 180.0}
_PATCH: Final = 16  # pixels of a Pixtral's token; each row of patches ends with one more token
_MOST_PATCHES: Final = 64  # along a side; Pixtral shrinks larger pictures
_PROMPT_TOKENS: Final = 1024  # instructions and hints


@dataclass(frozen=True, kw_only=True)
class CaptionJob:
    dataset: str
    name: str | None  # captions/<name>/; None: captions/
    engine: str  # auto, tags, vllm or openai
    model: str
    wait: float  # seconds
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
    max_model_len: int  # tokens
    gpu_memory: float  # share of the card
    kv_cache: str  # data type
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

    @property
    def configured_model(self) -> str:
        """--model, else for vLLM the environment's."""
        return self.model or os.environ.get(MODEL_VARIABLE, "")

    @property
    def needs_model(self) -> str:
        """The flags of this command that captions from tags cannot honour, "" if there are none."""
        flags = {"--model": self.model, "--retry-rejected": self.retry_rejected, "--try": self.trial}
        return ", ".join(flag for flag, given in flags.items() if given)

    @property
    def concurrency(self) -> int:
        """Requests at a time per engine."""
        return self.at_once or _CONCURRENCY[self.engine]

    @property
    def answer_timeout(self) -> float:
        """Seconds for one answer."""
        return self.timeout or _TIMEOUT[self.engine]


def parse_args(description: str) -> CaptionJob:
    """Raises UsageError for flags that are out of range or do not go together."""
    parser = Parser(prog="caption.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--dataset", default=default_dataset(), metavar="ROOT",
        help="Folder or s3:// prefix of the dataset. Default: $HDM_DATASET, then ./dataset.")
    add("--engine", choices=("auto", "tags", "vllm", "openai"), default="auto",
        help="Default: auto. This is vllm if a model is given and a node can run it, otherwise tags.")
    add("--name", help="Write captions/<name>/ instead of captions/, to keep captions of several engines.")
    add("--model", default="", metavar="FOLDER|NAME",
        help="vllm: folder on the nodes that run it, or Hugging Face hub name, of a Pixtral. Default: "
        f"${MODEL_VARIABLE}. openai: name on the server. Default: its only model.")
    add("--wait", type=float, default=0.0, metavar="SECONDS",
        help="Wait this long for a node that can run the model. For clusters that start together with the job. "
        "Default: 0.")
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
    add("--max-model-len", type=int, default=8192, metavar="TOKENS",
        help="vllm: longest sum of picture, prompt and answer. Less leaves room for more requests. Default: 8192.")
    add("--gpu-memory", type=float, default=0.9, metavar="SHARE",
        help="vllm: share of a card's memory for weights and KV cache, above 0 and at most 1. Default: 0.9.")
    add("--kv-cache", choices=("auto", "fp8"), default="auto",
        help="vllm: data type of the KV cache. fp8 holds twice as many tokens. Default: auto, that of the weights.")
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
    if job.engine == "tags" and job.needs_model:
        raise UsageError(f"{job.needs_model} needs a model, which --engine tags does not use: leave one of them out")
    if job.url and job.engine != "openai":
        raise UsageError("--url is the address of a server: give --engine openai with it")
    if job.engine == "vllm" and not job.configured_model:
        raise UsageError(f"--engine vllm needs --model FOLDER or NAME, or {MODEL_VARIABLE} in the environment")
    if job.engine == "openai" and (not job.url or job.tensor_parallel != 1):
        raise UsageError("--engine openai needs --url, and no --tensor-parallel, which the server itself decides")
    counts = (job.engines, job.tensor_parallel, job.at_once, job.tries, job.timeout, job.trial)
    if any(number is not None and number <= 0 for number in counts):
        raise UsageError("--engines, --tensor-parallel, --at-once, --tries, --timeout and --try must be above 0")
    if job.wait < 0 or not 0 < job.gpu_memory <= 1:
        raise UsageError("--wait must be at least 0, --gpu-memory above 0 and at most 1")
    patches = min(-(-job.max_side // _PATCH), _MOST_PATCHES)
    needed = patches * (patches + 1) + _PROMPT_TOKENS + job.max_tokens
    if job.max_model_len < needed:
        raise UsageError(
            f"--max-model-len {job.max_model_len} is too short for a picture of {job.max_side} pixels, the prompt and "
            f"an answer: give at least {needed}, or a smaller --max-side"
        )
    if job.max_side < 64 or job.restart_after < 0 or (job.dollars_per_hour or 0) < 0:
        raise UsageError("--max-side must be at least 64, --restart-after and --dollars-per-hour at least 0")
    try:
        _ = job.sampling
    except ValueError as error:
        raise UsageError(str(error)) from None
