"""Explains why a picture is in a selection or not: each rule with the value of the picture. Needs no Ray."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.errors import UsageError
from pipeline.curation.admission import checks, rule_columns
from pipeline.curation.command import curate_command
from pipeline.curation.quality import POST_COLUMNS, QualityTable
from pipeline.curation.selection import Curation, read_scores
from pipeline.storage.posts import read_images
from pipeline.storage.shards import Store
from pipeline.tagging.tags import TagReader


def explain(curation: Curation, shards: list[str], ids: list[str]) -> Iterator[str]:
    """Lines about each of these ids, by the rules of `curation`.

    Raises UsageError, after all lines, if the dataset does not have some of the ids.
    """
    store = Store(curation.dataset)
    images = _places(store, "images", "id", shards, ids)
    rejected = _places(store, "rejected", "key", store.shards("rejected"), ids)
    for name in ids:
        for shard, row in rejected[name]:
            refused = store.read_table(f"rejected/{shard}.parquet", ["reason", "detail"]).slice(row, 1).to_pylist()[0]
            yield f"{name} of {shard}: refused by ingest: {refused['reason']} ({refused['detail']})"
        for shard, row in images[name]:
            yield from _explained(store, curation, name, shard, row)
    if unknown := [name for name in ids if not images[name] and not rejected[name]]:
        raise UsageError(
            f"{store.root} knows no picture {', '.join(unknown)}; ids look like danbooru:1009 or pixiv:5_p0"
        )


def _places(
    store: Store, folder: str, column: str, shards: list[str], ids: list[str]
) -> dict[str, list[tuple[str, int]]]:
    """Every (shard, row) of each id."""
    wanted = pa.array(ids, pa.string())

    def find(shard: str) -> list[tuple[str, str, int]]:
        names = store.read_table(f"{folder}/{shard}.parquet", [column])[column]
        rows = np.flatnonzero(pc.is_in(names, wanted).to_numpy())
        return [(names[row].as_py(), shard, row) for row in rows.tolist()]

    places: dict[str, list[tuple[str, int]]] = {name: [] for name in ids}
    with ThreadPoolExecutor(8) as readers:
        for found in readers.map(find, shards):
            for name, shard, row in found:
                places[name].append((shard, row))
    return places


def _explained(store: Store, curation: Curation, name: str, shard: str, row: int) -> Iterator[str]:
    images = read_images(store, shard, rule_columns(curation.rules))
    scores = read_scores(store, shard, images["id"], curation.rules)
    image, own = images.slice(row, 1), {label: values[row : row + 1] for label, values in scores.items()}
    results = list(checks(image, own, curation.rules, curation.quality, TagReader(curation.tags)))
    yield f"{name}, row {row} of {shard}, by the rules of {curation.name}:"
    for check in results:
        yield f"  {'refuses' if check.refused_N[0] else 'admits':8}{check.rule}: {check.value(0)}"
        if check.rule == "quality":
            yield f"          {_borders(curation.quality, image)}"
    refusals = [check.refusal(0) for check in results if check.refused_N[0]]
    yield f"  {f'out: {_reason(*refusals[0])}' if refusals else _outcome(store, curation, name, shard, row)}"


def _borders(quality: QualityTable, image: pa.Table) -> str:
    """The cell that the picture is compared with, and its borders."""
    [post] = image.select(POST_COLUMNS).to_pylist()
    cell = quality.cell_of(post["source"], post["rating"], post["created_at"] and post["created_at"].year)
    favourites = "unknown" if post["favourites"] is None else post["favourites"]
    if cell is None:
        return f"favourites {favourites}; {post['source']} has no borders"
    among = ", ".join(str(part) for part in cell if part is not None)
    *words, last = quality.words
    borders = ", ".join(f"{word} > {border:g}" for word, border in zip(words, quality.borders[cell], strict=True))
    settled = f"; posts from {quality.settled_before} on get no word" if quality.settled_before is not None else ""
    return f"favourites {favourites} among {among}: {borders}, else {last}{settled}"


def _outcome(store: Store, curation: Curation, name: str, shard: str, row: int) -> str:
    """What became of a row that the rules admit, according to the selection on disk."""
    folder, selected = curation.folder, f"{curation.folder}/{shard}.parquet"
    if not store.exists(selected):
        return f"admitted; {folder} is not made yet, so copies of the picture are not known"
    kept = store.read_table(selected, ["id", "row"])
    if pc.any(pc.and_(pc.equal(kept["id"], name), pc.equal(kept["row"], row))).as_py():
        return f"in: it is in {folder}"
    rejected = store.read_table(f"{folder}/rejected/{shard}.parquet", ["key", "reason", "detail"])
    refusals = rejected.filter(pc.equal(rejected["key"], name)).to_pylist()
    if refusals:
        listed = "; ".join(_reason(each["reason"], each["detail"]) for each in refusals)
        return f"out: in {folder} it was refused: {listed}"
    command = curate_command(store, curation.name)
    return f"admitted; {folder} does not know it: its {shard} was made from other images; run: {command}"


def _reason(reason: str, detail: str) -> str:
    return f"{reason} ({detail})" if detail else reason
