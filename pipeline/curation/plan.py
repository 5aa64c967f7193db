"""The inputs of a curation, the shards that must be made (again), and the record that a curation leaves."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.curation.copies import Copies, find_copies
from pipeline.curation.quality import POST_COLUMNS, PRESETS, QualityTable, posts_of
from pipeline.curation.selection import Curation, ShardWork
from pipeline.curation.stage_rules import FILES, Rules
from pipeline.storage.fingerprints import (
    CODE_VERSION,
    FileIdentity,
    changes,
    describe_changes,
    digest,
    identities,
    image_identities,
    read_provenance,
)
from pipeline.storage.run_record import format_counts, write_run_record
from pipeline.storage.shards import Store

# Quality borders are kept until the dataset has grown or shrunk by more than this share.
_BORDERS_KEPT = 0.1


@dataclass(frozen=True)
class CurationInputs:
    """The files that a selection is made from, by shard."""

    images: dict[str, FileIdentity]
    captions: dict[str, FileIdentity]
    scores: dict[str, dict[str, FileIdentity]]  # by scorer

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
    images = image_identities(dataset)
    captions = identities(dataset, captions_folder, images)
    root = shlex.quote(dataset.root)
    if captioned:
        if not any(footer.rows for footer in images.values()):
            reasons = dict(tally(dataset, "rejected", images))
            raise UsageError(f"{dataset.root} has no pictures: ingest refused {reasons}; look into its rejected/")
        name = captions_folder.removeprefix("captions").removeprefix("/")
        command = f"python pipeline/caption.py --dataset {root}" + (f" --name {name}" if name else "")
        _check_complete(images, captions, captions_folder, command)
        _check_same_images(dataset, images, captions_folder, command)
    scores = {}
    for scorer in sorted({name.partition(".")[0] for name in rules.scores}):
        scores[scorer] = identities(dataset, f"scores/{scorer}", images)
        command = f"python pipeline/score.py --dataset {root} --model FOLDER --name {scorer}"
        _check_complete(images, scores[scorer], f"scores/{scorer}", command)
        _check_one_model(dataset, scorer, images, command)
        _check_labels(dataset, scorer, min(scores[scorer]), rules)
    return CurationInputs(images, captions, scores)


def _check_complete(
    images: Mapping[str, FileIdentity], others: Mapping[str, FileIdentity], folder: str, command: str
) -> None:
    if missing := sorted(images.keys() - others.keys()):
        raise UsageError(f"{len(missing)} of {len(images)} shards have no {folder}, first {missing[0]}; run: {command}")


def _check_same_images(dataset: Store, images: Mapping[str, FileIdentity], captions: str, command: str) -> None:
    before = read_provenance(dataset, captions, images)
    stale = [name for name, footer in images.items() if before[name].get("images", footer.digest) != footer.digest]
    if stale:
        raise UsageError(
            f"{len(stale)} of {len(images)} shards were ingested again after their captions; run: {command}"
        )


def _check_one_model(dataset: Store, scorer: str, images: Mapping[str, FileIdentity], command: str) -> None:
    """Scores of several models are not comparable. They occur when score.py was stopped while replacing a model's
    scores. Scores from elsewhere name no model."""
    first: dict[str | None, str] = {}  # model -> a shard with its scores
    for shard, inputs in read_provenance(dataset, f"scores/{scorer}", images).items():
        first.setdefault(inputs.get("model"), shard)
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


def tally(dataset: Store, folder: str, shards: Iterable[str]) -> Counter[str]:
    """Rows by reason in these shards of a folder of REJECTED."""
    with ThreadPoolExecutor(8) as readers:
        counts = readers.map(lambda shard: dataset.tally(f"{folder}/{shard}.parquet", "reason"), shards)
        return sum(counts, Counter[str]())


def quality_table(
    dataset: Store, folder: str, inputs: CurationInputs, preset: str, renew: bool
) -> tuple[QualityTable, str]:
    """The borders between quality words, and the content of the file quality.json that keeps them.

    The saved borders are used again, so that new shards do not change the words of old ones. They are recomputed if
    `renew` is set, for another preset or a new source, and if the dataset has changed in size by more than a tenth.
    Raises UsageError if the saved file is damaged, because recomputing would silently change words.
    """
    file = f"{folder}/quality.json"
    described_preset = {"name": preset, **json.loads(json.dumps(asdict(PRESETS[preset])))}
    if not renew and dataset.exists(file):
        try:
            saved = dataset.read(file).decode()
            record = json.loads(saved)
            table, rows = QualityTable.from_json(saved), float(record["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{dataset.path(file)} is damaged ({type(error).__name__}: {error}); restore it, or recompute the "
                "borders with --new-quality"
            ) from error
        sources = frozenset[str]().union(*(footer.sources for footer in inputs.images.values()))
        if (
            record.get("preset") == described_preset
            and abs(inputs.rows - rows) <= _BORDERS_KEPT * rows
            and sources <= {source for source, _, _ in table.borders}
        ):
            return table, saved
    with ThreadPoolExecutor(4) as readers:
        files = [f"images/{shard}.parquet" for shard in inputs.images]
        posts = pa.concat_tables(readers.map(lambda file: posts_of(dataset.read_table(file, POST_COLUMNS)), files))
    table = QualityTable.compute(PRESETS[preset], posts)
    record = {"preset": described_preset, "rows": inputs.rows} | json.loads(table.to_json())
    return table, json.dumps(record, indent=1)


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
        if inputs.scores:
            provenance["scores"] = digest([scores[shard].digest for scores in inputs.scores.values()])
        work[shard] = ShardWork(shard, footer.rows, provenance)
    return work


def selection_work(
    judging: Mapping[str, ShardWork], inputs: CurationInputs, copies: Mapping[str, Copies]
) -> dict[str, ShardWork]:
    """The shards of `copies`, each with everything that its selected rows depend on."""
    work = {}
    for shard, found in copies.items():
        provenance = judging[shard].provenance | {"captions": inputs.captions[shard].digest, "copies": found.digest}
        work[shard] = ShardWork(shard, judging[shard].rows, provenance, found)
    return work


def to_do(dataset: Store, folder: str, work: Mapping[str, ShardWork], without: str = "") -> dict[str, str]:
    """The shards that must be made (again), each with the reason. The input `without` is not compared."""

    def compared(inputs: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in inputs.items() if name != without}

    before = {shard: compared(inputs) for shard, inputs in read_provenance(dataset, folder, work).items()}
    return changes(before, {shard: compared(part.provenance) for shard, part in work.items()})


def stale_files(dataset: Store, folder: str, shards: Mapping[str, object]) -> list[str]:
    """Files of the selection whose images are gone."""
    return [
        f"{part}/{shard}.parquet"
        for part in (folder, f"{folder}/judged", f"{folder}/rejected")
        for shard in dataset.shards(part)
        if shard not in shards
    ]


def plan_lines(curation: Curation, inputs: CurationInputs) -> Iterator[str]:
    """The lines that --plan prints."""
    dataset, judging = Store(curation.dataset), rule_work(curation, inputs)
    why = to_do(dataset, f"{curation.folder}/judged", judging)
    yield f"would do: {describe_changes('judging', why, len(judging))}"
    if why:  # copies are not known until the rules have been applied to all shards
        writing = selection_work(judging, inputs, dict.fromkeys(judging, Copies()))
        rewritten = to_do(dataset, curation.folder, writing, without="copies") | why
        yield "would do: writing these shards, and shards in which other copies are found then"
    else:
        writing = selection_work(judging, inputs, find_copies(dataset.root, curation.name, list(judging)))
        rewritten = to_do(dataset, curation.folder, writing)
    yield f"would do: {describe_changes('writing', rewritten, len(writing))}"
    for file in stale_files(dataset, curation.folder, judging):
        yield f"would remove {file}: its images are gone"


def finish(
    curation: Curation,
    done: list[ShardWork],
    failed: dict[str, str],
    started: float,
    flags: Mapping[str, str | None],
) -> None:
    """Writes run.json and, if no shard failed, selection.json.

    Raises ShardsFailed if shards failed, UsageError if no row is selected.
    """
    dataset, folder = Store(curation.dataset), curation.folder
    shards = [part.shard for part in done]
    files = [f"{folder}/{shard}.parquet" for shard in shards]
    with ThreadPoolExecutor(8) as readers:
        kept = dict(zip(shards, readers.map(dataset.rows, files), strict=True))
        metadata = dict(zip(shards, readers.map(dataset.metadata, files), strict=True))
    reasons = tally(dataset, f"{folder}/rejected", shards)
    rows, selected = sum(part.rows for part in done), sum(kept.values())
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
        "hash": digest({shard: found["digest"] for shard, found in metadata.items()}),
    }
    dataset.write(f"{folder}/selection.json", json.dumps(record, indent=1).encode())
