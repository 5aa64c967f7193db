"""JOB: image shards -> one caption per image; images are never rewritten.

--engine tags needs no model. vllm runs Pixtral on the GPUs of this machine or cluster (or on a CPU: make captioner),
openai asks a server, with the key in OPENAI_API_KEY. Run it again: only what is not finished, or was made otherwise, is
captioned.
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import JobFailed, ShardsFailed, UsageError
from pipeline.core.jobs import Parser, default_dataset, run
from pipeline.storage.fingerprints import Footer, changes, image_footers, made_from
from pipeline.storage.run_record import write_run_record
from pipeline.storage.shards import Store

if TYPE_CHECKING:
    from pipeline.captions.model_captions import CaptionTask

_ENGINES = ("tags", "vllm", "openai")
_AT_ONCE = {"vllm": 128, "openai": 32}
_TIMEOUT = {"vllm": 900.0, "openai": 180.0}
# Share of a job's rows on which the engine may fail, and how many rows that are worth a word.
_MOST_FAILED, _FEW = 0.2, 10


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
    prompt: str | None  # version
    temperatures: list[float] | None
    max_tokens: int | None
    max_side: int  # pixels
    restart_after: int  # images
    retry_rejected: bool
    dollars_per_hour: float | None
    trial: int | None  # rows

    @property
    def folder(self) -> str:
        return f"captions/{self.name}" if self.name else "captions"


def parse_args() -> CaptionJob:
    parser = Parser(prog="caption.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=default_dataset(), metavar="ROOT", help="folder or s3://bucket/prefix")
    parser.add_argument("--engine", choices=_ENGINES, default="tags", help="default: tags")
    parser.add_argument("--name", help="captions/<name>/ is written instead of captions/, beside the others")
    parser.add_argument("--model", default="", metavar="FOLDER|NAME", help="a Pixtral; of a server: one that it has")
    parser.add_argument("--url", default="", help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--engines", type=int, metavar="N", help="at a time; default: as many as there are GPUs for")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs per engine; default 1")
    parser.add_argument(
        "--at-once", type=int, metavar="N", help="pictures that each engine is asked about at a time; "
        f"default {_AT_ONCE['vllm']}, of a server {_AT_ONCE['openai']}",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS",
        help=f"for an answer; default {_TIMEOUT['vllm']:.0f}, which its queue is part of, of a server "
        f"{_TIMEOUT['openai']:.0f}",
    )  # fmt: skip
    parser.add_argument("--tries", type=int, default=5, metavar="N", help="of a request to a server; default 5")
    parser.add_argument("--prompt", metavar="VERSION", help="of captioner/prompts.py; default: its newest")
    parser.add_argument("--temperatures", type=float, nargs="+", metavar="T", help="by attempt; default 0.5 0.3 0.2")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer; default 256")
    parser.add_argument("--max-side", type=int, default=768, metavar="PIXELS", help="as the model sees it; default 768")
    parser.add_argument(
        "--restart-after", type=int, default=50_000, metavar="IMAGES",
        help="start each engine anew, as vLLM's memory grows over days; 0: never; default 50000",
    )  # fmt: skip
    parser.add_argument("--retry-rejected", action="store_true", help="ask again for rows that the model failed on")
    parser.add_argument("--dollars-per-hour", type=float, metavar="X", help="of one engine: shows what the job costs")
    parser.add_argument(
        "--try", dest="trial", type=int, metavar="N",
        help="caption N rows spread over the dataset, write ROOT/caption-trial.html and nothing else",
    )  # fmt: skip
    job = CaptionJob(**vars(parser.parse_args()))
    check_flags(job)
    return job


def check_flags(job: CaptionJob) -> None:
    """UsageError for what does not go together."""
    if job.name is not None and (not re.fullmatch(r"\w[\w.-]*", job.name) or job.name == "partial"):
        raise UsageError(
            f"--name {job.name!r} names a folder of the dataset: letters, digits, _ . - only, not 'partial'"
        )
    if job.engine == "tags" and (job.model or job.url or job.retry_rejected or job.trial):
        raise UsageError(
            "--model, --url, --retry-rejected and --try are for models: give --engine vllm or --engine openai"
        )
    if job.engine == "vllm" and (not job.model or job.url):
        raise UsageError("--engine vllm takes --model FOLDER or NAME and no --url, which is for --engine openai")
    if job.engine == "openai" and (not job.url or job.tensor_parallel != 1):
        raise UsageError("--engine openai takes --url and no --tensor-parallel, which is the server's own")
    counts = (job.engines, job.tensor_parallel, job.at_once, job.tries, job.timeout, job.trial)
    if any(number is not None and number <= 0 for number in counts):
        raise UsageError("--engines, --tensor-parallel, --at-once, --tries, --timeout and --try must be above 0")
    if job.max_side < 64 or job.restart_after < 0 or (job.dollars_per_hour or 0) < 0:
        raise UsageError("--max-side is 64 or more, --restart-after and --dollars-per-hour 0 or more")


def main() -> None:
    job = parse_args()
    started = time.time()
    dataset = Store(job.dataset)
    images = image_footers(dataset)
    if job.trial:
        try_captions(job, dataset, images)
        return
    failed, more = with_tags(job, dataset, images) if job.engine == "tags" else with_model(job, dataset, images)
    done = {shard: footer.rows for shard, footer in images.items() if shard not in failed}
    reasons = sum(tallies(dataset, job.folder, done).values(), Counter[str]())
    total = sum(done.values())
    write_run_record(
        dataset.path(job.folder), "caption", started, total, total - reasons.total(), reasons,
        engine=job.engine, failed=failed, **more,
    )  # fmt: skip
    if reasons["truncated"] * 2 > total:
        print("caption: most answers were cut off: give a higher --max-tokens, or a model that has learnt to describe")
    if failed:
        raise ShardsFailed(failed)
    check_engine(more.get("this_job", {}))


def check_engine(this_job: dict[str, Any]) -> None:
    """JobFailed where the engine failed on more rows than can be a matter of pictures, also of a small dataset."""
    from captioner.attempts import ENGINE_FAILURES

    failures = Counter(
        {reason: count for reason, count in this_job.get("rejected", {}).items() if reason in ENGINE_FAILURES}
    )
    answered = this_job.get("rows_answered", 0)
    if failures.total() and failures.total() >= min(_FEW, answered) and failures.total() > _MOST_FAILED * answered:
        [(most, _)] = failures.most_common(1)
        raise JobFailed(
            f"the engine failed on {failures.total()} of {answered} rows, mostly: {most}; they have the captions of "
            "their tags. See to it and run the same command with --retry-rejected"
        )


def with_tags(job: CaptionJob, dataset: Store, images: dict[str, Footer]) -> tuple[dict[str, str], dict[str, Any]]:
    """Shards that failed, each with why, and what goes into the run record."""
    before = made_from(dataset, job.folder, images)
    if others := sorted(shard for shard, made in before.items() if "engine" in made):
        raise UsageError(
            f"{dataset.path(job.folder)} holds captions of {before[others[0]]['model']}; give --name tags to keep "
            "them, or remove them first"
        )
    todo = changes(before, {shard: {"images": footer.digest} for shard, footer in images.items()})
    print(f"caption: {len(images)} shards of images, {len(images) - len(todo)} of them captioned before", flush=True)
    if not todo:
        return {}, {}
    from pipeline.captions.tag_captions import ImageShard, caption_shard
    from pipeline.core.cluster import cluster  # takes seconds to import: not for --help
    from pipeline.core.dataflow import map_shards

    work = partial(caption_shard, dataset=dataset.root, folder=job.folder)
    with cluster("caption"):
        parts = {shard: ImageShard(shard, images[shard].rows, images[shard].digest) for shard in sorted(todo)}
        return map_shards(parts, work, lambda part: part.rows, "caption"), {}


def with_model(job: CaptionJob, dataset: Store, images: dict[str, Footer]) -> tuple[dict[str, str], dict[str, Any]]:
    """As with_tags."""
    # Here and not above: these take a second to import, which --help and a mistyped flag should not cost.
    from captioner.attempts import MODEL_FAILURES
    from pipeline.captions.costs import Meter
    from pipeline.captions.model_captions import Captioner
    from pipeline.captions.tag_captions import ImageShard

    task = caption_task(job, dataset)
    settings = task.settings
    now = {shard: settings.made_from(footer.digest) for shard, footer in images.items()}
    todo = changes(made_from(dataset, job.folder, images), now)
    if job.retry_rejected:
        reasons = tallies(dataset, job.folder, images.keys() - todo.keys())
        todo |= {shard: "rejected rows" for shard, tally in reasons.items() if MODEL_FAILURES & tally.keys()}
    print(f"caption: {len(images)} shards of images, {len(images) - len(todo)} of them captioned before", flush=True)
    if not todo:
        return {}, {"model": settings.model}
    from pipeline.core.cluster import cluster
    from pipeline.core.dataflow import map_shards_with, plan_engines

    with cluster("caption"):
        pool = plan_engines(job.engines, job.tensor_parallel, len(todo), use_gpus=job.engine == "vllm")
        print(f"caption: {settings.engine} {settings.model}; {pool}", flush=True)
        parts = {shard: ImageShard(shard, images[shard].rows, images[shard].digest) for shard in sorted(todo)}
        meter = Meter(sum(part.rows for part in parts.values()), pool.actors, job.dollars_per_hour)
        failed = map_shards_with(
            partial(Captioner, replace(task, threads=pool.cpus)), parts, lambda part: part.rows, "caption", pool, meter
        )
    return failed, {"model": settings.model, "this_job": meter.record()}


def tallies(dataset: Store, folder: str, shards: Iterable[str]) -> dict[str, Counter[str]]:
    """How many rows of each shard have which reason; by threads, as most of it is waiting for S3."""
    names = sorted(shards)
    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(lambda name: dataset.tally(f"{folder}/{name}.parquet", "reason"), names)
        return dict(zip(names, counts, strict=True))


def try_captions(job: CaptionJob, dataset: Store, images: dict[str, Footer]) -> None:
    """Write the page, and print what it says of time and money."""
    from pipeline.captions.trial import estimate, render, run_trial, spread

    assert job.trial
    task, rows = caption_task(job, dataset), {shard: footer.rows for shard, footer in images.items()}
    trial = run_trial(task, spread(rows, job.trial))
    lines = estimate(trial, sum(rows.values()), job.engines or 1, task.choice.at_once, job.dollars_per_hour)
    dataset.write("caption-trial.html", render(trial, task.settings, job.dataset, lines).encode())
    reasons = ", ".join(f"{count} {reason}" for reason, count in trial.costs.rejected.most_common())
    print("\n".join(f"caption: {line}" for line in lines))
    print(
        f"caption: {len(trial.rows)} tried, {trial.costs.rejected.total()} rejected", f"({reasons})" if reasons else ""
    )
    print(f"caption: see {dataset.path('caption-trial.html')}", flush=True)


def caption_task(job: CaptionJob, dataset: Store) -> "CaptionTask":
    from pipeline.captions.engine_choice import EngineChoice, known_settings, pinned
    from pipeline.captions.model_captions import CaptionTask

    choice = pinned(
        EngineChoice(
            engine=job.engine, model=job.model, url=job.url, tensor_parallel=job.tensor_parallel,
            at_once=job.at_once or _AT_ONCE[job.engine], timeout=job.timeout or _TIMEOUT[job.engine], tries=job.tries,
        )
    )  # fmt: skip
    return CaptionTask(
        dataset=dataset.root, folder=job.folder, choice=choice,
        settings=known_settings(choice, job.prompt, job.temperatures, job.max_tokens, job.max_side),
        restart_after=job.restart_after, retry_rejected=job.retry_rejected,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
