"""Renders findings as one HTML page.

Texts of the dataset are untrusted: the template escapes them, and the page's content security policy allows only the
script of this package and no requests.
"""

import base64
import hashlib
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from pipeline.core.records import TAG_CATEGORIES, Rating
from pipeline.reporting.census import IMAGE_WORDS, SELECTION_WORDS, SOURCES
from pipeline.reporting.counts import NONE
from pipeline.reporting.findings import REASONS_SHOWN, Findings, duplicate_pairs, shown_reasons
from pipeline.reporting.measures import CAPTION_WORDS, MEASURES, Measure

# Total of all pictures. Limiting their number alone would not bound the page, because noise compresses badly.
_MAX_PICTURE_BYTES = 3_500_000
_TAGS_LISTED = 1500  # per category
_MAX_TEXT = 160  # characters of any one text of the dataset
_TICKS = 6
# Words that have a natural order are shown in it; the others follow by frequency.
_ORDERS = {
    "rating": ("safe", *Rating, "nsfw", "explicit, nsfw"),
    "quality": ("masterpiece", "best quality", "great quality", "good quality", "normal quality", "low quality",
                "worst quality"),
    "era": ("newest", "recent", "mid", "early", "old"),
}  # fmt: skip


@dataclass(frozen=True)
class Share:
    """A labelled count, and its percentage of a whole."""

    label: str
    count: int
    percent: float


@dataclass(frozen=True)
class FunnelStep:
    """One step of the funnel: the rows that are left, and the reasons for which others are not."""

    title: str
    rows: int
    percent: float  # of the raw rows
    lost: list[Share]
    lost_percent: float  # of the raw rows
    command: str | None = None  # to run next


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
class ReportView:
    """The charts and words of the whole dataset or of one selection."""

    name: str
    rows: int
    charts: list[Chart]
    words: dict[str, list[Share]]


@dataclass(frozen=True)
class Figure:
    key: str
    detail: str
    size: str
    covered: bool  # blurred until the reader uncovers it
    uri: str | None  # None: no picture


def render(findings: Findings) -> str:
    """The page, without references to other files."""
    folder, census, picture_bytes = Path(__file__).parent, findings.census, 0

    def figure(key: str, detail: str = "") -> Figure:
        """Has no picture once the page has _MAX_PICTURE_BYTES of them."""
        nonlocal picture_bytes
        place, uri = census.places.get(key), findings.pictures.get(key)
        picture_bytes += len(uri or "")
        covered = place is not None and place.rating in (Rating.QUESTIONABLE, Rating.EXPLICIT)
        shown = uri if picture_bytes <= _MAX_PICTURE_BYTES else None
        return Figure(clip(key), clip(detail), place.size if place else "", covered, shown)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"clip": clip, "number": "{:,}".format}
    script = (folder / "report.js").read_text()
    # The most important pictures come first, because the number of bytes is limited.
    kept = {selection.name: [figure(key) for key in selection.kept] for selection in findings.selections}
    ingested = [figure(key) for key in findings.ingested]
    duplicates = [
        (figure(rejected), figure(keeper), ", ".join(names))
        for (rejected, keeper), names in duplicate_pairs(findings.selections).items()
    ]
    refused = {
        selection.name: [
            # Pictures of duplicates are shown beside the kept ones.
            (clip(reason), count, [figure(e.key, e.detail) for e in examples if reason != "duplicate"])
            for reason, count, examples in shown_reasons(selection.rejections)
        ]
        for selection in findings.selections
    }
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
        refused=refused,
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


def funnel(findings: Findings) -> list[FunnelStep]:
    """Raw rows -> ingested -> captioned -> each selection. Each step accounts for all rows of an earlier one."""
    census, root = findings.census, shlex.quote(findings.dataset)
    images = int(census.rows[0])
    raw = images + findings.ingest.reasons.total()
    no_caption = Counter({reason: count for reason, count in census.captions.items() if reason != "captioned"})
    waiting = images - census.captions.total()

    def section(title: str, rows: int, lost: Counter[str], command: str | None = None) -> FunnelStep:
        whole, gone = max(raw, 1), +lost
        shown = shares(gone, rows + gone.total())
        return FunnelStep(clip(title), rows, 100 * rows / whole, shown, 100 * gone.total() / whole, command)

    caption = f"python pipeline/caption.py --dataset {root}" if waiting else None
    lost = no_caption + Counter({"not captioned yet": waiting})
    sections = [
        section("Raw rows", raw, Counter()),
        section("Ingested", images, findings.ingest.reasons),
        section("Captioned", census.captions["captioned"], lost, caption),
    ]
    for view, selection in enumerate(findings.selections, start=1):
        kept, reasons = int(census.rows[view]), selection.rejections.reasons
        undecided = max(0, images - kept - reasons.total())
        command = selection.command if undecided or not selection.finished else None
        title = f"Selection {selection.name}" + ("" if selection.finished else " (unfinished)")
        sections.append(section(title, kept, reasons + Counter({"not curated yet": undecided}), command))
    if not findings.selections and images and not waiting:
        sections.append(section("Selected", 0, Counter(), f"python pipeline/curate.py --dataset {root} --stage demo"))
    return sections


def views(findings: Findings) -> list[ReportView]:
    census, found = findings.census, []
    for view, name in enumerate(["whole dataset", *(selection.name for selection in findings.selections)]):
        rows = int(census.rows[view])
        charts = [
            histogram(measure, counts, SOURCES, rows - int(counts.sum()))
            for measure in MEASURES
            if (counts := census.histograms[measure.name][view]).any() or measure is not CAPTION_WORDS
        ]
        columns = SELECTION_WORDS if view else IMAGE_WORDS
        words = {column: shares(census.words[view, column], rows, column) for column in columns}
        found.append(ReportView(clip(name), rows, [chart for chart in charts if chart], words))
    return found


def histogram(measure: Measure, counts: NDArray[np.int64], sources: Sequence[str], unknown: int) -> Chart | None:
    """Stacked bars of counts (sources, bins), without the empty bins at both ends. None if all bins are empty."""
    totals = counts.sum(axis=0)
    if not totals.any():
        return None
    used = np.flatnonzero(totals)
    first, last, peak = int(used[0]), int(used[-1]), int(totals.max())
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
    """A few labelled edges. The left edge of bin i is edge i-1; the outermost bins have only one edge."""
    edges = range(max(first, 1), min(last, len(measure.edges) - 1) + 2)
    every = -(-len(edges) // _TICKS)
    width = 100 / (last + 1 - first)
    return [((number - first) * width, measure.label(measure.edges[number - 1])) for number in list(edges)[::every]]


def shares(words: Counter[str], whole: int | None = None, order: str = "") -> list[Share]:
    """The most frequent words in their natural order or by frequency, and the others as one share."""
    whole = max(words.total() if whole is None else whole, 1)
    places = {word: place for place, word in enumerate(_ORDERS.get(order, ()))}
    shown = words.most_common(REASONS_SHOWN)
    shown.sort(key=lambda item: (places.get(item[0], len(places) + (item[0] == NONE)), -item[1], item[0]))
    others = words.total() - sum(count for _, count in shown)
    if others:
        shown.append((f"{len(words) - len(shown)} others", others))
    return [Share(clip(word), count, round(100 * count / whole, 2)) for word, count in shown]


def tag_tables(findings: Findings) -> dict[str, Any]:
    """The data of the script's tag search: the most frequent tags of each category with their counts per view."""
    tables = {}
    for category in TAG_CATEGORIES:
        counts = findings.census.tags[category]
        tags, known = counts.top(_TAGS_LISTED)
        listed = [[clip(tag), *pictures] for tag, *pictures in tags]
        tables[category] = {"known": known, "forgotten": counts.forgotten, "tags": listed}
    return {"views": ["dataset", *(clip(s.name) for s in findings.selections)], "categories": tables}


def clip(text: str) -> str:
    """A text of the dataset, cut to the length that a page has room for, without characters that affect other text."""
    visible = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return visible if len(visible) <= _MAX_TEXT else visible[: _MAX_TEXT - 1] + "…"
