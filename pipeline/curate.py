"""JOB: images and captions -> the selection of one training stage. Rerun it: only what has changed is made again."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache, partial

from pipeline.core.jobs import run
from pipeline.curation.command import CurateJob, parse_args, recorded_flags
from pipeline.curation.compare import compare
from pipeline.curation.copies import find_copies
from pipeline.curation.explain import explain
from pipeline.curation.plan import (
    CurationInputs,
    finish,
    plan_lines,
    quality_table,
    read_inputs,
    rule_work,
    selection_work,
    stale_files,
    to_do,
)
from pipeline.curation.selection import Curation, ShardWork, apply_rules, select_shard
from pipeline.curation.stage_rules import Rules, stage_rules, tag_rules, with_artists
from pipeline.storage.fingerprints import describe_changes
from pipeline.storage.shards import Store

# (work, shards by name, description) -> the shards on which the work failed, each with the reason
OnShards = Callable[[Callable[[ShardWork], None], dict[str, ShardWork], str], dict[str, str]]


def main() -> None:
    job = parse_args(str(__doc__))
    dataset = Store(job.dataset)
    if job.diff:
        print("\n".join(compare(dataset, *job.diff)), flush=True)
        return
    rules = resolve_rules(job, dataset)
    tags, inputs = tag_rules(rules), read_inputs(dataset, rules, not job.explain, job.captions_folder)
    quality, borders = quality_table(dataset, f"selections/{job.name}", inputs, rules.preset, job.new_quality)
    curation = Curation(dataset.root, job.name, rules, tags, quality, job.captions_folder)
    if job.explain:
        for line in explain(curation, list(inputs.images), job.explain):
            print(line, flush=True)
    elif job.plan:
        for line in plan_lines(curation, inputs):
            print(f"curate: {line}")
    else:
        dataset.write(f"{curation.folder}/quality.json", borders.encode())
        with ExitStack() as stack:
            curate(curation, inputs, on_ray(stack), job.recorded)


def resolve_rules(job: CurateJob, dataset: Store) -> Rules:
    """The rules of the stage with the overrides of --rules and --preset.

    Without overrides, --explain and --plan use the rules that the selection was made with.
    """
    flags: Mapping[str, str | None] = job.recorded
    if (job.explain or job.plan) and not (job.preset or job.rules):
        flags = recorded_flags(dataset, job.name)
    return with_artists(stage_rules(flags.get("stage") or job.stage, flags.get("preset"), flags.get("rules")))


def curate(curation: Curation, inputs: CurationInputs, on_shards: OnShards, flags: Mapping[str, str | None]) -> None:
    """Applies the rules, looks for copies and writes the selection, each where something has changed.

    `flags` are recorded in run.json: see `command.recorded_flags`.
    """
    started = time.time()
    dataset, folder = Store(curation.dataset), curation.folder
    # Written last: a selection with this file is complete.
    dataset.remove(f"{folder}/selection.json")
    for file in stale_files(dataset, folder, inputs.images):
        dataset.remove(file)

    judging = rule_work(curation, inputs)
    why = to_do(dataset, f"{folder}/judged", judging)
    print(f"curate: {describe_changes('judging', why, len(judging))}", flush=True)
    failed = on_shards(partial(apply_rules, curation=curation), {shard: judging[shard] for shard in why}, "judging")

    judged = [shard for shard in dataset.shards(f"{folder}/judged") if shard not in failed]
    writing = selection_work(judging, inputs, find_copies(dataset.root, curation.name, judged))
    why = to_do(dataset, folder, writing)
    print(f"curate: {describe_changes('writing', why, len(writing))}", flush=True)
    failed |= on_shards(partial(select_shard, curation=curation), {shard: writing[shard] for shard in why}, "writing")
    done = [writing[shard] for shard in dataset.shards(folder) if shard not in failed]
    finish(curation, done, failed, started, flags)


def on_ray(stack: ExitStack) -> OnShards:
    """Runs work on Ray. Ray starts with the first work that there is, and stops when the stack closes."""

    @cache
    def start() -> None:
        from pipeline.core.cluster import cluster  # imports Ray, which takes seconds

        stack.enter_context(cluster("curate"))

    def on_shards(work: Callable[[ShardWork], None], parts: dict[str, ShardWork], description: str) -> dict[str, str]:
        if not parts:
            return {}
        start()
        from pipeline.core.dataflow import map_shards

        return map_shards(parts, work, lambda part: part.rows, description)

    return on_shards


if __name__ == "__main__":
    run(main)
