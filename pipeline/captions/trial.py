"""A trial before the real job: captions rows spread over the dataset and estimates the cost of all, on one page.

Runs in this process, without Ray, and writes nothing else. All texts of the dataset and of the model are untrusted: the
template escapes them, and the page's Content-Security-Policy allows no script and no request.
"""

import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import jinja2

from captioner.captioning import Outcome
from captioner.requests import CaptionRequest
from pipeline.captions.model_captions import CaptionTask, CaptionWorker, PendingRow, read_pending
from pipeline.captions.stats import CaptionStats, clock
from pipeline.captions.tag_captions import TAG_COLUMNS, request_from_row
from pipeline.core.records import Rating
from pipeline.pictures.crops import thumbnail_uri
from pipeline.storage.shards import Store
from pipeline.tagging.tags import TagReader

_PAGE = "caption-trial.html"


@dataclass(frozen=True)
class TrialRow:
    """A row of the page."""

    request: CaptionRequest
    uri: str | None  # thumbnail
    blurred: bool  # until the pointer is over it
    outcome: Outcome


@dataclass(frozen=True)
class Trial:
    rows: list[TrialRow]
    stats: CaptionStats
    seconds: float  # without the engine's start


def run_trial(
    task: CaptionTask, rows_of: Mapping[str, int], count: int, engines: int, dollars_per_hour: float | None
) -> None:
    """Caption `count` rows, write the page and print its summary. `rows_of` has the number of rows by shard; `engines`
    and dollars are for the estimate. Raises JobStopped if the engine is unusable."""
    store = Store(task.dataset)
    trial = caption_sample(task, store, spread(rows_of, count))
    lines = estimate(trial, sum(rows_of.values()), engines, task.engine.concurrency, dollars_per_hour)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rejected = trial.stats.rejected
    page = environment.get_template("trial.html").render(
        dataset=task.dataset, date=time.strftime("%Y-%m-%d %H:%M"), settings=task.settings, estimate=lines,
        rejected=rejected.most_common(), rows=trial.rows,
    )  # fmt: skip
    store.write(_PAGE, page.encode())
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
    lines.append(f"{len(trial.rows)} rows tried, {rejected.total()} rejected" + (f" ({reasons})" if reasons else ""))
    print("\n".join(f"caption: {line}" for line in [*lines, f"see {store.path(_PAGE)}"]), flush=True)


def spread(rows_of: Mapping[str, int], count: int) -> dict[str, list[int]]:
    """`count` row numbers by shard: the middles of equal parts of all rows, or all rows if there are fewer."""
    shards, ends = list(rows_of), list(accumulate(rows_of.values()))
    count = min(count, ends[-1])
    chosen: dict[str, list[int]] = {}
    for part in range(count):
        number = (2 * part + 1) * ends[-1] // (2 * count)
        shard = bisect_right(ends, number)
        chosen.setdefault(shards[shard], []).append(number - (ends[shard - 1] if shard else 0))
    return chosen


def caption_sample(task: CaptionTask, store: Store, chosen: Mapping[str, list[int]]) -> Trial:
    """Caption these rows, given by shard and row number."""
    worker = CaptionWorker(task)
    rows: dict[str, PendingRow] = {}  # by id
    blurred: set[str] = set()

    def pending() -> Iterator[PendingRow]:
        reader = TagReader()
        for shard, numbers in chosen.items():
            posts = store.read_table(f"images/{shard}.parquet", [*TAG_COLUMNS, "rating"]).take(numbers).to_pylist()
            requests = {number: request_from_row(post, reader) for number, post in zip(numbers, posts, strict=True)}
            blurred.update(post["id"] for post in posts if post["rating"] in (Rating.QUESTIONABLE, Rating.EXPLICIT))
            for row in read_pending(store, shard, requests, {}):
                rows[row.request.id] = row
                yield row

    outcomes: dict[str, Outcome] = {}
    started = time.monotonic()
    try:
        worker.caption_rows(pending(), lambda outcome: outcomes.update({outcome.answer.id: outcome}))
        seconds = time.monotonic() - started
        stats = worker.report()
    finally:
        worker.close()
    shown = [TrialRow(row.request, thumbnail_uri(row.picture), id in blurred, outcomes[id]) for id, row in rows.items()]
    return Trial(shown, stats, seconds - stats.seconds_starting)


def estimate(trial: Trial, rows: int, engines: int, concurrency: int, dollars_per_hour: float | None) -> list[str]:
    """What it takes to caption the whole dataset, in sentences."""
    tried, stats = max(1, len(trial.rows)), trial.stats
    rate = tried / max(trial.seconds, 1e-3)
    hours = rows / (rate * engines) / 3600
    price = "" if dollars_per_hour is None else f", ${hours * engines * dollars_per_hour:,.2f}"
    lines = [
        f"{rate:.2f} images/s; per image {stats.tokens_in / tried:.0f} tokens in, {stats.tokens_out / tried:.0f} out.",
        f"All {rows:,} images with {engines} engine{'s' if engines > 1 else ''}: {clock(hours * 3600)}{price}.",
    ]
    if tried < 2 * concurrency:
        lines.append(
            f"This is an upper bound, because an engine is faster with {concurrency} requests in flight: a trial of "
            f"{4 * concurrency} rows is more accurate."
        )
    return lines
