"""Everything that the report shows about a dataset, read in three steps: rejected rows, counts, and a few pictures."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.curation.command import curate_command
from pipeline.pictures.crops import thumbnail_uri
from pipeline.reporting.census import Census, Place, take_census
from pipeline.reporting.examples import PAIRS, Example, Rejections, choose_ids, survey_rejections
from pipeline.reporting.score_charts import ScoreChart, score_charts
from pipeline.storage.scan import map_in_order, read_pictures
from pipeline.storage.shards import Store

# Pictures on the page, of all kinds together: bounds the reading, and a phone can still scroll through them.
_PICTURES = 300
_KEPT = 24  # pictures of the selections
# Each thread holds a page of a picture column, which in row groups of fewer than 1024 rows is the whole row group.
_PICTURE_READERS = 2
REASONS_SHOWN = 30  # with pictures or examples of their own; the others are counted


@dataclass(frozen=True)
class Selected:
    """One selection: the rows that curation refused, and a few of those that it kept."""

    name: str
    rejections: Rejections
    kept: list[str]  # ids
    finished: bool
    command: str  # repeats the curation


@dataclass(frozen=True)
class Findings:
    dataset: str
    ingest: Rejections
    selections: list[Selected]  # views 1, 2 ... of the census
    ingested: list[str]  # ids, if there are no selections yet
    census: Census
    scores: list[ScoreChart]
    pictures: dict[str, str]  # data URIs by id
    not_done: list[str]  # failures in the run records of the jobs


def survey(store: Store, captions: str = "captions") -> Findings:
    """Reads the dataset with the captions of one folder.

    Raises UsageError if files do not belong together, JobFailed if a file cannot be read.
    """
    ingest = survey_rejections(store, "rejected")
    names = sorted((name for name in store.folders("selections") if store.shards(f"selections/{name}")), key=_by_size)
    selections = [_selected(store, name, _KEPT if len(names) < 3 else _KEPT // 2) for name in names]
    ingested = [] if names else choose_ids(store, "images", _KEPT)
    wanted = [*ingested, *_wanted_ids(selections)]
    census = take_census(store, names, wanted, captions)
    scorers = [name for name in store.folders("scores") if store.shards(f"scores/{name}")]
    return Findings(
        dataset=store.root,
        ingest=ingest,
        selections=selections,
        ingested=ingested,
        census=census,
        scores=[chart for name in scorers for chart in score_charts(store, name)],
        pictures=_thumbnails(store, {name: census.places[name] for name in wanted if name in census.places}),
        not_done=[
            f"{folder}: {name} ({why})"
            for folder in ("images", captions, *map("selections/{}".format, names))
            if store.exists(f"{folder}/run.json")
            for name, why in json.loads(store.read(f"{folder}/run.json")).get("failed", {}).items()
        ],
    )


def duplicate_pairs(selections: list[Selected]) -> dict[tuple[str, str], list[str]]:
    """(rejected id, kept id) of a few duplicates -> the names of the selections in which they are."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for selection in selections:
        for example in selection.rejections.examples.get("duplicate", []):
            keeper = example.keeper
            if keeper and (len(pairs) < PAIRS or (example.key, keeper) in pairs):
                pairs.setdefault((example.key, keeper), []).append(selection.name)
    return pairs


def shown_reasons(rejections: Rejections) -> list[tuple[str, int, list[Example]]]:
    """The most frequent reasons, each with its number of rows and its examples."""
    frequent = rejections.reasons.most_common(REASONS_SHOWN)
    return [(reason, count, rejections.examples.get(reason, [])) for reason, count in frequent]


def _selected(store: Store, name: str, kept: int) -> Selected:
    folder = f"selections/{name}"
    finished = store.exists(f"{folder}/selection.json")
    rejections = survey_rejections(store, f"{folder}/rejected")
    return Selected(name, rejections, choose_ids(store, folder, kept), finished, curate_command(store, name))


def _by_size(selection: str) -> tuple[int, str]:
    """Sorts names of stages by their resolution, after all other names: demo, 256, 1024."""
    return (int(selection) if selection.isdecimal() else 0, selection)


def _wanted_ids(selections: list[Selected]) -> list[str]:
    """The ids of the pictures on the page, the most important ones first."""
    kept = [name for selection in selections for name in selection.kept]
    pairs = [name for pair in duplicate_pairs(selections) for name in pair]
    refused = [
        (rank, example.key)
        for selection in selections
        for reason, _, examples in shown_reasons(selection.rejections)
        for rank, example in enumerate(examples)
        if reason != "duplicate"
    ]
    # The first example of every reason comes before the second example of any.
    wanted = [*kept, *pairs, *(key for _, key in sorted(refused, key=lambda ranked: ranked[0]))]
    return list(dict.fromkeys(wanted))[:_PICTURES]


def _thumbnails(store: Store, places: Mapping[str, Place]) -> dict[str, str]:
    """A data URI for each id whose picture can be read."""
    sides = [int(name[7:]) for name in store.folders("") if name.startswith("images-") and name[7:].isdecimal()]
    smallest = f"images-{min(sides)}" if sides else "images"
    by_shard: dict[str, dict[int, str]] = defaultdict(dict)
    for name, place in places.items():
        by_shard[place.shard][place.row] = name

    def draw(shard: str) -> dict[str, str | None]:
        folder, names = smallest if store.exists(f"{smallest}/{shard}.parquet") else "images", by_shard[shard]
        pictures = read_pictures(store, f"{folder}/{shard}.parquet", sorted(names))
        return {names[row]: thumbnail_uri(picture) for row, picture in pictures}

    drawn = map_in_order(draw, sorted(by_shard), _PICTURE_READERS)
    return {name: uri for part in drawn for name, uri in part.items() if uri}
