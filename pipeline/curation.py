"""What a curation starts from, and which of its shards must be made (again). Reads, and writes nothing."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import pyarrow.parquet as pq

from pipeline.fingerprints import CODE_VERSION, Footer, MadeFrom, changes, digest, footers, made_from
from pipeline.jobs import UsageError
from pipeline.quality import PRESETS, QualityTable
from pipeline.selection import Copies, Curation, ShardWork, survey
from pipeline.shards import Store
from pipeline.stage_rules import FILES, Rules

# A table of quality borders judges later shards too, until the dataset has grown or shrunk by more than this share.
_TABLE_HOLDS = 0.1

_NAMED_SHARDS = 3


@dataclass(frozen=True)
class Inputs:
    """The files that a selection is made from, by shard."""

    images: dict[str, Footer]
    captions: dict[str, Footer]
    scores: dict[str, dict[str, Footer]]  # by scorer

    @property
    def rows(self) -> int:
        return sum(footer.rows for footer in self.images.values())


def read_inputs(dataset: Store, rules: Rules, captioned: bool = True, captions_folder: str = "captions") -> Inputs:
    """UsageError unless there are images, each shard of them with the scores that the rules ask for and, where they
    are asked for, with captions."""
    images = footers(dataset, "images", dataset.shards("images"))
    if not images:
        raise UsageError(
            f"{dataset.root} has no images; run: python pipeline/ingest.py --raw PATH --dataset {dataset.root}"
        )
    if captioned and not any(footer.rows for footer in images.values()):
        reasons = tally(dataset, "rejected", images)
        raise UsageError(f"{dataset.root} has no pictures: ingest refused {dict(reasons)}; look into its rejected/")
    scorers = sorted({name.partition(".")[0] for name in rules.scores})
    scores = {scorer: footers(dataset, f"scores/{scorer}", images) for scorer in scorers}
    captions = footers(dataset, captions_folder, images)
    if captioned:
        name = captions_folder.removeprefix("captions").removeprefix("/")
        mend = f"python pipeline/caption.py --dataset {dataset.root}" + (f" --name {name}" if name else "")
        _check_complete(images, captions, captions_folder, mend)
    for scorer in scorers:
        mend = f"python pipeline/score.py --dataset {dataset.root} --model FOLDER --name {scorer}"
        _check_complete(images, scores[scorer], f"scores/{scorer}", mend)
        _check_labels(dataset, scorer, min(scores[scorer]), rules)
    return Inputs(images, captions, scores)


def _check_complete(images: Mapping[str, Footer], others: Mapping[str, Footer], what: str, mend: str) -> None:
    missing = sorted(images.keys() - others.keys())
    if missing:
        raise UsageError(f"{len(missing)} of {len(images)} shards have no {what}, first {missing[0]}; run: {mend}")


def _check_labels(dataset: Store, scorer: str, shard: str, rules: Rules) -> None:
    with dataset.open(f"scores/{scorer}/{shard}.parquet") as file:
        labels = [name for name in pq.read_schema(file).names if name != "id"]
    asked = {name.partition(".")[2] for name in rules.scores if name.startswith(f"{scorer}.")}
    if unknown := sorted(asked - set(labels)):
        raise UsageError(f"scores/{scorer} has no label {unknown[0]!r}; its labels are {', '.join(labels)}")


def tally(dataset: Store, folder: str, shards: Mapping[str, Footer] | list[str]) -> Counter[str]:
    """How many rows these shards of REJECTED have of each reason."""
    with ThreadPoolExecutor(8) as readers:
        counts = readers.map(lambda shard: dataset.tally(f"{folder}/{shard}.parquet", "reason"), shards)
        return sum(counts, Counter[str]())


def quality_table(dataset: Store, folder: str, inputs: Inputs, preset: str, renew: bool) -> tuple[QualityTable, str]:
    """The borders between quality words, and the text of the file that keeps them.

    Those of the last curation, so that words do not change with each new shard; computed anew where `renew` asks for
    it, for another preset or a new source, and where the dataset has outgrown them.
    """
    file = f"{folder}/quality.json"
    if not renew and dataset.exists(file):
        saved = dataset.read(file).decode()
        record = json.loads(saved)
        table = QualityTable.from_json(saved)
        sources = frozenset[str]().union(*(footer.sources for footer in inputs.images.values()))
        if (
            record.get("preset") == _described(preset)
            and abs(inputs.rows - record["rows"]) <= _TABLE_HOLDS * record["rows"]
            and sources <= {source for source, _, _ in table.borders}
        ):
            return table, saved
    table = survey(dataset.root, list(inputs.images), preset)
    record = {"preset": _described(preset), "rows": inputs.rows} | json.loads(table.to_json())
    return table, json.dumps(record, indent=1)


def _described(preset: str) -> dict[str, object]:
    return {"name": preset, **json.loads(json.dumps(asdict(PRESETS[preset])))}


def judge_work(curation: Curation, inputs: Inputs) -> dict[str, ShardWork]:
    """Every shard, with all that its judgement depends on."""
    rules = {name: value for name, value in asdict(curation.rules).items() if name not in FILES}
    common = {
        "code": CODE_VERSION,
        "rules": digest(rules),
        "tag files": digest(asdict(curation.tags)),
        "quality": digest(curation.quality.to_json()),
    }
    scores = {
        shard: {"scores": digest([scored[shard].digest for scored in inputs.scores.values()])} if inputs.scores else {}
        for shard in inputs.images
    }
    return {
        shard: ShardWork(shard, footer.rows, common | {"images": footer.digest} | scores[shard])
        for shard, footer in inputs.images.items()
    }


def write_work(judging: Mapping[str, ShardWork], inputs: Inputs, copies: Mapping[str, Copies]) -> dict[str, ShardWork]:
    """Each of the shards of `copies`, with all that its selected rows depend on."""
    return {
        shard: ShardWork(
            shard,
            judging[shard].rows,
            judging[shard].made_from | {"captions": inputs.captions[shard].digest, "copies": found.digest},
            found,
        )
        for shard, found in copies.items()
    }


def to_do(dataset: Store, folder: str, work: Mapping[str, ShardWork], without: str = "") -> dict[str, str]:
    """By shard that must be made (again): why. `without` is an ingredient that is not known yet."""
    before = made_from(dataset, folder, work)
    now = {shard: _without(part.made_from, without) for shard, part in work.items()}
    return changes({shard: _without(made, without) for shard, made in before.items()}, now)


def _without(made: MadeFrom, name: str) -> MadeFrom:
    return {ingredient: found for ingredient, found in made.items() if ingredient != name}


def stale_files(dataset: Store, folder: str, shards: Mapping[str, object]) -> list[str]:
    """Files of the selection whose images are gone."""
    return [
        f"{part}/{shard}.parquet"
        for part in (folder, f"{folder}/judged", f"{folder}/rejected")
        for shard in dataset.shards(part)
        if shard not in shards
    ]


def described(doing: str, why: Mapping[str, str], total: int) -> str:
    """ "judging 2 of 40 shards: 2 new (a, b)"."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for shard, reason in sorted(why.items()):
        by_reason[reason].append(shard)
    listed = [
        f"{len(names)} {reason} ({', '.join(names[:_NAMED_SHARDS])}{' ...' if len(names) > _NAMED_SHARDS else ''})"
        for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    return f"{doing} {len(why)} of {total} shards" + (f": {'; '.join(listed)}" if listed else "")
