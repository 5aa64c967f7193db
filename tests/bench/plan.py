"""Seconds and requests of a plan, and of a job that has nothing to do, on a dataset of many shards on S3.

    python tests/bench/plan.py [--shards 40000] [--latency 0.03]

The S3 server is a stub in this process that answers each request after the latency. The shards are small parquet files
with provenance of their own, and the manifests are those that a job writes. Each job runs as a process, so its seconds
include Python's start. The last row reads the footers of a twentieth of the images without a manifest.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from s3_stub import StubS3

from pipeline.core.records import CAPTIONS, IMAGES, JUDGED, REJECTED, SELECTION
from pipeline.curation.copies import search_digest
from pipeline.curation.plan import CurationInputs, read_inputs, rule_work, selection_work
from pipeline.curation.quality import PRESETS, QualityTable, posts_of
from pipeline.curation.selection import Curation
from pipeline.curation.stage_rules import stage_rules, tag_rules, with_lists
from pipeline.ingestion.preflight import plan_shards
from pipeline.ingestion.rules import IngestRules
from pipeline.storage.manifest import NAME, Catalog, Manifest, _Entry
from pipeline.storage.shards import Store

ROOT = Path(__file__).parents[2]
RAW, DATASET, STAGE = "s3://bench/raw", "s3://bench/dataset", "512"
POST: dict[str, Any] = {
    "id": "danbooru:1", "source": "danbooru", "image": b"", "format": "PNG", "width": 600, "height": 600,
    "sha256": "0" * 64, "phash": 0, "rating": "general", "score": 5, "favourites": 5, "page": 0,
    **{f"tags_{kind}": ["star"] for kind in ("artist", "character", "copyright", "general", "meta")},
}  # fmt: skip


class Files:
    """Writes many files that differ only in their metadata, without making each of them."""

    def __init__(self, server: StubS3) -> None:
        self.server = server

    def add(self, table: pa.Table, named: Mapping[str, Mapping[str, str]]) -> None:
        """Files by full path with the metadata of each; their values have the same lengths."""
        first = next(iter(named.values()))
        buffer = io.BytesIO()
        schema = table.schema.with_metadata(
            (table.schema.metadata or {}) | {key.encode(): value.encode() for key, value in first.items()}
        )
        with pq.ParquetWriter(buffer, schema) as writer:
            writer.write(table.cast(schema))
        template = buffer.getvalue()
        for path, metadata in named.items():
            assert all(len(value) == len(first[key]) for key, value in metadata.items()), path
            etag = hashlib.md5(path.encode()).hexdigest()
            content = partial(_rendered, template, first, metadata)
            self.server.add(path.removeprefix("s3://"), content, len(template), etag)

    @contextmanager
    def read_directly(self) -> Iterator[None]:
        """Inside the block, footers are read from memory, and rows have no reasons: making the manifests is fast."""

        def tail(store: Store, name: str, size: int) -> bytes:
            found = self.server.objects.get(store.path(name).removeprefix("s3://"))
            if found is None:
                raise FileNotFoundError(name)
            return (found if isinstance(found, bytes) else found())[-size:]

        def count(manifest: Manifest, name: str) -> _Entry:
            return manifest._entries[name]._replace(reasons={})

        before = Store.tail, Manifest._count
        Store.tail, Manifest._count = tail, count  # type: ignore[method-assign]
        try:
            yield
        finally:
            Store.tail, Manifest._count = before  # type: ignore[method-assign]


def _rendered(template: bytes, first: Mapping[str, str], metadata: Mapping[str, str]) -> bytes:
    for key, value in metadata.items():
        template = template.replace(first[key].encode(), value.encode())
    return template


def table(schema: pa.Schema, *rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema)


def add_dataset(server: StubS3, shards: int) -> None:
    """Raw files, images, captions and a selection that are complete, and the manifests of all folders."""
    files, dataset = Files(server), Store(DATASET)
    with files.read_directly():
        columns = {"id": [1, 2], "image": [b"", b""], "tag_string_general": ["star"] * 2, "rating": ["g"] * 2}
        raw = pa.table(columns)
        files.add(raw, {f"{RAW}/train/{number:05d}.parquet": {"number": f"{number:05d}"} for number in range(shards)})
        rules = IngestRules()
        plan = plan_shards([RAW], "auto", None, dataset, rules)
        made = {
            name: {
                "raw": part.path, "footer": part.digest, "stamp": part.stamp, "settings": rules.settings(part),
                "fingerprint": rules.fingerprint(part),
            }
            for name, part in plan.shards.items()
        }  # fmt: skip
        plan.save()
        dataset.write("dataset.json", b'{"schema_version": 1}')
        images = table(IMAGES, POST, POST | {"id": "danbooru:2"})
        files.add(images, {f"{DATASET}/images/{name}.parquet": metadata for name, metadata in made.items()})
        files.add(table(REJECTED), {f"{DATASET}/rejected/{name}.parquet": {} for name in made})
        digests = {name: footer.digest for name, footer in Catalog(dataset).images().items()}
        captions = table(
            CAPTIONS, *({"id": f"danbooru:{n}", "engine": "", "model": "", "prompt_version": ""} for n in (1, 2))
        )
        _add(files, captions, "captions", {name: json.dumps({"images": found}) for name, found in digests.items()})
        add_selection(files, images, dataset)
        save_manifests(dataset)


def add_selection(files: Files, images: pa.Table, dataset: Store) -> None:
    rules, folder = with_lists(stage_rules(STAGE, None, None)), f"selections/{STAGE}"
    inputs: CurationInputs = read_inputs(dataset, rules)
    quality = QualityTable.compute(PRESETS[rules.preset], posts_of(pa.concat_tables([images] * 500)))
    preset = {"name": rules.preset, **json.loads(json.dumps(asdict(PRESETS[rules.preset])))}
    record = {"preset": preset, "rows": inputs.rows} | json.loads(quality.to_json())
    dataset.write(f"{folder}/quality.json", json.dumps(record).encode())
    curation = Curation(dataset.root, STAGE, rules, tag_rules(rules), quality)
    judging = rule_work(curation, inputs)
    provenance = {name: part.provenance for name, part in judging.items()}
    dataset.write(f"{folder}/copies.json", json.dumps({"made_from": search_digest(provenance), "shards": {}}).encode())
    writing = selection_work(judging, inputs, judging, {})
    _add(
        files, table(JUDGED, {}, {}), f"{folder}/judged", {name: w.metadata["made_from"] for name, w in judging.items()}
    )
    made = {name: part.metadata["made_from"] for name, part in writing.items()}
    _add(files, table(REJECTED), f"{folder}/rejected", made)
    selected = {"id": "danbooru:1", "row": 0, **{kind: [] for kind in SELECTION.names[2:8]}}
    _add(files, table(SELECTION, selected, selected | {"row": 1}), folder, made, digest="0" * 64)


def _add(files: Files, rows: pa.Table, folder: str, made_from: Mapping[str, str], **more: str) -> None:
    files.add(
        rows, {f"{DATASET}/{folder}/{name}.parquet": {"made_from": made} | more for name, made in made_from.items()}
    )


def save_manifests(dataset: Store) -> None:
    catalog, folder = Catalog(dataset), f"selections/{STAGE}"
    for name in ("images", f"{folder}/judged", folder):
        catalog.footers(name, catalog.shards(name))
    for name in ("captions", "rejected", f"{folder}/rejected"):
        catalog.reasons(name, catalog.shards(name))
    catalog.save()


def job(server: StubS3, script: str, *arguments: str) -> tuple[float, str]:
    """Seconds of a job, and its requests by kind."""
    server.requests.clear()
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "pipeline" / script), "--dataset", DATASET, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    seconds = time.monotonic() - started
    if finished.returncode or not re.search(r"\b0 to do|\b0 of \d+ shards|already captioned", finished.stdout):
        raise SystemExit(f"{script} {arguments}: {finished.stdout[-2000:]}{finished.stderr[-2000:]}")
    print(finished.stdout, file=sys.stderr, flush=True)
    return seconds, ", ".join(f"{count} {kind}" for kind, count in sorted(server.requests.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40_000)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before each answer of S3")
    args = parser.parse_args()
    server = StubS3(latency=0)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    add_dataset(server, args.shards)
    server.latency = args.latency
    where = f"{args.shards:,} shards on S3, {1000 * args.latency:.0f} ms"
    for title, script, arguments in (
        ("plan of ingest", "ingest.py", ("--raw", RAW, "--plan")),
        ("plan of curate", "curate.py", ("--stage", STAGE, "--plan")),
        ("ingest, nothing to do", "ingest.py", ("--raw", RAW)),
        ("caption, nothing to do", "caption.py", ("--engine", "tags")),
        ("curate, nothing to do", "curate.py", ("--stage", STAGE)),
    ):
        seconds, requests = job(server, script, *arguments)
        print(f"| {title}, {where} | {seconds:.1f} s ({requests}) |", flush=True)
    dataset = Store(DATASET)
    some = Catalog(dataset).shards("images")[:: max(1, args.shards // 2000)]
    manifest = Manifest(dataset, "nothing", lambda name: dataset.path(f"images/{name}"))
    manifest.update({name: info for name, info in dataset.files("images").items() if name != NAME})
    started = time.monotonic()
    manifest.footers([f"{shard}.parquet" for shard in some])
    rate = len(some) / (time.monotonic() - started)
    print(f"| footers per second without a manifest, {1000 * args.latency:.0f} ms | {rate:.0f} |", flush=True)


if __name__ == "__main__":
    main()
