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
import numpy as np

from captioner.captioning import Outcome
from captioner.requests import CaptionRequest
from pipeline.captions.caption_rows import prepare
from pipeline.captions.model_captions import Captioner, CaptionTask, PendingRow
from pipeline.captions.stats import RowCounts, clock
from pipeline.captions.tag_captions import TAG_COLUMNS, request_from_row
from pipeline.core.records import Rating
from pipeline.pictures.crops import thumbnail_uri
from pipeline.storage.row_reader import open_parquet, read_rows
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
    counts: RowCounts
    seconds: float  # of the engine, without its start: pictures are decoded before


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
    rejected = trial.counts.rejected
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
    sample = [row for shard, numbers in chosen.items() for row in _read_sample(store, shard, numbers)]
    rows = [PendingRow(row.request, prepare(row.picture, task.settings.max_side)) for row in sample]
    captioner = Captioner(task)
    started = time.monotonic()
    try:
        outcomes = captioner.caption(rows)
        seconds = time.monotonic() - started
        starting = captioner.times().starting
    finally:
        captioner.close()
    shown = [
        TrialRow(row.request, thumbnail_uri(row.picture), row.blurred, outcome)
        for row, outcome in zip(sample, outcomes, strict=True)
    ]
    return Trial(shown, RowCounts.of(outcomes, [0] * len(outcomes)), seconds - starting)


@dataclass(frozen=True)
class _SampleRow:
    request: CaptionRequest
    picture: bytes
    blurred: bool


def _read_sample(store: Store, shard: str, numbers: list[int]) -> Iterator[_SampleRow]:
    reader = TagReader()
    with open_parquet(store.path(f"images/{shard}.parquet")) as parquet:
        for _, batch in read_rows(parquet, np.array(numbers, np.int32), [*TAG_COLUMNS, "rating", "image"]):
            for row in batch.to_pylist():
                blurred = row["rating"] in (Rating.QUESTIONABLE, Rating.EXPLICIT)
                yield _SampleRow(request_from_row(row, reader), row["image"], blurred)


def estimate(trial: Trial, rows: int, engines: int, concurrency: int, dollars_per_hour: float | None) -> list[str]:
    """What it takes to caption the whole dataset, in sentences."""
    tried, counts = max(1, len(trial.rows)), trial.counts
    rate = tried / max(trial.seconds, 1e-3)
    hours = rows / (rate * engines) / 3600
    price = "" if dollars_per_hour is None else f", ${hours * engines * dollars_per_hour:,.2f}"
    tokens_in, tokens_out = counts.tokens_in / tried, counts.tokens_out / tried
    lines = [
        f"{rate:.2f} images/s; per image {tokens_in:.0f} tokens in, {tokens_out:.0f} out.",
        f"All {rows:,} images with {engines} engine{'s' if engines > 1 else ''}: {clock(hours * 3600)}{price}.",
    ]
    if tried < 2 * concurrency:
        lines.append(
            f"This is an upper bound, because an engine is faster with {concurrency} requests in flight: a trial of "
            f"{4 * concurrency} rows is more accurate."
        )
    return lines
