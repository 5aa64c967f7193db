"""ingest.py --refresh: brings posts/ up to date from metadata of Danbooru or Pixiv, and never touches pictures.

A shard is refreshed once by each metadata file. What was told by earlier files stays where a later one is silent.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pyarrow.parquet as pq

from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.ingestion.command import IngestJob
from pipeline.ingestion.post_updates import BYTES_PER_PICTURE, MetadataPart, PostShard, match_rows, update_posts
from pipeline.ingestion.raw_files import RawFiles
from pipeline.ingestion.rules import IngestRules
from pipeline.sources import recognise_metadata
from pipeline.storage.fingerprints import digest
from pipeline.storage.lease import lease
from pipeline.storage.manifest import Catalog, Footer
from pipeline.storage.run_record import write_run_record
from pipeline.storage.shards import Store

# (shards by name, work, rows, description, memory) -> the shards on which the work failed, each with the reason
MapShards = Callable[..., dict[str, str]]

# Increment when the same metadata gives other posts: all shards are then refreshed again.
CODE_VERSION: Final = "1"
_PART_ROWS = 250_000
_PART_BYTES: Final = 700 << 20  # that a part may take: its rows as Python objects, and the process
_WITHOUT_POSTS: Final = "posts/unmatched.json"  # shards without matching rows, and what they were compared with
_PARTS: Final = "posts/partial"


@dataclass(frozen=True)
class RefreshPlan:
    """What a refresh will do."""

    catalog: Catalog
    images: dict[str, Footer]
    files: RawFiles  # of metadata; they apply in the order of their paths
    sources: dict[str, str]  # by path
    unmatched: dict[str, dict[str, str]]  # shards without posts, and what they were compared with
    todo: dict[str, PostShard]
    rules: IngestRules

    @property
    def parts(self) -> dict[str, MetadataPart]:
        """Pieces of all metadata files, by name."""
        images = digest({shard: footer.digest for shard, footer in self.images.items()})
        settings = [CODE_VERSION, images, self.rules.admit, self.rules.renamed]
        return {
            part.file: part
            for path, footer in self.files.footers.items()
            for part in _parts_of(path, self.sources[path], images, digest([footer.digest, *settings])[:16])
        }

    def lines(self) -> Iterator[str]:
        """The plan for the terminal."""
        rows = sum(footer.rows for footer in self.files.footers.values())
        todo = f"{len(self.todo)} of {len(self.images)} shards to do"
        yield f"{len(self.files.footers)} metadata files, {rows:,} rows; {todo}"


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
        plan.files.manifest.save()
        parts = plan.parts if plan.todo else {}
        failed: dict[str, str] = {}
        if plan.todo:
            map_shards = map_shards or _on_ray(stack)
            matching = {name: part for name, part in parts.items() if not dataset.exists(name)}
            work = partial(match_rows, dataset=dataset.root, shards=sorted(plan.images), rules=job.rules)
            memory = _PART_BYTES + BYTES_PER_PICTURE * sum(footer.rows for footer in plan.images.values())
            if matching:
                failed = map_shards(matching, work, lambda part: part.rows, "matching", memory)
            if not failed:
                update = partial(update_posts, dataset=dataset.root)
                failed = map_shards(plan.todo, update, lambda part: part.rows, "refreshing")
        if failed:
            raise ShardsFailed(failed)
        _finish(plan, parts, started)


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
    sources = {path: _recognised(path, footer, job.source, rules) for path, footer in files.footers.items()}
    unmatched = _unmatched(dataset)
    known = unmatched | catalog.provenance("posts", images)
    plan = RefreshPlan(catalog, images, files, sources, unmatched, {}, rules)
    updates = tuple(plan.parts)
    digests = [_identity(footer, rules) for footer in files.footers.values()]
    for number, shard in enumerate(sorted(images)):
        before = known.get(shard, {})
        same = before.get("images") == images[shard].digest and before.get("code") == CODE_VERSION
        applied = before["metadata"].split() if same else []
        if set(digests) - set(applied):
            metadata = " ".join(dict.fromkeys([*applied, *digests]))
            made_from = {"code": CODE_VERSION, "images": images[shard].digest, "metadata": metadata}
            plan.todo[shard] = PostShard(
                shard=shard, number=number, rows=images[shard].rows, files=updates, made_from=made_from
            )
    return plan


def _identity(footer: Footer, rules: IngestRules) -> str:
    return digest([footer.digest, rules.admit, rules.renamed])[:16]


def _recognised(path: str, footer: Footer, source: str, rules: IngestRules) -> str:
    try:
        return recognise_metadata(list(rules.columns(footer.schema.names).values()), source)
    except ValueError as error:
        raise UsageError(f"--refresh {path} is {error}") from error


def _unmatched(dataset: Store) -> dict[str, dict[str, str]]:
    try:
        found: dict[str, dict[str, str]] = json.loads(dataset.read(_WITHOUT_POSTS))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def _parts_of(path: str, source: str, images: str, name: str) -> Iterator[MetadataPart]:
    """Runs of row groups with about _PART_ROWS rows."""
    with Store(path).open() as file:
        footer = pq.read_metadata(file)
    sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    first, rows = 0, 0
    for group, size in enumerate(sizes):
        rows += size
        if rows >= _PART_ROWS or group == len(sizes) - 1:
            yield MetadataPart(
                path=path, source=source, first_group=first, groups=group + 1 - first, rows=rows,
                file=f"{_PARTS}/{name}-{first:05d}.parquet", images=images,
            )  # fmt: skip
            first, rows = group + 1, 0


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
    unmatched = plan.unmatched | {shard: dict(part.made_from) for shard, part in plan.todo.items()}
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
