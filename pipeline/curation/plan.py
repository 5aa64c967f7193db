"""The inputs of a curation, the shards that must be made (again), and the record that a curation leaves."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import pyarrow.parquet as pq

from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.curation.copies import NO_COPIES, find_copies, near_copies, saved_digests, search_digest
from pipeline.curation.selection import Curation, ShardWork
from pipeline.curation.stage_rules import FILES, Rules
from pipeline.storage.fingerprints import (
    CODE_VERSION,
    changes,
    describe_changes,
    digest,
)
from pipeline.storage.manifest import Catalog, Footer
from pipeline.storage.posts import posts_digests
from pipeline.storage.run_record import format_counts, write_run_record
from pipeline.storage.shards import Store


@dataclass(frozen=True)
class CurationInputs:
    """The files that a selection is made from, by shard."""

    catalog: Catalog
    images: dict[str, Footer]
    captions: dict[str, Footer]
    scores: dict[str, dict[str, Footer]]  # by scorer
    posts: dict[str, str]  # digests, of shards that ingest.py --refresh has updated

    @property
    def rows(self) -> int:
        return sum(footer.rows for footer in self.images.values())


def read_inputs(
    dataset: Store, rules: Rules, captioned: bool = True, captions_folder: str = "captions"
) -> CurationInputs:
    """The inputs of a curation by these rules; `captioned` requires captions of every shard.

    Raises UsageError if images, captions or scores are missing, if captions are older than their images, or if one
    scorer has scores of several models.
    """
    catalog = Catalog(dataset)
    catalog.refresh("images", captions_folder, "posts")
    images = catalog.images()
    captions = catalog.footers(captions_folder, images)
    root = shlex.quote(dataset.root)
    if captioned:
        if not any(footer.rows for footer in images.values()):
            reasons = dict(tally(catalog, "rejected", images))
            raise UsageError(f"{dataset.root} has no pictures: ingest refused {reasons}; look into its rejected/")
        name = captions_folder.removeprefix("captions").removeprefix("/")
        command = f"python pipeline/caption.py --dataset {root}" + (f" --name {name}" if name else "")
        _check_complete(images, captions, captions_folder, command)
        _check_same_images(images, captions, command)
    scores = {}
    for scorer in sorted({name.partition(".")[0] for name in rules.scores}):
        scores[scorer] = catalog.footers(f"scores/{scorer}", images)
        command = f"python pipeline/score.py --dataset {root} --model FOLDER --name {scorer}"
        _check_complete(images, scores[scorer], f"scores/{scorer}", command)
        _check_one_model(scorer, scores[scorer], command)
        _check_labels(dataset, scorer, min(scores[scorer]), rules)
    return CurationInputs(catalog, images, captions, scores, posts_digests(catalog, images))


def _check_complete(images: Mapping[str, Footer], others: Mapping[str, Footer], folder: str, command: str) -> None:
    if missing := sorted(images.keys() - others.keys()):
        raise UsageError(f"{len(missing)} of {len(images)} shards have no {folder}, first {missing[0]}; run: {command}")


def _check_same_images(images: Mapping[str, Footer], captions: Mapping[str, Footer], command: str) -> None:
    stale = [
        name
        for name, footer in images.items()
        if captions[name].provenance.get("images", footer.digest) != footer.digest
    ]
    if stale:
        raise UsageError(
            f"{len(stale)} of {len(images)} shards were ingested again after their captions; run: {command}"
        )


def _check_one_model(scorer: str, scores: Mapping[str, Footer], command: str) -> None:
    """Scores of several models are not comparable. They occur when score.py was stopped while replacing a model's
    scores. Scores from elsewhere name no model."""
    first: dict[str | None, str] = {}  # model -> a shard with its scores
    for shard, footer in scores.items():
        first.setdefault(footer.provenance.get("model"), shard)
    if len(first) > 1:
        raise UsageError(
            f"scores/{scorer} has scores of {len(first)} models, for example in "
            f"{' and '.join(list(first.values())[:2])}; to score all shards with one model, run: {command}"
        )


def _check_labels(dataset: Store, scorer: str, shard: str, rules: Rules) -> None:
    with dataset.open(f"scores/{scorer}/{shard}.parquet") as file:
        labels = [name for name in pq.read_schema(file).names if name != "id"]
    wanted = {name.partition(".")[2] for name in rules.scores if name.startswith(f"{scorer}.")}
    if unknown := sorted(wanted - set(labels)):
        raise UsageError(f"scores/{scorer} has no label {unknown[0]!r}; its labels are {', '.join(labels)}")


def tally(catalog: Catalog, folder: str, shards: Iterable[str]) -> Counter[str]:
    """Rows by reason in these shards of a folder of REJECTED."""
    return sum(catalog.reasons(folder, shards).values(), Counter[str]())


def rule_work(curation: Curation, inputs: CurationInputs) -> dict[str, ShardWork]:
    """Every shard with everything that the result of the rules depends on."""
    rules = {name: value for name, value in asdict(curation.rules).items() if name not in FILES}
    common = {
        "code": CODE_VERSION,
        "rules": digest(rules),
        "tag files": digest(asdict(curation.tags)),
        "quality": digest(curation.quality.to_json()),
    }
    work = {}
    for shard, footer in inputs.images.items():
        provenance = common | {"images": footer.digest}
        if shard in inputs.posts:
            provenance["posts"] = inputs.posts[shard]
        if inputs.scores:
            provenance["scores"] = digest([scores[shard].digest for scores in inputs.scores.values()])
        work[shard] = ShardWork(shard, footer.rows, provenance)
    return work


def selection_work(
    judging: Mapping[str, ShardWork], inputs: CurationInputs, judged: Iterable[str], copies: Mapping[str, str]
) -> dict[str, ShardWork]:
    """The judged shards, each with everything that its selected rows depend on. `copies` are the digests of the copies
    of each shard that has any."""
    work = {}
    for shard in judged:
        found = {"captions": inputs.captions[shard].digest, "copies": copies.get(shard, NO_COPIES.digest)}
        work[shard] = ShardWork(shard, judging[shard].rows, judging[shard].provenance | found)
    return work


def to_do(catalog: Catalog, folder: str, work: Mapping[str, ShardWork], without: str = "") -> dict[str, str]:
    """The shards that must be made (again), each with the reason. The input `without` is not compared."""

    def compared(inputs: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in inputs.items() if name != without}

    before = {shard: compared(inputs) for shard, inputs in catalog.provenance(folder, work).items()}
    return changes(before, {shard: compared(part.provenance) for shard, part in work.items()})


def selection_folders(folder: str) -> tuple[str, str, str]:
    """The folders with the shards of a selection."""
    return folder, f"{folder}/judged", f"{folder}/rejected"


def stale_files(catalog: Catalog, folder: str, shards: Mapping[str, object]) -> list[str]:
    """Files of the selection whose images are gone."""
    return [
        f"{part}/{shard}.parquet"
        for part in selection_folders(folder)
        for shard in catalog.shards(part)
        if shard not in shards
    ]


def _content_hash(catalog: Catalog, folder: str, shards: Iterable[str]) -> str:
    """The hash of a selection that trainings record: of the selected rows of all shards."""
    footers = catalog.footers(folder, shards)
    return digest({shard: footer.metadata.get("digest") for shard, footer in footers.items()})


def plan_lines(curation: Curation, inputs: CurationInputs) -> Iterator[str]:
    """The lines that --plan prints."""
    catalog, judging = inputs.catalog, rule_work(curation, inputs)
    catalog.refresh(*selection_folders(curation.folder))
    why = to_do(catalog, f"{curation.folder}/judged", judging)
    yield f"would do: {describe_changes('judging', why, len(judging))}"
    made_from = search_digest({shard: part.provenance for shard, part in judging.items()})
    copies = None if why else saved_digests(catalog.dataset, curation.folder, made_from)
    if why:  # copies are not known until the rules have been applied to all shards
        rewritten = (
            to_do(catalog, curation.folder, selection_work(judging, inputs, judging, {}), without="copies") | why
        )
        yield "would do: writing these shards, and shards in which other copies are found then"
    else:
        if copies is None:
            found = find_copies(catalog.dataset, curation.folder, list(judging), curation.rules.near_copies)
            copies = {shard: each.digest for shard, each in found}
        rewritten = to_do(catalog, curation.folder, selection_work(judging, inputs, judging, copies))
    yield f"would do: {describe_changes('writing', rewritten, len(judging))}"
    for file in stale_files(catalog, curation.folder, judging):
        yield f"would remove {file}: its images are gone"


def finish(
    curation: Curation,
    inputs: CurationInputs,
    done: Mapping[str, ShardWork],
    failed: dict[str, str],
    started: float,
    flags: Mapping[str, str | None],
) -> None:
    """Writes run.json and, if no shard failed, selection.json; `done` are the shards that are finished.

    Raises ShardsFailed if shards failed, UsageError if no row is selected.
    """
    catalog, dataset, folder = inputs.catalog, Store(curation.dataset), curation.folder
    kept = {shard: footer.rows for shard, footer in catalog.footers(folder, done).items()}
    reasons = tally(catalog, f"{folder}/rejected", done)
    rows, selected = sum(part.rows for part in done.values()), sum(kept.values())
    catalog.save()
    write_run_record(dataset.path(folder), "curate", started, rows, selected, reasons, **flags, failed=failed)
    if failed:
        raise ShardsFailed(failed)
    if not selected:
        raise UsageError(
            f"no row is left for {curation.name}: {format_counts(reasons)}; loosen its rules with --rules FILE"
        )
    record = {
        "rules": asdict(curation.rules),
        "captions": curation.captions,
        "selected": selected,
        "rejected": dict(sorted(reasons.items())),
        "shards": {shard: count for shard, count in kept.items() if count},
        "hash": _content_hash(catalog, folder, done),
    }
    dataset.write(f"{folder}/selection.json", json.dumps(record, indent=1).encode())
    for warning in near_copies(dataset, folder).warnings():
        print(
            f"curate: WARNING: {warning}. Look at some in the section Duplicates of pipeline/report.py; if they are "
            "not, give the rule near_copies = false (only equal bytes) or fewer bits",
            flush=True,
        )
