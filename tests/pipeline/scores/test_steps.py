"""The score pipeline on Ray: a picture that kills its process costs one row, and actors are planned to fit."""

import ctypes
import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ray import cloudpickle

from pipeline.core.errors import UsageError
from pipeline.core.records import IMAGES
from pipeline.core.tables import DIED
from pipeline.pictures.preprocessing import Preprocessing
from pipeline.scores import steps
from pipeline.scores.scoring import SCORED, plan_scores, prepare_rows
from pipeline.scores.steps import ClassifierModel, Classifiers, plan_classifiers, score_shards
from pipeline.storage.manifest import Catalog
from pipeline.storage.shards import Store

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import a test module

ROWS = 20
POISON = 7  # row of the second shard


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 60, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(dataset: Store) -> None:
    tags: dict[str, Any] = {name: [] for name in IMAGES.names if name.startswith("tags_")}
    for shard, first in (("a", 0), ("b", 100)):
        rows = [
            {"id": f"danbooru:{n}", "source": "danbooru", "image": png(n), "format": "PNG", "width": 60, "height": 60,
             "sha256": f"{n:064x}", "phash": n, "page": 0, **tags}
            for n in range(first, first + ROWS)
        ]  # fmt: skip
        dataset.write_table(f"images/{shard}.parquet", pa.Table.from_pylist(rows, IMAGES), IMAGES)


def faulty_decoder(table: pa.Table, poison: bytes, **options: Any) -> Iterator[pa.Table]:
    """prepare_rows with a decoder that reads from address 0 when it meets one picture: a real segmentation fault."""
    for row in table.select(["image", DIED]).to_pylist():
        if row["image"] == poison and not row[DIED]:
            ctypes.string_at(0)
    yield from prepare_rows(table, **options)


def brightness(folder: Path, *_: Any, **__: Any) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """A classifier whose process is killed once, when it has scored some rows."""

    def classify(table: pa.Table) -> Iterator[pa.Table]:
        if not (folder / "killed").exists() and (folder / "scored").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "scored").touch()
        scores = [data and [float(np.frombuffer(data, np.uint8).mean())] for data in table["pixels"].to_pylist()]
        yield table.append_column("scores", pa.array(scores, SCORED.field("scores").type)).select(SCORED.names)

    return classify


def test_a_picture_that_kills_its_process_is_rejected_alone_and_an_actor_that_dies_costs_nothing(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    dataset = Store(str(tmp_path / "dataset"))
    write_images(dataset)
    plan = plan_scores(Catalog(dataset).images(), "digest", "{}")
    preprocessing = Preprocessing(resize=(8, 8), resample=int(Image.Resampling.BILINEAR))
    model = ClassifierModel(
        folder="none", digest="digest", labels=("light",), preprocessing=preprocessing, batch_size=4
    )
    monkeypatch.setattr(steps, "prepare_rows", partial(faulty_decoder, poison=png(100 + POISON)))
    monkeypatch.setattr(steps, "loading", partial(brightness, tmp_path))
    # Without it the actors of one pass were freed at any time, or never, and the next pass waited for their CPUs.
    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    assert score_shards(plan, dataset, "scores/light", model, plan_classifiers(None, 2 * ROWS, 4, False)) == {}
    assert (tmp_path / "killed").exists()
    for shard, first in (("a", 0), ("b", 100)):
        table = dataset.read_table(f"scores/light/{shard}.parquet")
        assert table["id"].to_pylist() == [f"danbooru:{n}" for n in range(first, first + ROWS)]
        expected = [
            float(preprocessing.resized(Image.open(io.BytesIO(png(n)))).mean()) for n in range(first, first + ROWS)
        ]
        died = [POISON] if shard == "b" else []
        rows = [row for row in range(ROWS) if row not in died]
        found = table["light"].to_pylist()
        assert [found[row] for row in rows] == pytest.approx([expected[row] for row in rows])
        assert [found[row] for row in died] == [None] * len(died)
        refused = dataset.read_table(f"scores/light/rejected/{shard}.parquet").to_pylist()
        assert [(row["key"], row["reason"]) for row in refused] == [
            (f"danbooru:{first + row}", "decoder died") for row in died
        ]
    assert dataset.folders("scores/light/partial") == [], "partial files are removed"


def test_rows_in_partial_files_are_not_scored_again(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Store(str(tmp_path / "dataset"))
    write_images(dataset)
    plan = plan_scores(Catalog(dataset).images(), "digest", "{}")
    done = [row for row in range(ROWS) if row not in (2, 13)]
    table = pa.table({"id": [f"danbooru:{100 + row}" for row in done], "scores": [[0.5]] * len(done)})
    parts = steps.partial_shard(plan["b"], dataset.root, "scores/light")
    typed = table.cast(pa.schema([SCORED.field("id"), SCORED.field("scores")]))
    parts.write("scores", np.array(done, np.int32), typed)
    (tmp_path / "killed").touch()
    monkeypatch.setattr(steps, "loading", partial(brightness, tmp_path))
    preprocessing = Preprocessing(resize=(8, 8), resample=int(Image.Resampling.BILINEAR))
    model = ClassifierModel(
        folder="none", digest="digest", labels=("light",), preprocessing=preprocessing, batch_size=4
    )
    only_b = {"b": plan["b"]}
    assert score_shards(only_b, dataset, "scores/light", model, Classifiers(most=1, gpus=0)) == {}
    found = dataset.read_table("scores/light/b.parquet")["light"].to_pylist()
    assert [row for row, score in enumerate(found) if score != 0.5] == [2, 13]


def test_actors_leave_cpus_to_the_decoder_and_more_than_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(asked: int | None, nodes: list[dict[str, float]], rows: int = 10_000, gpus: bool = False) -> Classifiers:
        monkeypatch.setattr(steps, "living_nodes", lambda: nodes)
        return plan_classifiers(asked, rows, 32, gpus)

    two, home = [{"CPU": 2.0}], [{"CPU": 16.0, "GPU": 1.0}]
    cluster = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 2.0, "GPU": 4.0}, {"CPU": 8.0}]
    assert plan(None, two) == Classifiers(most=1, gpus=0)
    assert plan(None, home) == Classifiers(most=12, gpus=0)
    assert plan(None, home, gpus=True) == Classifiers(most=1, gpus=1)
    assert plan(None, cluster, gpus=True) == Classifiers(most=6, gpus=1)
    assert plan(None, [{"CPU": 2.0, "GPU": 4.0}], gpus=True) == Classifiers(most=1, gpus=1), "one CPU decodes"
    assert plan(3, cluster, gpus=True) == Classifiers(most=3, gpus=1)
    assert plan(15, home) == Classifiers(most=15, gpus=0)
    assert plan(None, home, rows=40) == Classifiers(most=2, gpus=0), "one per batch"
    assert plan(None, two, rows=0) == Classifiers(most=1, gpus=0)
    with pytest.raises(UsageError, match=r"2 actors do not fit, each of which takes a CPU beside .* has room for 1"):
        plan(2, two)
    with pytest.raises(UsageError, match=r"7 actors do not fit, each of which takes a GPU and a CPU beside .* for 6"):
        plan(7, cluster, gpus=True)
