"""Images -> pixels -> scores -> partial files -> shards, in one process. The score is the brightness of a picture."""

import io
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.records import IMAGES
from pipeline.core.tables import ROW, SHARD, labelled
from pipeline.pictures.classifiers import Classifier
from pipeline.pictures.containers import RejectReason
from pipeline.pictures.decoder import Refused
from pipeline.pictures.preprocessing import Preprocessing
from pipeline.scores import scoring
from pipeline.scores.commit import commit_shard, partial_shard, write_rows
from pipeline.scores.scoring import ScoreShard, loading, plan_scores, prepare_rows, read_images
from pipeline.storage.manifest import Catalog
from pipeline.storage.shards import Store

SIDE = 8  # pixels
FOLDER = "scores/light"
PREPROCESSING = Preprocessing(resize=(SIDE, SIDE), resample=int(Image.Resampling.BILINEAR), scale=1 / 255)


def png(brightness: int, side: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (brightness,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(dataset: Store, shard: str, groups: Sequence[Sequence[bytes]]) -> ScoreShard:
    tags: dict[str, Any] = {name: [] for name in IMAGES.names if name.startswith("tags_")}
    numbers = iter(range(10_000))
    with dataset.writing_table(f"images/{shard}.parquet", IMAGES) as write:
        for group in groups:
            rows = [
                {"id": f"danbooru:{n}", "source": "danbooru", "image": data, "format": "PNG", "width": 40, "height": 40,
                 "sha256": f"{n:064x}", "phash": n, "page": 0, **tags}
                for data, n in zip(group, numbers, strict=False)
            ]  # fmt: skip
            write(pa.Table.from_pylist(rows, IMAGES))
    return plan_scores(Catalog(dataset).images(), "digest of the model", "{}")[shard]


class Light:
    """Records the size of each batch; the score is the mean of the pixels."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def forward(self, values_NHWC: NDArray[np.float32]) -> NDArray[np.float32]:
        self.batches.append(len(values_NHWC))
        return np.stack([values_NHWC.mean((1, 2, 3)), np.ones(len(values_NHWC), np.float32)], axis=1)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Light:
    """The classifier that `loading` loads from any folder."""
    light = Light()
    classifier = Classifier(
        labels=("light", "one"), preprocessing=PREPROCESSING, activation="none", forward=light.forward
    )
    monkeypatch.setattr(scoring, "digest", lambda folder: "digest of the model")
    monkeypatch.setattr(scoring, "load_classifier", lambda folder, device, threads: classifier)
    return light


@pytest.fixture
def dataset(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def numbers(*rows: int) -> NDArray[np.int32]:
    return np.array(rows, np.int32)


def score(planned: ScoreShard, dataset: Store, rows: NDArray[np.int32], died: bool = False, **options: Any) -> None:
    """All steps but the commit."""
    classify = loading("folder", "digest of the model", batch_size=2, device="cpu")
    for images in read_images(planned, rows, dataset.root):
        for prepared in prepare_rows(labelled(images, planned.shard, died), PREPROCESSING, **options):
            for scored in classify(prepared):
                for written in write_rows(scored, dataset.root, FOLDER):
                    assert written[SHARD].to_pylist() == [planned.shard] * written.num_rows
                    assert set(written[ROW].to_pylist()) <= set(rows.tolist())


def test_a_shard_has_a_score_per_picture_in_order_and_the_row_groups_of_its_images(
    dataset: Store, light: Light
) -> None:
    planned = write_images(dataset, "a", [[png(0), png(51), b"no picture"], [png(255)], []])
    score(planned, dataset, numbers(0, 3))
    score(planned, dataset, numbers(1, 2))
    outcomes = commit_shard(planned, dataset.root, FOLDER, ("light", "one"))
    assert outcomes == {"done": 3, "not an image": 1}
    assert dataset.read_table(f"{FOLDER}/a.parquet").to_pylist() == [
        {"id": "danbooru:0", "light": 0.0, "one": 1.0},
        {"id": "danbooru:1", "light": pytest.approx(0.2), "one": 1.0},
        {"id": "danbooru:2", "light": None, "one": None},
        {"id": "danbooru:3", "light": 1.0, "one": 1.0},
    ]
    with dataset.open(f"{FOLDER}/a.parquet") as file:
        footer = pa.parquet.read_metadata(file)
    assert [footer.row_group(n).num_rows for n in range(footer.num_row_groups)] == [3, 1, 0]
    assert dataset.metadata(f"{FOLDER}/a.parquet")["made_from"] == planned.made_from
    [refused] = dataset.read_table(f"{FOLDER}/rejected/a.parquet").to_pylist()
    assert (refused["key"], refused["reason"], refused["sha256"]) == ("danbooru:2", "not an image", f"{2:064x}")
    assert dataset.folders(f"{FOLDER}/partial") == [], "partial files are removed"


def test_a_picture_that_ended_its_process_is_rejected_without_being_decoded(
    dataset: Store, light: Light, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = write_images(dataset, "a", [[png(0), png(51)]])
    score(planned, dataset, numbers(0))
    monkeypatch.setattr(scoring, "decode", lambda data: pytest.fail("decoded"))
    score(planned, dataset, numbers(1), died=True)
    assert commit_shard(planned, dataset.root, FOLDER, ("light", "one")) == {"done": 1, "decoder died": 1}
    assert dataset.read_table(f"{FOLDER}/a.parquet")["light"].to_pylist() == [0.0, None]


def test_pictures_are_decoded_under_a_limit_of_memory(
    dataset: Store, light: Light, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []

    def decode_at_the_limit(data: bytes) -> Refused:
        limits.append(resource.getrlimit(resource.RLIMIT_DATA)[0])
        return Refused(RejectReason.OUT_OF_MEMORY, "MemoryError")

    monkeypatch.setattr(scoring, "decode", decode_at_the_limit)
    planned = write_images(dataset, "a", [[png(51), png(51)]])
    score(planned, dataset, numbers(0, 1), most=60 << 20)
    assert len(limits) == 2
    assert max(limits) < resource.getrlimit(resource.RLIMIT_DATA)[0] % (1 << 63)
    assert commit_shard(planned, dataset.root, FOLDER, ("light", "one")) == {"out of memory": 2}


def test_partial_files_of_another_model_or_other_images_are_not_used(dataset: Store, light: Light) -> None:
    planned = write_images(dataset, "a", [[png(0), png(51)]])
    score(planned, dataset, numbers(1))
    parts = partial_shard(planned, dataset.root, FOLDER)
    assert parts.rows("scores").tolist() == [1]
    other = ScoreShard(planned.shard, 2, planned.provenance | {"model": "another"}, planned.largest_group)
    assert partial_shard(other, dataset.root, FOLDER).rows("scores").tolist() == []
    assert parts.rows("scores").tolist() == [], "removed"


def test_a_batch_has_at_most_the_given_number_of_pictures_and_a_single_one_is_filled_up(
    dataset: Store, light: Light
) -> None:
    planned = write_images(dataset, "a", [[png(0), png(51), b"no picture", png(102), png(255)]])
    score(planned, dataset, numbers(0, 1, 2, 3, 4))
    assert light.batches == [2, 2, 2]
    commit_shard(planned, dataset.root, FOLDER, ("light", "one"))
    light_N = dataset.read_table(f"{FOLDER}/a.parquet")["light"].to_pylist()
    assert light_N == pytest.approx([0, 0.2, None, 0.4, 1])
    with_gpu = loading("folder", "digest of the model", batch_size=4, device="cuda")
    [images] = read_images(planned, numbers(3), dataset.root)
    [prepared] = prepare_rows(labelled(images, "a"), PREPROCESSING)
    [scored] = with_gpu(prepared)
    assert scored["scores"].to_pylist() == [pytest.approx([0.4, 1])]
    assert light.batches[3:] == [4]


def test_a_node_with_other_files_of_the_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"other")
    with pytest.raises(ValueError, match="holds other files on this machine than on the one that started the job"):
        loading(str(tmp_path), "digest of the model", batch_size=4, device="cpu")


def test_images_that_are_replaced_meanwhile_fail_their_shard(dataset: Store, light: Light) -> None:
    planned = write_images(dataset, "a", [[png(0), png(51)]])
    score(planned, dataset, numbers(0, 1))
    write_images(dataset, "a", [[png(0), png(51), png(102)]])
    with pytest.raises(ValueError, match="images were replaced while they were scored"):
        commit_shard(planned, dataset.root, FOLDER, ("light", "one"))
    assert not dataset.exists(f"{FOLDER}/a.parquet")
