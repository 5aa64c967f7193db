"""ingest.py --refresh: brings posts/ up to date from metadata of Danbooru or Pixiv, and never touches pictures.

A shard is refreshed once by each metadata file: a file that was applied to it before is left out, so that what later
files told stays. Of files that are given together, the last one by path counts; where it is silent, the one before it.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import pyarrow.parquet as pq

from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.ingestion.command import IngestJob
from pipeline.ingestion.post_updates import (
    BYTES_PER_PICTURE,
    MetadataPart,
    PostShard,
    UpdateRange,
    gather_updates,
    match_rows,
    update_posts,
)
from pipeline.ingestion.raw_files import RawFiles, ReadAs
from pipeline.ingestion.rules import IngestRules
from pipeline.sources import recognise_metadata
from pipeline.sources.reading import Reading
from pipeline.storage.fingerprints import digest
from pipeline.storage.lease import lease
from pipeline.storage.manifest import Catalog, Footer
from pipeline.storage.run_record import write_run_record
from pipeline.storage.shards import Store

# (shards by name, work, rows, description, memory) -> the shards on which the work failed, each with the reason
MapShards = Callable[..., dict[str, str]]

# Increment when the same metadata gives other posts: all shards are then refreshed again.
CODE_VERSION: Final = "2"
_PART_ROWS = 250_000
_RANGE_ROWS = 100_000  # pictures whose updates are gathered in one file
_PART_BYTES: Final = 700 << 20  # that a part or a range may take: its rows as Python objects, and the process
_WITHOUT_POSTS: Final = "posts/unmatched.json"  # shards without matching rows, and what they were compared with
_PARTS: Final = "posts/partial"


@dataclass(frozen=True, kw_only=True)
class StalePosts:
    """Posts to which some metadata files have not been applied."""

    number: int  # of the image shard
    rows: int
    files: tuple[str, ...]  # paths, in the order in which they apply
    made_from: Mapping[str, str]  # once they are applied


@dataclass(frozen=True)
class RefreshPlan:
    """What a refresh will do."""

    catalog: Catalog
    images: dict[str, Footer]
    files: RawFiles  # of metadata; they apply in the order of their paths
    read_as: dict[str, ReadAs]  # by path
    unmatched: dict[str, dict[str, str]]  # shards without posts, and what they were compared with
    todo: dict[str, StalePosts]
    rules: IngestRules

    def parts(self) -> dict[str, MetadataPart]:
        """Pieces of the metadata files that some shard lacks, by name. Opens these files."""
        images = digest({shard: footer.digest for shard, footer in self.images.items()})
        settings = [CODE_VERSION, images]
        lacking = {path for stale in self.todo.values() for path in stale.files}
        return {
            part.file: part
            for path, footer in self.files.footers.items()
            if path in lacking
            for part in _parts_of(
                path,
                self.read_as[path],
                images,
                digest([_identity(footer, self.read_as[path].reading, self.rules), *settings])[:16],
            )
        }

    def lines(self) -> Iterator[str]:
        """The plan for the terminal."""
        rows = sum(footer.rows for footer in self.files.footers.values())
        todo = f"{len(self.todo)} of {len(self.images)} shards to do"
        yield f"{len(self.files.footers)} metadata files, {rows:,} rows; {todo}"
        yield from self.files.profiles.described()


def run_refresh(job: IngestJob, map_shards: MapShards | None = None) -> None:
    """Updates posts/ and prints the number of rows that were matched, changed, deleted and not found.

    `map_shards` is by default that of core.dataflow: Ray starts with the first work. Raises UsageError if the dataset
    has no images or a file is no metadata, ShardsFailed if files could not be read or written.
    """
    dataset = Store(job.dataset)
    if job.plan:
        _print(plan_refresh(job, dataset).lines())
        return
    with lease(dataset, "posts", "ingest.py --refresh"), ExitStack() as stack:
        started = time.time()
        plan = plan_refresh(job, dataset)
        _print(plan.lines())
        plan.files.save()
        parts = plan.parts() if plan.todo else {}
        failed = _run_passes(plan, parts, job.rules, map_shards or _on_ray(stack)) if plan.todo else {}
        if failed:
            raise ShardsFailed(failed)
        _finish(plan, parts, started)


def _run_passes(
    plan: RefreshPlan, parts: Mapping[str, MetadataPart], rules: IngestRules, map_shards: MapShards
) -> dict[str, str]:
    """Runs the three passes, each over what an earlier run has not done. Returns what failed in the first pass that had
    failures: the next one needs all files of the one before."""
    dataset = plan.catalog.dataset
    ranges, posts = _ranges(plan.todo, parts)
    written = {f"{_PARTS}/{name}.parquet" for name in dataset.shards(_PARTS)}
    match = partial(match_rows, dataset=dataset.root, shards=sorted(plan.images), rules=rules)
    pictures = sum(footer.rows for footer in plan.images.values())
    passes: list[tuple[str, Mapping[str, Any], Callable[..., Any], int]] = [
        ("matching", parts, match, _PART_BYTES + BYTES_PER_PICTURE * pictures),
        ("gathering", ranges, partial(gather_updates, dataset=dataset.root), _PART_BYTES),
        ("refreshing", posts, partial(update_posts, dataset=dataset.root), 0),
    ]
    for description, items, work, memory in passes:
        missing = {name: item for name, item in items.items() if name not in written}
        if missing and (failed := map_shards(missing, work, lambda item: item.rows, description, memory)):
            return failed
    return {}


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        print(f"refresh: {line}", flush=True)


def plan_refresh(job: IngestJob, dataset: Store) -> RefreshPlan:
    """Compares metadata files with what posts/ was made from. Raises UsageError as `run_refresh` does."""
    rules = job.rules
    catalog = Catalog(dataset)
    catalog.refresh("images", "posts")
    images = catalog.images()
    files = RawFiles(job.refresh, dataset)
    if files.unreadable:
        path, why = min(files.unreadable.items())
        raise UsageError(f"{path} is no complete parquet file ({why}); remove it from --refresh or fetch it again")
    read_as = files.read_as(lambda _, fields: recognise_metadata(fields, job.source), rules)
    unmatched = _unmatched(dataset)
    known = unmatched | catalog.provenance("posts", images)
    plan = RefreshPlan(catalog, images, files, read_as, unmatched, {}, rules)
    digests = {path: _identity(footer, read_as[path].reading, rules) for path, footer in files.footers.items()}
    for number, shard in enumerate(sorted(images)):
        before = known.get(shard, {})
        same = before.get("images") == images[shard].digest and before.get("code") == CODE_VERSION
        applied = before["metadata"].split() if same else []
        if lacking := tuple(path for path, identity in digests.items() if identity not in applied):
            metadata = " ".join(dict.fromkeys([*applied, *(digests[path] for path in lacking)]))
            made_from = {"code": CODE_VERSION, "images": images[shard].digest, "metadata": metadata}
            plan.todo[shard] = StalePosts(number=number, rows=images[shard].rows, files=lacking, made_from=made_from)
    return plan


def _identity(footer: Footer, reading: Reading, rules: IngestRules) -> str:
    return digest([footer.digest, rules.admit, rules.renamed, asdict(reading)])[:16]


def _unmatched(dataset: Store) -> dict[str, dict[str, str]]:
    try:
        found: dict[str, dict[str, str]] = json.loads(dataset.read(_WITHOUT_POSTS))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def _parts_of(path: str, read_as: ReadAs, images: str, name: str) -> Iterator[MetadataPart]:
    """Runs of row groups with about _PART_ROWS rows."""
    with Store(path).open() as file:
        footer = pq.read_metadata(file)
    sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    for first, end in _runs(sizes, _PART_ROWS):
        yield MetadataPart(
            path=path, source=read_as.source, reading=read_as.reading,
            first_group=first, groups=end - first, rows=sum(sizes[first:end]),
            file=f"{_PARTS}/{name}-{first:05d}.parquet", images=images,
        )  # fmt: skip


def _ranges(
    todo: Mapping[str, StalePosts], parts: Mapping[str, MetadataPart]
) -> tuple[dict[str, UpdateRange], dict[str, PostShard]]:
    """Ranges of shards that lack the same files, by the name of their file, and the shards, which read these."""
    by_files: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for shard in sorted(todo):
        by_files[todo[shard].files].append(shard)
    ranges: dict[str, UpdateRange] = {}
    posts: dict[str, PostShard] = {}
    for files, shards in by_files.items():
        names = tuple(part.file for part in parts.values() if part.path in files)
        for start, end in _runs([todo[shard].rows for shard in shards], _RANGE_ROWS):
            here = {shard: todo[shard] for shard in shards[start:end]}
            first, last = here[shards[start]].number, here[shards[end - 1]].number
            file = f"{_PARTS}/shards-{digest([names, first, last])[:16]}.parquet"
            rows = sum(stale.rows for stale in here.values())
            ranges[file] = UpdateRange(first=first, last=last, rows=rows, parts=names, file=file)
            posts |= {
                shard: PostShard(
                    shard=shard, number=stale.number, rows=stale.rows, updates=file, made_from=stale.made_from
                )
                for shard, stale in here.items()
            }
    return ranges, posts


def _runs(sizes: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
    """Start and end of runs of items, each of which but the last has at least this many rows."""
    start, found = 0, 0
    for end, size in enumerate(sizes, start=1):
        found += size
        if found >= rows or end == len(sizes):
            yield start, end
            start, found = end, 0


def _on_ray(stack: ExitStack) -> MapShards:
    from pipeline.core.cluster import cluster  # Ray takes seconds to import
    from pipeline.core.dataflow import map_shards

    stack.enter_context(cluster("ingest"))
    return map_shards


def _finish(plan: RefreshPlan, parts: Mapping[str, MetadataPart], started: float) -> None:
    """Writes the records, removes what is no longer needed, and reports."""
    catalog = plan.catalog
    dataset = catalog.dataset
    catalog.refresh("posts")
    posts = catalog.footers("posts", plan.images)
    unmatched = plan.unmatched | {shard: dict(stale.made_from) for shard, stale in plan.todo.items()}
    unmatched = {shard: made for shard, made in unmatched.items() if shard in plan.images and shard not in posts}
    if unmatched != plan.unmatched:
        dataset.write(_WITHOUT_POSTS, json.dumps(unmatched).encode())
    catalog.save()
    if not plan.todo:
        print(f"refresh: posts/ is up to date with {len(plan.files.footers)} metadata files", flush=True)
        return
    outcomes = _sum(dataset.metadata(name) for name in parts)
    pictures = _sum(posts[shard].metadata for shard in plan.todo if shard in posts)
    matched = outcomes.pop("matched", 0)
    write_run_record(
        dataset.path("posts"), "refresh", started, matched + outcomes.total(), matched,
        {reason: count for reason, count in outcomes.items() if count}, pictures=dict(pictures),
    )  # fmt: skip
    print(
        f"refresh: {pictures['matched']} pictures matched, {pictures['changed']} of them changed, "
        f"{pictures['deleted']} deleted; {outcomes['not in the dataset']} rows of the files were not found in images/",
        flush=True,
    )
    for name in dataset.shards(_PARTS):
        dataset.remove(f"{_PARTS}/{name}.parquet")


def _sum(metadata: Iterator[Mapping[str, Any]]) -> Counter[str]:
    return sum((Counter(json.loads(found["counts"])) for found in metadata), Counter[str]())
