"""All that the report says of a dataset, read in three steps: rejected rows, the census, a few pictures."""

import json
from dataclasses import dataclass
from typing import Any

from pipeline.curation.rerun import curate_command
from pipeline.reporting.census import Census, take_census
from pipeline.reporting.examples import Example, Rejections, choose_ids, keeper_of, survey_rejections
from pipeline.reporting.score_charts import ScoreChart, score_charts
from pipeline.reporting.thumbnails import thumbnails
from pipeline.storage.shards import Store

# Pictures on the page, all kinds together: what a phone still scrolls through, and what bounds the reading.
_PICTURES = 300
_KEPT, _OF_A_REASON, _PAIRS = 24, 6, 12
# Reasons with pictures or examples of their own; the rest is counted.
REASONS_SHOWN = 30


@dataclass(frozen=True)
class Selected:
    """One selection: what curation refused and a few of what it kept."""

    name: str
    rejections: Rejections
    kept: list[str]  # ids
    finished: bool
    command: str  # that makes it again


@dataclass(frozen=True)
class Findings:
    dataset: str
    ingest: Rejections
    selections: list[Selected]  # in the order of the census's views, from 1
    ingested: list[str]  # ids, where there are no selections yet
    census: Census
    scores: list[ScoreChart]
    pictures: dict[str, str]  # data URIs by id
    not_done: list[str]  # what the jobs' own records say went wrong


def survey(store: Store, captions: str = "captions") -> Findings:
    """Read the dataset, with the captions of one folder; UsageError or JobFailed where its files do not fit together or
    cannot be read."""
    ingest = survey_rejections(store, "rejected", {}, _OF_A_REASON)
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
        pictures=thumbnails(store, {wish: census.places[wish] for wish in wanted if wish in census.places}),
        not_done=_not_done(store, ["images", captions, *map("selections/{}".format, names)]),
    )


def duplicate_pairs(selections: list[Selected]) -> dict[tuple[str, str], list[str]]:
    """(rejected id, kept id) of a few duplicates -> the names of the selections that say so."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for selection in selections:
        for example in selection.rejections.examples.get("duplicate", []):
            keeper = keeper_of(example.detail)
            if keeper and (len(pairs) < _PAIRS or (example.key, keeper) in pairs):
                pairs.setdefault((example.key, keeper), []).append(selection.name)
    return pairs


def shown_reasons(rejections: Rejections) -> list[tuple[str, int, list[Example]]]:
    """The most frequent reasons, each with its rows and examples."""
    frequent = rejections.reasons.most_common(REASONS_SHOWN)
    return [(reason, count, rejections.examples.get(reason, [])) for reason, count in frequent]


def _selected(store: Store, name: str, kept: int) -> Selected:
    folder = f"selections/{name}"
    return Selected(
        name=name,
        rejections=survey_rejections(store, f"{folder}/rejected", {"duplicate": _PAIRS}, _OF_A_REASON),
        kept=choose_ids(store, folder, kept),
        finished=store.exists(f"{folder}/selection.json"),
        command=curate_command(store, name),
    )


def _by_size(selection: str) -> tuple[int, str]:
    """Words first, then stages that are called by their resolution: demo, 256, 1024."""
    return (int(selection) if selection.isdecimal() else 0, selection)


def _wanted_ids(selections: list[Selected]) -> list[str]:
    """The ids whose pictures are shown, those first that matter most, as many as one page may have."""
    kept = [row for selection in selections for row in selection.kept]
    pairs = [row for pair in duplicate_pairs(selections) for row in pair]
    refused = [
        (rank, example.key)
        for selection in selections
        for reason, _, examples in shown_reasons(selection.rejections)
        for rank, example in enumerate(examples)
        if reason != "duplicate"
    ]
    # The first example of every reason before the second of any.
    wanted = [*kept, *pairs, *(row for _, row in sorted(refused, key=lambda ranked: ranked[0]))]
    return list(dict.fromkeys(wanted))[:_PICTURES]


def _not_done(store: Store, folders: list[str]) -> list[str]:
    """What failed, as the jobs recorded it."""
    records: dict[str, dict[str, Any]] = {
        folder: json.loads(store.read(f"{folder}/run.json")) for folder in folders if store.exists(f"{folder}/run.json")
    }
    return [
        f"{folder}: {name} ({why})"
        for folder, record in records.items()
        for name, why in record.get("failed", {}).items()
    ]
