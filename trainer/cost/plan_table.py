"""Rows of a plan -> a table of text."""

from collections.abc import Callable, Sequence

from trainer.cost.costs import (
    PUBLISHED,
    PUBLISHED_DOLLARS,
    PUBLISHED_GPU,
    PUBLISHED_GPUS,
    PUBLISHED_HOURS,
    PUBLISHED_PRICES,
    Row,
)
from trainer.cost.planning import Plan


def table(plan: Plan, stages_are_the_papers: bool) -> str:
    """Columns of which no row has a figure are left out; the papers' own figures stand beside ours."""
    rows = [*plan.rows, plan.total]
    columns = [[head, *map(cell, rows)] for head, cell in _COLUMNS]
    columns.append(["papers: h", *(_papers_hours(row, stages_are_the_papers) for row in rows)])
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for number in range(len(rows) + 1):
        cells = [column[number] for column in columns]
        aligned = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([*lines[:1], "-" * max(map(len, lines)), *lines[1:]])


def papers_line() -> str:
    low, high = PUBLISHED_DOLLARS
    each = " to ".join(f"${price:.3f}" for price in PUBLISHED_PRICES)
    return (
        f"The papers (HDM report, section 4): {PUBLISHED_HOURS} h and ${low}-{high} on {PUBLISHED_GPUS} x "
        f"{PUBLISHED_GPU}, {each} a GPU hour"
    )


def _papers_hours(row: Row, whole: bool) -> str:
    if row.name in PUBLISHED:
        return str(PUBLISHED[row.name].hours)
    if row.name == "total" and whole:
        low, high = PUBLISHED_DOLLARS
        return f"{PUBLISHED_HOURS}, ${low}-{high}"
    return ""


def amount(value: float | None) -> str:
    """Three digits or more."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def count(value: float | None) -> str:
    if value is None:
        return ""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.0f}"


def _scaled(value: float | None, unit: float) -> str:
    return amount(None if value is None else value / unit) if value else ""


_COLUMNS: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("stage", lambda row: row.name),
    ("images", lambda row: count(row.images)),
    ("samples", lambda row: count(row.samples)),
    ("epochs", lambda row: amount(row.epochs)),
    ("images/s", lambda row: amount(row.images_per_second)),
    ("speed is", lambda row: row.source),
    ("of peak", lambda row: "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"),
    ("hours", lambda row: amount(row.hours)),
    ("$", lambda row: amount(row.dollars)),
    ("kWh", lambda row: amount(row.kwh)),
    ("$ of it", lambda row: amount(row.energy_dollars)),
    ("pictures GB", lambda row: _scaled(row.pictures_bytes, 1e9)),
    ("checkpoints GB", lambda row: _scaled(row.checkpoints_bytes, 1e9)),
    ("read TB", lambda row: _scaled(row.read_bytes, 1e12)),
    ("MB/s", lambda row: _scaled(row.bytes_per_second, 1e6)),
)
