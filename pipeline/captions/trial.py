"""A few captions before the many: rows spread over the dataset, a page that shows them, and what all would cost.

Runs in this process, without Ray, and writes nothing but the page. Every text of the dataset and of the model is
untrusted: the template escapes it, and the page's own policy lets no script run and fetches nothing.
"""

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import jinja2

from captioner.attempts import Outcome
from pipeline.captions.costs import Costs, clock
from pipeline.captions.engine_choice import CaptionSettings
from pipeline.captions.model_captions import Captioner, CaptionTask, Waiting, with_pictures
from pipeline.captions.tag_captions import TAG_COLUMNS, request_of
from pipeline.core.records import Rating
from pipeline.pictures.thumbnails import data_uri
from pipeline.storage.shards import Store
from pipeline.tagging.tags import TagReader


@dataclass(frozen=True)
class Shown:
    """A row of the page."""

    id: str
    tags: dict[str, list[str]]
    uri: str | None  # of the picture
    covered: bool  # blurred until it is pointed at
    caption: str | None
    reason: str | None
    said: str  # by the model, where that was refused
    attempts: int
    finish_reason: str | None
    tokens_in: int
    tokens_out: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    rows: list[Shown]
    costs: Costs
    seconds: float  # without the engine's start


def spread(rows_of: Mapping[str, int], count: int) -> dict[str, list[int]]:
    """`count` row numbers by shard, the middles of as many equal parts of all rows; all rows where there are fewer."""
    shards, ends = list(rows_of), list(accumulate(rows_of.values()))
    count = min(count, ends[-1])
    chosen: dict[str, list[int]] = {}
    for part in range(count):
        number = (2 * part + 1) * ends[-1] // (2 * count)
        shard = bisect_right(ends, number)
        chosen.setdefault(shards[shard], []).append(number - (ends[shard - 1] if shard else 0))
    return chosen


def run_trial(task: CaptionTask, chosen: Mapping[str, list[int]]) -> Trial:
    """Caption these rows. JobStopped where the engine is unusable."""
    store, captioner = Store(task.dataset), Captioner(task)
    waiting: dict[str, Waiting] = {}  # by id
    covered: set[str] = set()

    def rows() -> Iterator[Waiting]:
        reader = TagReader()
        for shard, numbers in chosen.items():
            posts = store.read_table(f"images/{shard}.parquet", [*TAG_COLUMNS, "rating"]).take(numbers).to_pylist()
            requests = {number: request_of(post, reader) for number, post in zip(numbers, posts, strict=True)}
            covered.update(post["id"] for post in posts if post["rating"] in (Rating.QUESTIONABLE, Rating.EXPLICIT))
            for row in with_pictures(store, shard, requests, {}):
                waiting[row.request.id] = row
                yield row

    outcomes: dict[str, Outcome] = {}
    started = time.monotonic()
    try:
        captioner.answer(rows(), lambda outcome: outcomes.update({outcome.answer.id: outcome}))
        seconds = time.monotonic() - started - captioner.seconds_starting
        costs = captioner.report()
    finally:
        captioner.close()
    return Trial([_shown(row, outcomes[id], id in covered) for id, row in waiting.items()], costs, seconds)


def _shown(row: Waiting, outcome: Outcome, covered: bool) -> Shown:
    answer = outcome.answer
    return Shown(
        row.request.id, row.request.tags, data_uri(row.picture), covered, answer.caption, answer.reason,
        outcome.said if answer.reason else "", outcome.attempts, outcome.finish_reason, outcome.tokens_in,
        outcome.tokens_out, answer.notes,
    )  # fmt: skip


def estimate(trial: Trial, rows: int, engines: int, at_once: int, dollars_per_hour: float | None) -> list[str]:
    """What captioning the whole dataset takes, in sentences."""
    tried, costs = max(1, len(trial.rows)), trial.costs
    rate = tried / max(trial.seconds, 1e-3)
    hours = rows / (rate * engines) / 3600
    price = "" if dollars_per_hour is None else f", ${hours * engines * dollars_per_hour:,.2f}"
    lines = [
        f"{rate:.2f} images/s; of each {costs.tokens_in / tried:.0f} tokens in, {costs.tokens_out / tried:.0f} out.",
        f"All {rows:,} images with {engines} engine{'s' if engines > 1 else ''}: {clock(hours * 3600)}{price}.",
    ]
    if tried < 2 * at_once:
        lines.append(
            f"That is the most it takes: an engine is faster when its {at_once} places are full; a trial of "
            f"{4 * at_once} tells more closely."
        )
    return lines


def render(trial: Trial, settings: CaptionSettings, dataset: str, lines: list[str]) -> str:
    """The page, self-contained."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("trial.html").render(
        dataset=dataset,
        date=time.strftime("%Y-%m-%d %H:%M"),
        settings=settings,
        rejected=Counter(row.reason for row in trial.rows if row.reason).most_common(),
        estimate=lines,
        rows=trial.rows,
    )
