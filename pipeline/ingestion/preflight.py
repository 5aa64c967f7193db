"""The plan of an ingest, made before any work from the footers of all raw files and from what is finished.

Does not import Ray. On an unchanged dataset it costs two listings, whatever the number of files: see
pipeline/storage/manifest.py.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UsageError
from pipeline.ingestion.raw_files import RawFiles, name_shards
from pipeline.ingestion.repeated_ids import RawIds
from pipeline.ingestion.rules import IngestRules, RawShard, tier_folder
from pipeline.storage.manifest import Catalog
from pipeline.storage.shards import Store


@dataclass(frozen=True)
class IngestPlan:
    """What an ingest will do. Shards in neither `todo` nor `tiers` are finished."""

    shards: dict[str, RawShard]  # by name
    unreadable: dict[str, str]  # raw files that are not complete parquet files, and what is wrong with each
    todo: dict[str, str]  # shards to ingest (with their smaller tier, if any), and why
    tiers: dict[str, str]  # shards whose images are finished but whose smaller tier is not, and why
    repeated: int | None  # rows that have the id of an earlier row; None: not counted
    example: str  # one such id and its files, or ""
    moved: int  # raw files that were ingested under another path
    raw: RawFiles
    ids: RawIds | None
    catalog: Catalog

    def save(self) -> None:
        """Writes the caches that make the next plan fast."""
        self.raw.save()
        self.catalog.save()
        if self.ids:
            self.ids.save()

    def lines(self, dataset: Store) -> Iterator[str]:
        """The plan for the terminal."""
        yield from self.raw.lines()
        parts = self.shards.values()
        yield f"{len(parts)} raw shards, {sum(raw.rows for raw in parts):,} rows, {_size(sum(map(_bytes, parts)))}"
        for layout, count in sorted(Counter(raw.layout for raw in parts).items()):
            yield f"  {count} x {layout}"
        yield from (f"  {line}" for line in self.raw.profiles.described())
        if parts:
            largest = max(parts, key=lambda raw: raw.largest_group)
            yield f"  largest row group: {_size(largest.largest_group)}, in {largest.path}"
        if self.repeated:
            yield f"  {self.repeated:,} rows repeat an id, for example {self.example}; one row per id is kept"
        elif self.repeated == 0:
            yield "  no row repeats an id"
        if self.moved:
            yield f"  {self.moved} raw files were ingested from other paths before; their shards are kept"
        for path, why in sorted(self.unreadable.items()):
            yield f"  unreadable, skipped: {path} ({why})"
        tiers = f", {len(self.tiers)} smaller tiers to do" if self.tiers else ""
        finished = len(parts) - len(self.todo)
        yield f"  {finished} of them finished before, {len(self.todo)} to do{tiers}{self._disk_space(dataset)}"
        for why, count in sorted(Counter([*self.todo.values(), *self.tiers.values()]).items()):
            yield f"    {count} x {why}"

    def _disk_space(self, dataset: Store) -> str:
        if dataset.is_remote or not self.todo:
            return ""
        folder = next(path for path in (Path(dataset.root), *Path(dataset.root).parents) if path.exists())
        needed = sum(_bytes(self.shards[name]) for name in self.todo)
        return f", about {_size(needed)} to write, {_size(shutil.disk_usage(folder).free)} free"


def plan_shards(
    paths: list[str],
    source: str,
    rows_per_shard: int | None,
    dataset: Store,
    rules: IngestRules,
    check_ids: bool = False,
) -> IngestPlan:
    """Compares the raw files at these paths, whose footers say what they hold, with the dataset.

    `check_ids` also counts the rows that repeat an id, for which the ids of all raw files are read. Raises UsageError
    for a path without raw files, for files of an unknown layout, and as `name_shards`.
    """
    catalog = Catalog(dataset)
    with ThreadPoolExecutor(1) as other:
        listed = other.submit(catalog.refresh, "images")
        raw = RawFiles(paths, dataset)
        listed.result()
    files = list(raw.shards(source, rules))
    for pair in rules.renamed:
        if not any(pair in file.renamed for file in files):
            raise UsageError(f"--map {'='.join(pair)}: no file has a column {pair[0]!r}. Correct or remove it.")
    images = catalog.footers("images", catalog.shards("images"))
    shards, moved = name_shards(files, images, rows_per_shard)
    todo, tiers = _unfinished(shards, catalog, rules)
    ids = RawIds(dataset) if check_ids else None
    repeated, example = ids.repeated(files, rules) if ids else (None, "")
    return IngestPlan(shards, raw.unreadable, todo, tiers, repeated, example, moved, raw, ids, catalog)


def _unfinished(
    shards: Mapping[str, RawShard], catalog: Catalog, rules: IngestRules
) -> tuple[dict[str, str], dict[str, str]]:
    """Shards to ingest, and shards that need only their smaller tier, each with the reason."""
    images = catalog.footers("images", shards)
    todo = dict.fromkeys(shards.keys() - images.keys(), "new")
    for name, footer in images.items():
        raw, made = shards[name], footer.metadata
        is_changed = made.get("footer") != raw.digest or (made["raw"] == raw.path and made.get("stamp") != raw.stamp)
        if is_changed:
            todo[name] = "the raw file has changed"
        elif made.get("fingerprint") != rules.fingerprint(raw):
            todo[name] = _changed_settings(made.get("settings", "{}"), rules.settings(raw))
    if rules.downsize is None:
        return todo, {}
    folder = tier_folder(rules.downsize)
    tier = catalog.footers(folder, images)
    is_made = {name: footer.metadata.get("fingerprint") for name, footer in tier.items()}
    stale = [name for name in images if is_made.get(name) != rules.tier_fingerprint(shards[name])]
    return todo, {name: f"{folder} from images" for name in stale if name not in todo}


def _changed_settings(before: str, now: str) -> str:
    """Describes the differences between the settings of a finished shard and the current ones (both JSON)."""
    old, new = json.loads(before), json.loads(now)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    changed = ", ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)
    return f"made with other settings: {changed or 'another version of ingest'}"


def _bytes(raw: RawShard) -> int:
    return raw.rows * raw.row_bytes


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
