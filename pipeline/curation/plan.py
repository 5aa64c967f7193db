"""What a curation starts from, and which of its shards must be made (again). Reads, and writes nothing."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import pyarrow.parquet as pq

from pipeline.core.errors import UsageError
from pipeline.curation.quality import PRESETS, QualityTable
from pipeline.curation.selection import Copies, Curation, ShardWork, survey
from pipeline.curation.stage_rules import FILES, Rules
from pipeline.storage.fingerprints import (
    CODE_VERSION,
    Footer,
    MadeFrom,
    changes,
    digest,
    footers,
    image_footers,
    made_from,
)
from pipeline.storage.shards import Store

# A table of quality borders judges later shards too, until the dataset has grown or shrunk by more than this share.
_TABLE_HOLDS = 0.1


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
    are asked for, with captions; and unless the scores of one name are of one model."""
    images = image_footers(dataset)
    if captioned and not any(footer.rows for footer in images.values()):
        reasons = tally(dataset, "rejected", images)
        raise UsageError(f"{dataset.root} has no pictures: ingest refused {dict(reasons)}; look into its rejected/")
    scorers = sorted({name.partition(".")[0] for name in rules.scores})
    scores = {scorer: footers(dataset, f"scores/{scorer}", images) for scorer in scorers}
    captions = footers(dataset, captions_folder, images)
    if captioned:
        name = captions_folder.removeprefix("captions").removeprefix("/")
        mend = f"python pipeline/caption.py --dataset {shlex.quote(dataset.root)}" + (f" --name {name}" if name else "")
        _check_complete(images, captions, captions_folder, mend)
        _check_same_images(dataset, images, captions_folder, mend)
    for scorer in scorers:
        mend = f"python pipeline/score.py --dataset {shlex.quote(dataset.root)} --model FOLDER --name {scorer}"
        _check_complete(images, scores[scorer], f"scores/{scorer}", mend)
        _check_one_model(dataset, scorer, images, mend)
        _check_labels(dataset, scorer, min(scores[scorer]), rules)
    return Inputs(images, captions, scores)


def _check_complete(images: Mapping[str, Footer], others: Mapping[str, Footer], what: str, mend: str) -> None:
    missing = sorted(images.keys() - others.keys())
    if missing:
        raise UsageError(f"{len(missing)} of {len(images)} shards have no {what}, first {missing[0]}; run: {mend}")


def _check_same_images(dataset: Store, images: Mapping[str, Footer], captions: str, mend: str) -> None:
    """UsageError for captions of images that were ingested again since."""
    made = made_from(dataset, captions, images)
    stale = sorted(name for name, footer in images.items() if made[name].get("images", footer.digest) != footer.digest)
    if stale:
        raise UsageError(f"{len(stale)} of {len(images)} shards were ingested again after their captions; run: {mend}")


def _check_one_model(dataset: Store, scorer: str, images: Mapping[str, Footer], mend: str) -> None:
    """Their numbers could not be compared. So it is after a score.py with another model that did not come to its end;
    scores that are not of score.py name no model."""
    first: dict[str | None, str] = {}  # model -> a shard that it scored
    for shard, made in made_from(dataset, f"scores/{scorer}", images).items():
        first.setdefault(made.get("model"), shard)
    if len(first) > 1:
        raise UsageError(
            f"scores/{scorer} has scores of {len(first)} models, such as in {' and '.join(list(first.values())[:2])}; "
            f"to make them of one, run: {mend}"
        )


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
    it, for another preset or a new source, and where the dataset has outgrown them. UsageError where the file is
    damaged: new borders would change words unasked.
    """
    file = f"{folder}/quality.json"
    if not renew and dataset.exists(file):
        try:
            saved = dataset.read(file).decode()
            record = json.loads(saved)
            table, rows = QualityTable.from_json(saved), float(record["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{dataset.path(file)} is damaged ({type(error).__name__}: {error}); restore it, or compute the "
                "borders anew with --new-quality"
            ) from error
        sources = frozenset[str]().union(*(footer.sources for footer in inputs.images.values()))
        if (
            record.get("preset") == _described(preset)
            and abs(inputs.rows - rows) <= _TABLE_HOLDS * rows
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
