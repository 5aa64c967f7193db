"""JOB: images and captions -> the selection of one training stage. Run it again: only what changed is made again."""

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial

from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.core.jobs import Parser, default_dataset, run
from pipeline.curation.plan import (
    Inputs,
    judge_work,
    quality_table,
    read_inputs,
    stale_files,
    tally,
    to_do,
    write_work,
)
from pipeline.curation.quality import PRESETS
from pipeline.curation.rerun import asked_for
from pipeline.curation.selection import Copies, Curation, ShardWork, find_copies, judge_shard, select_shard
from pipeline.curation.stage_rules import RULES, stage_rules, tag_rules, with_artists
from pipeline.storage.fingerprints import described, digest
from pipeline.storage.run_record import in_words, write_run_record
from pipeline.storage.shards import Store

# Runs the work on these shards; those that failed, each with why.
OnShards = Callable[[Callable[[ShardWork], None], dict[str, ShardWork], str], dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class CurateJob:
    dataset: str
    stage: str
    preset: str | None
    rules: str | None
    name: str | None  # of the selection; None: the stage's
    captions: str | None  # captions/<name>/; None: captions/
    new_quality: bool
    plan: bool
    explain: list[str] | None
    diff: list[str] | None


def parse_args() -> CurateJob:
    parser = Parser(prog="curate.py", description=__doc__)
    parser.add_argument("--dataset", default=default_dataset(), metavar="ROOT", help="folder or s3://bucket/prefix")
    parser.add_argument(
        "--stage", default="demo", choices=tuple(RULES),
        help="whose rules apply; default: demo, the one that can be trained so far",
    )  # fmt: skip
    parser.add_argument("--preset", choices=tuple(PRESETS), help="of the quality words; default: that of the rules")
    parser.add_argument(
        "--rules", metavar="FILE", help="TOML that overrides rules, as pipeline/curation/rules/example.toml does"
    )
    parser.add_argument("--name", help="of the selection; default: that of the stage")
    parser.add_argument("--captions", metavar="NAME", help="take captions/<name>/, as caption.py --name wrote it")
    parser.add_argument(
        "--new-quality", action="store_true",
        help="compute the quality borders anew; without, they are kept while the dataset grows by up to a tenth",
    )  # fmt: skip
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="say what would be done and why, and write nothing")
    instead.add_argument(
        "--explain",
        nargs="+",
        metavar="ID",
        help="say of each rule of the selection whether it admits these pictures",
    )
    instead.add_argument("--diff", nargs=2, metavar=("A", "B"), help="compare two selections")
    return CurateJob(**vars(parser.parse_args()))


def main() -> None:
    job = parse_args()
    dataset, name = Store(job.dataset), job.name or job.stage
    for flag, folder in (("--name", name), ("--captions", job.captions or "")):
        if "/" in folder or folder.startswith("."):
            raise UsageError(f"{flag} {folder} must be the name of a folder, without /")
    captions = f"captions/{job.captions}" if job.captions else "captions"
    if job.diff:
        from pipeline.curation.compare import compare

        print("\n".join(compare(dataset, *job.diff)), flush=True)
        return
    rules = stage_rules(job.stage, job.preset, job.rules)
    if (job.explain or job.plan) and not (job.preset or job.rules):
        # By the rules that the selection was made with, not by the stage's own.
        asked = asked_for(dataset, name)
        rules = stage_rules(asked.get("stage", job.stage), asked.get("preset"), asked.get("rules"))
    rules = with_artists(rules)
    tags, inputs = tag_rules(rules), read_inputs(dataset, rules, captioned=not job.explain, captions_folder=captions)
    quality, borders = quality_table(dataset, f"selections/{name}", inputs, rules.preset, job.new_quality)
    curation = Curation(dataset.root, name, rules, tags, quality, captions)
    if job.explain:
        from pipeline.curation.explain import explain

        for line in explain(curation, list(inputs.images), job.explain):
            print(line, flush=True)
    elif job.plan:
        print_plan(curation, inputs)
    else:
        dataset.write(f"{curation.folder}/quality.json", borders.encode())
        with ExitStack() as stack:
            curate(
                curation,
                inputs,
                on_ray(stack),
                {"stage": job.stage, "preset": job.preset, "rules": job.rules, "captions": job.captions},
            )


def print_plan(curation: Curation, inputs: Inputs) -> None:
    dataset, judging = Store(curation.dataset), judge_work(curation, inputs)
    why = to_do(dataset, f"{curation.folder}/judged", judging)
    print(f"curate: would do: {described('judging', why, len(judging))}")
    if why:
        # Which rows are copies is only known when all are judged.
        writing = write_work(judging, inputs, dict.fromkeys(judging, Copies()))
        rewritten = to_do(dataset, curation.folder, writing, without="copies") | why
        print("curate: would do: writing the same, and those among whose rows other copies are found then")
    else:
        writing = write_work(judging, inputs, find_copies(dataset.root, curation.name, list(judging)))
        rewritten = to_do(dataset, curation.folder, writing)
    print(f"curate: would do: {described('writing', rewritten, len(writing))}")
    for file in stale_files(dataset, curation.folder, judging):
        print(f"curate: would remove {file}: its images are gone")


def curate(curation: Curation, inputs: Inputs, on_shards: OnShards, asked: Mapping[str, str | None]) -> None:
    """Judge, look for copies, write; each only where something changed since the last time. What was asked for by which
    options goes to run.json, for pipeline/curation/rerun.py."""
    started = time.time()
    dataset, folder = Store(curation.dataset), curation.folder
    # Gone until all is done: a selection with this file is whole.
    dataset.remove(f"{folder}/selection.json")
    for file in stale_files(dataset, folder, inputs.images):
        dataset.remove(file)

    judging = judge_work(curation, inputs)
    why = to_do(dataset, f"{folder}/judged", judging)
    print(f"curate: {described('judging', why, len(judging))}", flush=True)
    failed = on_shards(partial(judge_shard, curation=curation), {shard: judging[shard] for shard in why}, "judging")

    judged = [shard for shard in dataset.shards(f"{folder}/judged") if shard not in failed]
    writing = write_work(judging, inputs, find_copies(dataset.root, curation.name, judged))
    why = to_do(dataset, folder, writing)
    print(f"curate: {described('writing', why, len(writing))}", flush=True)
    failed |= on_shards(partial(select_shard, curation=curation), {shard: writing[shard] for shard in why}, "writing")
    done = [writing[shard] for shard in dataset.shards(folder) if shard not in failed]
    finish(curation, done, failed, started, asked)


def on_ray(stack: ExitStack) -> OnShards:
    """Ray starts, until the stack ends, with the first work that there is."""

    @cache
    def start() -> None:
        from pipeline.core.cluster import cluster  # takes seconds to import: not for --help, --explain and the like

        stack.enter_context(cluster("curate"))

    def on_shards(work: Callable[[ShardWork], None], parts: dict[str, ShardWork], description: str) -> dict[str, str]:
        if not parts:
            return {}
        start()
        from pipeline.core.dataflow import map_shards

        return map_shards(parts, work, lambda part: part.rows, description)

    return on_shards


def finish(
    curation: Curation, done: list[ShardWork], failed: dict[str, str], started: float, asked: Mapping[str, str | None]
) -> None:
    """Write run.json and, where all shards are done, selection.json."""
    dataset, folder = Store(curation.dataset), curation.folder
    shards = [part.shard for part in done]
    with ThreadPoolExecutor(8) as readers:
        kept = dict(
            zip(shards, readers.map(lambda name: dataset.rows(f"{folder}/{name}.parquet"), shards), strict=True)
        )
        made = readers.map(lambda name: dataset.metadata(f"{folder}/{name}.parquet")["digest"], shards)
        digests = dict(zip(shards, made, strict=True))
    reasons = tally(dataset, f"{folder}/rejected", shards)
    rows, selected = sum(part.rows for part in done), sum(kept.values())
    write_run_record(dataset.path(folder), "curate", started, rows, selected, reasons, **asked, failed=failed)
    if failed:
        raise ShardsFailed(failed)
    if not selected:
        raise UsageError(f"no row is left for {curation.name}: {in_words(reasons)}; loosen its rules with --rules FILE")
    record = {
        "rules": asdict(curation.rules),
        "captions": curation.captions,
        "selected": selected,
        "rejected": dict(sorted(reasons.items())),
        "shards": {shard: count for shard, count in kept.items() if count},
        "hash": digest(digests),
    }
    dataset.write(f"{folder}/selection.json", json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    run(main)
