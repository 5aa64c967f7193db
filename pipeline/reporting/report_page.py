"""Findings -> the page. Every text of the dataset is untrusted: the template escapes it, and the page's own policy lets
no script run but ours and fetches nothing."""

import base64
import hashlib
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from pipeline.core.records import TAG_CATEGORIES, Rating
from pipeline.reporting.census import SELECTION_WORDS, SOURCES
from pipeline.reporting.examples import Example, Rejections
from pipeline.reporting.findings import REASONS_SHOWN, Findings, duplicate_pairs, shown_reasons
from pipeline.reporting.measures import CAPTION_WORDS, MEASURES, Measure
from pipeline.reporting.tallies import NONE

# All pictures together: noise compresses badly, so their number alone would not bound the page.
_MAX_PICTURE_BYTES = 3_500_000
_TAGS_LISTED = 1500  # per category
_MAX_TEXT = 160  # characters of any one text of the dataset
_TICKS = 6
# Words that have an order are shown in it; others follow by frequency.
_ORDERS = {
    "rating": ("safe", *Rating, "nsfw", "explicit, nsfw"),
    "quality": ("masterpiece", "best quality", "great quality", "good quality", "normal quality", "low quality",
                "worst quality"),
    "era": ("newest", "recent", "mid", "early", "old"),
}  # fmt: skip


@dataclass(frozen=True)
class Share:
    """A labelled count and its part of a whole, in percent."""

    label: str
    count: int
    percent: float


@dataclass(frozen=True)
class Step:
    """One step of the funnel: how many rows are left, and why the others are not."""

    title: str
    rows: int
    percent: float  # of the raw rows
    lost: list[Share]
    lost_percent: float  # of the raw rows
    command: str | None = None  # what runs next


@dataclass(frozen=True)
class Bar:
    label: str
    count: int
    heights: list[tuple[str, float, float]]  # source, top and height in percent of the chart


@dataclass(frozen=True)
class Chart:
    title: str
    bars: list[Bar]
    ticks: list[tuple[float, str]]  # percent from the left, label
    peak: int
    unknown: int  # rows without a value


@dataclass(frozen=True)
class View:
    """What is shown of the whole dataset, or of one selection."""

    name: str
    rows: int
    charts: list[Chart]
    words: dict[str, list[Share]]


@dataclass
class Figure:
    key: str
    detail: str
    size: str
    covered: bool  # blurred until it is asked for
    uri: str | None


@dataclass
class Album:
    """Hands out figures until the page has as many bytes of pictures as it may have."""

    findings: Findings
    spent: int = field(default=0)

    def figure(self, key: str, detail: str = "") -> Figure:
        place, uri = self.findings.census.places.get(key), self.findings.pictures.get(key)
        self.spent += len(uri or "")
        fits = self.spent <= _MAX_PICTURE_BYTES
        covered = place is not None and place.rating in (Rating.QUESTIONABLE, Rating.EXPLICIT)
        return Figure(clip(key), clip(detail), place.size if place else "", covered, uri if fits else None)

    def figures(self, examples: Iterable[Example]) -> list[Figure]:
        return [self.figure(example.key, example.detail) for example in examples]


def render(findings: Findings) -> str:
    """The page, self-contained."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"clip": clip, "number": "{:,}".format}
    script = (Path(__file__).parent / "report.js").read_text()
    album, census = Album(findings), findings.census
    # First come, first served: what matters most takes its pictures first.
    kept = {selection.name: [album.figure(key) for key in selection.kept] for selection in findings.selections}
    ingested = [album.figure(key) for key in findings.ingested]
    duplicates = [
        (album.figure(rejected), album.figure(keeper), ", ".join(names))
        for (rejected, keeper), names in duplicate_pairs(findings.selections).items()
    ]
    return environment.get_template("report.html").render(
        dataset=findings.dataset,
        date=time.strftime("%Y-%m-%d %H:%M"),
        funnel=funnel(findings),
        not_done=findings.not_done,
        sources=[name for name, count in zip(SOURCES, census.histograms["tags"][0].sum(axis=1), strict=True) if count],
        views=views(findings),
        engines=shares(census.engines),
        kept=kept,
        ingested=ingested,
        refused={selection.name: _refused(selection.rejections, album) for selection in findings.selections},
        not_listed={s.name: max(0, len(s.rejections.reasons) - REASONS_SHOWN) for s in findings.selections},
        ingest=[(clip(reason), count, examples) for reason, count, examples in shown_reasons(findings.ingest)],
        duplicates=duplicates,
        scores=[
            (chart.scorer, score) for chart in findings.scores
            if (score := histogram(chart.measure, chart.counts[None], ("other",), chart.unknown))
        ],
        tags=tag_tables(findings),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def funnel(findings: Findings) -> list[Step]:
    """Raw rows -> ingested -> captioned -> each selection; every step accounts for all rows of the one before."""
    census, root = findings.census, shlex.quote(findings.dataset)
    images = int(census.rows[0])
    raw = images + findings.ingest.reasons.total()
    captioned = census.captions["captioned"]
    no_caption = Counter({reason: count for reason, count in census.captions.items() if reason != "captioned"})
    waiting = images - census.captions.total()
    caption = f"python pipeline/caption.py --dataset {root}" if waiting else None
    steps = [
        _step("Raw rows", raw, raw, Counter()),
        _step("Ingested", images, raw, findings.ingest.reasons),
        _step("Captioned", captioned, raw, no_caption + Counter({"not captioned yet": waiting}), caption),
    ]
    for view, selection in enumerate(findings.selections, start=1):
        kept, reasons = int(census.rows[view]), selection.rejections.reasons
        unjudged = max(0, images - kept - reasons.total())
        redo = selection.command if unjudged or not selection.finished else None
        title = f"Selection {selection.name}" + ("" if selection.finished else " (unfinished)")
        steps.append(_step(title, kept, raw, reasons + Counter({"not judged yet": unjudged}), redo))
    if not findings.selections and images and not waiting:
        steps.append(_step("Selected", 0, raw, Counter(), f"python pipeline/curate.py --dataset {root} --stage demo"))
    return steps


def _step(title: str, rows: int, raw: int, lost: Counter[str], command: str | None = None) -> Step:
    whole = max(raw, 1)
    lost = Counter({reason: count for reason, count in lost.items() if count})
    return Step(
        clip(title), rows, 100 * rows / whole, shares(lost, rows + lost.total()), 100 * lost.total() / whole, command
    )


def views(findings: Findings) -> list[View]:
    census = findings.census
    found = []
    for view, name in enumerate(["whole dataset", *(selection.name for selection in findings.selections)]):
        rows = int(census.rows[view])
        charts = [
            histogram(measure, counts, SOURCES, rows - int(counts.sum()))
            for measure in MEASURES
            if (counts := census.histograms[measure.name][view]).any() or measure is not CAPTION_WORDS
        ]
        columns = SELECTION_WORDS if view else ("rating", "source", "format")
        words = {column: shares(census.words.get((view, column), Counter()), rows, column) for column in columns}
        found.append(View(clip(name), rows, [chart for chart in charts if chart], words))
    return found


def histogram(measure: Measure, counts: NDArray[np.int64], sources: Sequence[str], unknown: int) -> Chart | None:
    """Stacked columns of sources x bins, without the empty bins at both ends; None where there is no value at all."""
    totals = counts.sum(axis=0)
    if not totals.any():
        return None
    used = np.flatnonzero(totals)
    first, last = int(used[0]), int(used[-1])
    peak = int(totals.max())
    bars = []
    for number in range(first, last + 1):
        heights, top = [], 100.0
        for source, count in zip(sources, counts[:, number].tolist(), strict=True):
            height = 100 * count / peak
            top -= height
            if count:
                heights.append((source, round(top, 2), round(height, 2)))
        bars.append(Bar(measure.range_of(number), int(totals[number]), heights))
    return Chart(measure.title, bars, _ticks(measure, first, last), peak, unknown)


def _ticks(measure: Measure, first: int, last: int) -> list[tuple[float, str]]:
    """A few labelled edges: the left edge of bin i is edge i-1; the first and the last bin may have only one edge."""
    edges = range(max(first, 1), min(last, len(measure.edges) - 1) + 2)
    every = -(-len(edges) // _TICKS)
    width = 100 / (last + 1 - first)
    return [((number - first) * width, measure.label(measure.edges[number - 1])) for number in list(edges)[::every]]


def shares(words: Counter[str], whole: int | None = None, order: str = "") -> list[Share]:
    """The most frequent words, in their order where they have one; the others as one."""
    whole = max(words.total() if whole is None else whole, 1)
    places = {word: place for place, word in enumerate(_ORDERS.get(order, ()))}
    shown = words.most_common(REASONS_SHOWN)
    shown.sort(key=lambda item: (places.get(item[0], len(places) + (item[0] == NONE)), -item[1], item[0]))
    others = words.total() - sum(count for _, count in shown)
    if others:
        shown.append((f"{len(words) - len(shown)} others", others))
    return [Share(clip(word), count, round(100 * count / whole, 2)) for word, count in shown]


def tag_tables(findings: Findings) -> dict[str, Any]:
    """What the script searches: per category the most frequent tags with their counts in each view."""
    tables = {}
    for category in TAG_CATEGORIES:
        tally = findings.census.tags[category]
        tags, known = tally.top(_TAGS_LISTED)
        tables[category] = {
            "known": known,
            "forgotten": tally.forgotten,
            "tags": [[clip(tag), *counts] for tag, *counts in tags],
        }
    return {"views": ["dataset", *(clip(s.name) for s in findings.selections)], "categories": tables}


def clip(text: str) -> str:
    """One text of the dataset, short enough for a page, without characters that turn the text around them."""
    visible = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return visible if len(visible) <= _MAX_TEXT else visible[: _MAX_TEXT - 1] + "…"


def _refused(rejections: Rejections, album: Album) -> list[tuple[str, int, list[Figure]]]:
    """Reason, rows, pictures; the duplicates' pictures stand beside the kept ones instead."""
    return [
        (clip(reason), count, [] if reason == "duplicate" else album.figures(examples))
        for reason, count, examples in shown_reasons(rejections)
    ]
