"""JOB: images and captions -> the selection of one training stage. Rerun it: only what has changed is made again."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

from pipeline.core.jobs import run
from pipeline.curation.command import CurateJob, parse_args, recorded_flags
from pipeline.curation.compare import compare
from pipeline.curation.copies import BYTES_PER_ROW, save_copies, saved_digests, search_digest
from pipeline.curation.execution import Execution, OnRay
from pipeline.curation.explain import explain
from pipeline.curation.plan import (
    CurationInputs,
    finish,
    plan_lines,
    read_inputs,
    rule_work,
    selection_folders,
    selection_work,
    stale_files,
    to_do,
)
from pipeline.curation.selection import Curation, apply_rules, select_shard
from pipeline.curation.stage_rules import Rules, stage_rules, tag_rules, with_lists
from pipeline.curation.survey import quality_table
from pipeline.storage.fingerprints import describe_changes
from pipeline.storage.lease import lease
from pipeline.storage.shards import Store


def main() -> None:
    job = parse_args(str(__doc__))
    dataset = Store(job.dataset)
    if job.diff:
        print("\n".join(compare(dataset, *job.diff)), flush=True)
        return
    rules = resolve_rules(job, dataset)
    folder = f"selections/{job.name}"
    with nullcontext() if job.plan or job.explain else lease(dataset, folder, "curate.py"):
        tags, inputs = tag_rules(rules), read_inputs(dataset, rules, not job.explain, job.captions_folder)
        borders = partial(quality_table, dataset, folder, inputs, rules.preset, job.new_quality)
        curation = partial(Curation, dataset.root, job.name, rules, tags, captions=job.captions_folder)
        if job.explain:
            for line in explain(curation(quality=borders()[0]), list(inputs.images), job.explain):
                print(line, flush=True)
        elif job.plan:
            for line in plan_lines(curation(quality=borders()[0]), inputs):
                print(f"curate: {line}")
        else:
            with OnRay() as ray:
                quality, saved = borders(ray)
                dataset.write(f"{folder}/quality.json", saved.encode())
                curate(curation(quality=quality), inputs, ray, job.recorded)


def resolve_rules(job: CurateJob, dataset: Store) -> Rules:
    """The rules of the stage with the overrides of --rules and --preset.

    Without overrides, --explain and --plan use the rules that the selection was made with.
    """
    flags: Mapping[str, str | None] = job.recorded
    if (job.explain or job.plan) and not (job.preset or job.rules):
        flags = recorded_flags(dataset, job.name)
    return with_lists(stage_rules(flags.get("stage") or job.stage, flags.get("preset"), flags.get("rules")))


def curate(curation: Curation, inputs: CurationInputs, execution: Execution, flags: Mapping[str, str | None]) -> None:
    """Applies the rules, looks for copies and writes the selection, each where something has changed.

    `flags` are recorded in run.json: see `command.recorded_flags`.
    """
    started = time.time()
    dataset, folder, catalog = Store(curation.dataset), curation.folder, inputs.catalog
    catalog.refresh(*selection_folders(folder))
    # Written last: a selection with this file is complete.
    dataset.remove(f"{folder}/selection.json")
    stale = stale_files(catalog, folder, inputs.images)
    for file in stale:
        dataset.remove(file)

    judging = rule_work(curation, inputs)
    why = to_do(catalog, f"{folder}/judged", judging)
    catalog.save()
    print(f"curate: {describe_changes('judging', why, len(judging))}", flush=True)
    todo = {shard: judging[shard] for shard in why}
    failed = execution.shards(partial(apply_rules, curation=curation), todo, "judging")

    if todo or stale:
        catalog.refresh(*selection_folders(folder))
    judged = [shard for shard in catalog.shards(f"{folder}/judged") if shard not in failed]
    made_from = search_digest({shard: judging[shard].provenance for shard in judged})
    if (copies := saved_digests(dataset, folder, made_from)) is None:
        search = partial(save_copies, dataset.root, folder, judged, made_from, curation.rules.near_copies)
        execution.task(search, BYTES_PER_ROW * sum(judging[shard].rows for shard in judged), "looking for copies")
        copies = saved_digests(dataset, folder, made_from)
        assert copies is not None, folder
    writing = selection_work(judging, inputs, judged, copies)
    why = to_do(catalog, folder, writing)
    print(f"curate: {describe_changes('writing', why, len(writing))}", flush=True)
    todo = {shard: writing[shard] for shard in why}
    failed |= execution.shards(partial(select_shard, curation=curation), todo, "writing")
    if todo:
        catalog.refresh(*selection_folders(folder))
    done = {shard: writing[shard] for shard in catalog.shards(folder) if shard not in failed}
    finish(curation, inputs, done, failed, started, flags)


if __name__ == "__main__":
    run(main)
