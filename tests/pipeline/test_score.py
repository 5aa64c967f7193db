"""Scores of image classifiers equal a forward pass written here, carry the ids of the images, and are updated only when
needed. The models are tiny and random, in the folder layouts in which such models are published.
"""

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from pipeline.core.errors import UsageError
from pipeline.core.records import IMAGES, scores_schema
from pipeline.core.tables import labelled as with_shard
from pipeline.pictures.classifiers import digest, load_classifier
from pipeline.scores.commit import commit_shard, write_rows
from pipeline.scores.scoring import ScoreShard, loading, plan_scores, prepare_rows, read_images
from pipeline.storage import lease as leases
from pipeline.storage.manifest import Catalog
from pipeline.storage.shards import Store

SIDE = 32  # pixels
WORDS = ("plain", "watermark", "signature")
BROKEN = b"\xff\xd8\xff no longer a JPEG"

Finished = subprocess.CompletedProcess[str]
RunJob = Callable[..., Finished]
StartJob = Callable[..., "subprocess.Popen[str]"]


# --- Datasets ---------------------------------------------------------------------------------------------------------


def picture(number: int) -> bytes:
    """A PNG of noise around a colour. Colour and size depend on the number."""
    rng = np.random.default_rng(number)
    colour = rng.integers(0, 256, 3)
    pixels = np.clip(colour + rng.normal(0, 40, (50 + number % 7, 40 + number % 11, 3)), 0, 255)
    buffer = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def image_row(number: int, data: bytes) -> dict[str, Any]:
    tags: dict[str, Any] = {
        f"tags_{category}": [] for category in ("artist", "character", "copyright", "general", "meta")
    }
    return {
        "id": f"danbooru:{number}", "source": "danbooru", "image": data, "format": "PNG", "width": 40, "height": 50,
        "sha256": f"{number:064x}", "phash": number, "rating": None, "score": None, "favourites": None,
        "created_at": None, "page": 0, "parent": None, "pixiv_id": None, **tags,
    }  # fmt: skip


def write_images(root: Path, shards: dict[str, Sequence[Sequence[dict[str, Any]]]]) -> None:
    """Shards of images by name, each a list of row groups."""
    for shard, groups in shards.items():
        with Store(str(root)).writing_table(f"images/{shard}.parquet", IMAGES) as write:
            for group in groups:
                write(pa.RecordBatch.from_pylist(list(group), IMAGES))


# Two shards, the second one empty. The first has three row groups: one that is not a multiple of a batch and has a
# broken image, one of a single image, and one of a single broken image.
NUMBERS = (11, 5, 7, 2, 9, 30, 4)
BROKEN_NUMBERS = (7, 4)


def write_dataset(root: Path) -> Path:
    rows = [image_row(number, BROKEN if number in BROKEN_NUMBERS else picture(number)) for number in NUMBERS]
    write_images(root, {"a": [rows[:5], rows[5:6], rows[6:]], "b": []})
    return root


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "dataset")


# --- Models -----------------------------------------------------------------------------------------------------------


def vit_config(**settings: Any) -> ViTConfig:
    return ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=SIDE, patch_size=8,
        initializer_range=1.0, **settings,
    )  # fmt: skip


def save_vit(folder: Path, **settings: Any) -> ViTForImageClassification:
    """A random classifier in the layout of transformers; `settings` go into its config."""
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config(**settings)).eval()
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return model


def labelled(*labels: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}


def save_onnx(
    path: Path, weights_CL: NDArray[np.float32], *, channels_last: bool, batch: int | str = "N", end: str | None = None,
    output: str = "logits", kind: int = TensorProto.FLOAT,
) -> None:  # fmt: skip
    """A graph (N, 3, SIDE, SIDE) or (N, SIDE, SIDE, 3) -> (N, L): the mean over all pixels times `weights_CL`, followed
    by the operator `end`."""
    shape = [batch, SIDE, SIDE, 3] if channels_last else [batch, 3, SIDE, SIDE]
    axes = [1, 2] if channels_last else [2, 3]
    last = "made" if end else output
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], [last]),
        *([helper.make_node(end, [last], [output])] if end else []),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("pixels", kind, shape)],
        [helper.make_tensor_value_info(output, kind, [batch, weights_CL.shape[1]])],
        [numpy_helper.from_array(np.int64(axes), "axes"), numpy_helper.from_array(weights_CL, "weights")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


WEIGHTS_CL = np.float32([[1, -2, 0.5], [0, 3, -1], [2, 1, 1]])


def save_onnx_folder(folder: Path, *, config: dict[str, Any] | None = None, **settings: Any) -> Path:
    """An ONNX model whose preprocessor_config.json scales to [0, 1] without normalising."""
    save_onnx(folder / "model.onnx", WEIGHTS_CL, **{"channels_last": False} | settings)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_normalize=False)
    processor.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(WORDS))} if config is None else config))
    return folder


def save_wd_tagger(folder: Path, names: Sequence[str] = WORDS) -> Path:
    save_onnx(folder / "model.onnx", WEIGHTS_CL / 255, channels_last=True, end="Sigmoid", output="output")
    with (folder / "selected_tags.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("tag_id", "name", "category"), *((n, name, 0) for n, name in enumerate(names))])
    return folder


def load(folder: Path) -> Any:
    return load_classifier(folder, device="cpu", threads=1)


def scores(folder: Path, *images: Image.Image) -> NDArray[np.float32]:
    classifier = load(folder)
    result: NDArray[np.float32] = classifier.scores(np.stack([classifier.preprocessing.resized(i) for i in images]))
    assert result.dtype == np.float32
    return result


def opened(number: int) -> Image.Image:
    return Image.open(BytesIO(picture(number))).convert("RGB")


def logits_of(model: Any, processor: Any, *images: Image.Image) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**processor(list(images), return_tensors="pt")).logits
    return result


# --- One folder -> scores ---------------------------------------------------------------------------------------------


def test_a_single_label_classifier_gives_its_softmax(tmp_path: Path) -> None:
    model = save_vit(tmp_path, **labelled(*WORDS))
    expected = logits_of(model, ViTImageProcessorPil.from_pretrained(tmp_path), opened(1), opened(2)).softmax(1)
    assert load(tmp_path).labels == WORDS
    assert expected.std(0).max() > 0.01  # the outputs depend on the picture
    np.testing.assert_allclose(scores(tmp_path, opened(1), opened(2)), expected, atol=1e-5)


def test_a_multi_label_classifier_gives_a_sigmoid_for_each_label(tmp_path: Path) -> None:
    model = save_vit(tmp_path, problem_type="multi_label_classification", **labelled(*WORDS))
    expected = logits_of(model, ViTImageProcessorPil.from_pretrained(tmp_path), opened(1)).sigmoid()
    np.testing.assert_allclose(scores(tmp_path, opened(1)), expected, atol=1e-5)


@pytest.mark.parametrize("problem", [None, "regression"])
def test_a_regression_with_one_output_gives_its_raw_value_as_score(tmp_path: Path, problem: str | None) -> None:
    model = save_vit(tmp_path, problem_type=problem, num_labels=1)
    expected = logits_of(model, ViTImageProcessorPil.from_pretrained(tmp_path), opened(1))
    assert load(tmp_path).labels == ("score",)
    np.testing.assert_allclose(scores(tmp_path, opened(1)), expected, atol=1e-5)


def test_a_resnet_is_cropped_as_its_processor_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], **labelled(*WORDS))
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE + 8}, crop_size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(tmp_path)
    expected = logits_of(model, processor, opened(1), opened(2)).softmax(1)
    np.testing.assert_allclose(scores(tmp_path, opened(1), opened(2)), expected, atol=1e-5)


def mean_colours(*images: Image.Image) -> torch.Tensor:
    """(N, C) in [0, 1], of the pictures resized as in the ONNX folder's preprocessor."""
    resized = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for image in images]
    return torch.from_numpy(np.stack(resized).mean((1, 2)).astype(np.float32) / 255)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", ["N", 1])
def test_onnx_models_may_have_either_order_of_axes_and_a_fixed_batch_of_one(
    tmp_path: Path, channels_last: bool, batch: int | str
) -> None:
    folder = save_onnx_folder(tmp_path / "m", channels_last=channels_last, batch=batch)
    expected = (mean_colours(opened(1), opened(2)) @ torch.from_numpy(WEIGHTS_CL)).softmax(1)
    assert load(folder).labels == WORDS
    np.testing.assert_allclose(scores(folder, opened(1), opened(2)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("end", "output", "config"),
    [
        ("Softmax", "logits", {}),
        ("Softmax", "probabilities", {}),
        ("Sigmoid", "sigmoid_output", {"problem_type": "multi_label_classification"}),
    ],
)
def test_a_graph_that_outputs_probabilities_gets_no_second_activation(
    tmp_path: Path, end: str, output: str, config: dict[str, Any]
) -> None:
    named = {"id2label": dict(enumerate(WORDS))} | config
    folder = save_onnx_folder(tmp_path / "m", end=end, output=output, config=named)
    logits = mean_colours(opened(1)) @ torch.from_numpy(WEIGHTS_CL)
    expected = logits.softmax(1) if end == "Softmax" else logits.sigmoid()
    np.testing.assert_allclose(scores(folder, opened(1)), expected, atol=1e-5)


def test_onnx_with_one_output_needs_no_config(tmp_path: Path) -> None:
    folder = save_onnx_folder(tmp_path / "m")
    save_onnx(folder / "model.onnx", WEIGHTS_CL[:, :1], channels_last=False)
    (folder / "config.json").unlink()
    assert load(folder).labels == ("score",)
    expected = mean_colours(opened(1)) @ torch.from_numpy(WEIGHTS_CL[:, :1])
    np.testing.assert_allclose(scores(folder, opened(1)), expected, atol=1e-5)


def test_a_wd_tagger_reads_bgr_and_gives_the_probability_of_each_tag(tmp_path: Path) -> None:
    folder = save_wd_tagger(tmp_path / "tagger")
    square = Image.new("RGB", (SIDE, SIDE), (200, 100, 0))
    expected = (torch.tensor([[0.0, 100, 200]]) / 255 @ torch.from_numpy(WEIGHTS_CL)).sigmoid()
    assert load(folder).labels == WORDS
    np.testing.assert_allclose(scores(folder, square), expected, atol=1e-5)


# --- Folders that cannot be used --------------------------------------------------------------------------------------


def without_weights(folder: Path) -> None:
    save_vit(folder)
    (folder / "model.safetensors").unlink()


def only_pickle(folder: Path) -> None:
    model = save_vit(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def corrupt_weights(folder: Path) -> None:
    save_vit(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")


def without_a_head(folder: Path) -> None:
    save_vit(folder)
    ViTModel(vit_config()).save_pretrained(folder)


def without_preprocessor(folder: Path) -> None:
    save_vit(folder)
    (folder / "preprocessor_config.json").unlink()


def with_remote_code(folder: Path) -> None:
    save_vit(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForImageClassification": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('code of the folder ran')")


def with_another_size(folder: Path) -> None:
    save_vit(folder)
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(folder)


def not_json(folder: Path) -> None:
    save_vit(folder)
    (folder / "preprocessor_config.json").write_text("{")


def onnx_without_labels(folder: Path) -> None:
    save_onnx_folder(folder, config={})


def onnx_with_too_few_labels(folder: Path) -> None:
    save_onnx_folder(folder, config={"id2label": {"0": "one", "1": "two"}})


def onnx_with_one_class(folder: Path) -> None:
    save_onnx_folder(folder, config={"id2label": {"0": "only"}, "problem_type": "single_label_classification"})
    save_onnx(folder / "model.onnx", WEIGHTS_CL[:, :1], channels_last=False)


def onnx_with_another_size(folder: Path) -> None:
    save_onnx_folder(folder)
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(folder)


def corrupt_onnx(folder: Path) -> None:
    save_onnx_folder(folder)
    (folder / "model.onnx").write_bytes(b"no graph")


def tagger_with_a_label_called_id(folder: Path) -> None:
    save_wd_tagger(folder, ["id", "two", "three"])


def tagger_that_outputs_logits(folder: Path) -> None:
    save_wd_tagger(folder)
    save_onnx(folder / "model.onnx", WEIGHTS_CL, channels_last=True)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Path.mkdir, "neither model.onnx nor config.json"),
        (without_weights, "no *.safetensors"),
        (only_pickle, "pytorch_model.bin"),
        (corrupt_weights, "cannot be used"),
        (without_a_head, "classifier.bias"),
        (without_preprocessor, "no preprocessor_config.json"),
        (with_remote_code, "cannot be used"),
        (with_another_size, "48"),
        (not_json, "preprocessor_config.json is not JSON"),
        (onnx_with_one_class, "problem_type"),
        (partial(save_vit, **labelled("id", "other")), "'id'"),
        (partial(save_onnx_folder, kind=TensorProto.DOUBLE), "tensor(double)"),
        (partial(save_onnx_folder, batch=4), "4 pictures at a time"),
        (onnx_without_labels, "id2label"),
        (onnx_with_too_few_labels, "(1, 3), its labels say (1, 2)"),
        (onnx_with_another_size, "(48, 48)"),
        (corrupt_onnx, "cannot be used"),
        (tagger_with_a_label_called_id, "'id'"),
        (tagger_that_outputs_logits, "not in [0, 1]"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    make: Callable[[Path], Any], named: str, tmp_path: Path
) -> None:
    make(tmp_path / "model")
    with pytest.raises(UsageError) as refusal:
        load(tmp_path / "model")
    line = str(refusal.value)
    assert named in line
    assert str(tmp_path / "model") in line
    assert "\n" not in line


def test_without_onnxruntime_the_line_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_onnx_folder(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r'pip install .* -e "\.\[score\]"'):
        load(tmp_path / "m")


@pytest.mark.parametrize("labels", [[], ["id"], ["a", ""], ["a", "b", "a"]])
def test_labels_that_cannot_be_columns_are_refused(labels: list[str]) -> None:
    with pytest.raises(ValueError, match="cannot be columns"):
        scores_schema(labels)


def test_the_digest_of_a_model_covers_every_file_but_the_readme(tmp_path: Path) -> None:
    save_onnx_folder(tmp_path / "m")
    before = digest(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("how nice")
    assert digest(tmp_path / "m") == before
    (tmp_path / "m" / "model.onnx.data").write_bytes(b"weights")
    assert digest(tmp_path / "m") != before


# --- The job ----------------------------------------------------------------------------------------------------------


def succeeded(job: Finished) -> str:
    assert job.returncode == 0, job.stderr
    return job.stdout


def refused(job: Finished) -> str:
    """The only line on stderr."""
    assert job.returncode == 2, job.stderr
    (line,) = job.stderr.splitlines()
    return line


def written(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def prepare_all(planned: ScoreShard, root: Path, classifier: Any, died: bool = False) -> Iterator[pa.Table]:
    for images in read_images(planned, np.arange(planned.rows, dtype=np.int32), str(root)):
        yield from prepare_rows(with_shard(images, planned.shard, died), classifier.preprocessing)


def score_here(root: Path, model: Path, batch_size: int) -> Path:
    """Score every shard without a job or Ray; returns the folder of the scores."""
    classifier, marks = load(model), "scores/marks"
    classify = loading(str(model), digest(model), batch_size, "cpu", threads=2)
    for planned in plan_scores(Catalog(Store(str(root))).images(), digest(model), classifier.describe()).values():
        for prepared in prepare_all(planned, root, classifier):
            for scored in classify(prepared):
                list(write_rows(scored, str(root), marks))
        commit_shard(planned, str(root), marks, classifier.labels)
    return root / "scores" / "marks"


@dataclass(frozen=True)
class Scored:
    """A dataset whose scores/marks the job wrote with an ONNX model."""

    root: Path
    model: Path
    printed: str

    @property
    def folder(self) -> Path:
        return self.root / "scores" / "marks"


@pytest.fixture(scope="module")
def scored(run_job_here: RunJob, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("scored")
    root, model = write_dataset(folder / "dataset"), save_onnx_folder(folder / "marks")
    before = times(root)
    printed = succeeded(run_job_here("pipeline/score.py", "--dataset", root, "--model", model))
    assert times(root).items() >= before.items(), "images are not rewritten"
    return Scored(root, model, printed)


def test_scores_have_the_ids_of_the_images_and_broken_images_have_a_reason_instead(
    dataset: Path, tmp_path: Path
) -> None:
    model = save_vit(tmp_path / "model", **labelled(*WORDS))
    folder = score_here(dataset, tmp_path / "model", batch_size=2)
    table = pq.read_table(folder / "a.parquet")
    assert table.schema.equals(scores_schema(WORDS))
    assert table["id"].to_pylist() == [f"danbooru:{number}" for number in NUMBERS]
    good = [number for number in NUMBERS if number not in BROKEN_NUMBERS]
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "model")
    expected = dict(zip(good, logits_of(model, processor, *map(opened, good)).softmax(1).tolist(), strict=True))
    for number, row in zip(NUMBERS, table.to_pylist(), strict=True):
        wanted = expected.get(number, [None] * len(WORDS))
        assert [row[word] for word in WORDS] == (wanted if None in wanted else pytest.approx(wanted, abs=1e-5))

    refusals = pq.read_table(folder / "rejected" / "a.parquet").to_pylist()
    assert [row["key"] for row in refusals] == [f"danbooru:{number}" for number in BROKEN_NUMBERS]
    assert [row["sha256"] for row in refusals] == [f"{number:064x}" for number in BROKEN_NUMBERS]
    empty = pq.read_table(folder / "b.parquet")
    assert empty.num_rows == 0
    assert empty.schema.equals(table.schema)


def test_the_job_writes_what_the_scorer_writes_and_counts_every_row(scored: Scored, dataset: Path) -> None:
    assert written(scored.folder) == written(score_here(dataset, scored.model, batch_size=32))
    assert "up to 1 actor, each with a CPU" in scored.printed
    record = json.loads((scored.folder / "run.json").read_text())
    (reason,) = {row["reason"] for row in pq.read_table(scored.folder / "rejected" / "a.parquet").to_pylist()}
    assert record["rejected"] == {reason: len(BROKEN_NUMBERS)}
    assert (record["rows_in"], record["rows_out"]) == (len(NUMBERS), len(NUMBERS) - len(BROKEN_NUMBERS))


def test_only_shards_with_another_model_or_other_images_are_scored_again(
    run_job_here: RunJob, call_job: RunJob, dataset: Path, scored: Scored, tmp_path: Path
) -> None:
    planned = call_job("pipeline/score.py", "--dataset", dataset, "--model", scored.model, "--plan")
    assert "would do: scoring 2 of 2 shards: 2 new (a, b)" in succeeded(planned)
    assert not (dataset / "scores").exists()

    root, model = shutil.copytree(scored.root, tmp_path / "scored"), shutil.copytree(scored.model, tmp_path / "marks")
    command, folder = ("pipeline/score.py", "--dataset", root, "--model", model), root / "scores" / "marks"
    first = times(folder)
    assert "scoring 0 of 2 shards\n" in succeeded(call_job(*command, "--batch-size", 3))
    assert times(folder) == first

    write_images(root, {"b": [[image_row(50, picture(50))]]})
    assert "would do: scoring 1 of 2 shards: 1 changed: images (b)" in succeeded(call_job(*command, "--plan"))
    assert times(folder) == first
    again = succeeded(run_job_here(*command, "--actors", 1))
    assert "scoring 1 of 2 shards: 1 changed: images (b)" in again
    assert "up to 1 actor, each with a CPU" in again
    second = times(folder)
    assert second[folder / "a.parquet"] == first[folder / "a.parquet"]
    assert pq.read_table(folder / "b.parquet")["id"].to_pylist() == ["danbooru:50"]

    save_onnx_folder(model, config={"id2label": {"0": "x", "1": "y", "2": "z"}})
    for asked in ((), ("--plan",)):
        assert "has scores of another model. Give --name marks to replace them" in refused(call_job(*command, *asked))
    planned = call_job(*command, "--name", "marks", "--plan")
    assert "scoring 2 of 2 shards: 2 changed: model" in succeeded(planned)
    assert times(folder) == second


def test_scores_of_a_job_that_ended_before_this_one_has_the_lease_are_kept(
    call_job: RunJob, monkeypatch: pytest.MonkeyPatch, dataset: Path, scored: Scored
) -> None:
    @contextmanager
    def late(store: Store, folder: str, job: str) -> Iterator[None]:
        made_from = json.dumps({"model": "of another job"})
        table = pa.table({"id": pa.array([], pa.string()), "x": pa.array([], pa.float32())})
        store.write_table(f"{folder}/b.parquet", table, scores_schema(["x"]), made_from=made_from)
        yield

    monkeypatch.setattr(leases, "lease", late)
    job = call_job("pipeline/score.py", "--dataset", dataset, "--model", scored.model)
    assert "has scores of another model" in refused(job)


def test_scores_of_another_model_stay_until_the_new_ones_replace_them(
    run_job_here: RunJob, scored: Scored, tmp_path: Path
) -> None:
    """Two model folders with the same name, where the second model cannot score the first shard."""
    root = shutil.copytree(scored.root, tmp_path / "scored")
    folder = root / "scores" / "marks"
    before = written(folder)
    other = save_onnx_folder(tmp_path / "marks", config={"id2label": {"0": "x", "1": "y", "2": "z"}})
    images = root / "images" / "a.parquet"
    content = bytearray(images.read_bytes())
    content[4:2000] = bytes(1996)  # the first images; the footer is intact
    images.write_bytes(content)
    command = ("pipeline/score.py", "--dataset", root, "--name", "marks", "--model", other)
    assert run_job_here(*command).returncode == 1
    assert written(folder)["a.parquet"] == before["a.parquet"]
    assert pq.read_schema(folder / "b.parquet").names == ["id", "x", "y", "z"]


def test_a_job_that_is_killed_and_run_again_writes_the_same_files(
    run_job_here: RunJob, start_job: StartJob, tmp_path: Path
) -> None:
    model, shards = save_onnx_folder(tmp_path / "marks"), 20
    pictures = [picture(number) for number in range(40)]
    for root in (tmp_path / "killed", tmp_path / "whole"):
        for shard in range(shards):
            rows = [image_row(1000 * shard + number, data) for number, data in enumerate(pictures)]
            write_images(root, {f"{shard:02}": [rows]})
    whole = score_here(tmp_path / "whole", model, batch_size=32)
    command = ("pipeline/score.py", "--dataset", tmp_path / "killed", "--model", model)
    job = start_job(*command, "--actors", 1)
    killed = tmp_path / "killed" / "scores" / "marks"
    deadline = time.monotonic() + 120
    while not list(killed.glob("*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    job.kill()
    job.wait()
    assert 0 < len(list(killed.glob("*.parquet"))) < shards
    again = succeeded(run_job_here(*command))
    assert f"of {shards} shards: " in again
    assert f"scoring {shards} of " not in again
    assert written(killed) == written(whole)


def test_on_s3_the_job_writes_the_same_files(run_job_here: RunJob, dataset: Path, scored: Scored, bucket: str) -> None:
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).put(str(dataset), f"{bucket}/scored", recursive=True)
    succeeded(run_job_here("pipeline/score.py", "--dataset", f"{bucket}/scored", "--model", scored.model))
    there = Store(f"{bucket}/scored")
    for name in ("a.parquet", "b.parquet", "rejected/a.parquet"):
        assert there.read(f"scores/marks/{name}") == (scored.folder / name).read_bytes()


def test_a_wrong_command_is_refused_in_one_line_and_writes_nothing(
    call_job: RunJob, dataset: Path, tmp_path: Path
) -> None:
    only_pickle(tmp_path / "pickle")
    model = save_onnx_folder(tmp_path / "m")
    for arguments, named in [
        (("--model", tmp_path / "pickle"), "pytorch_model.bin"),
        (("--model", tmp_path / "nowhere"), "is no folder"),
        (("--model", "s3://bucket/model"), "--model s3://bucket/model must be a path"),
        (("--model", model, "--name", "../images"), "--name '../images'"),
        (("--model", model, "--batch-size", 0), "--batch-size"),
        (("--model", model, "--actors", 0), "--actors"),
        ((), "--model"),
    ]:
        assert named in refused(call_job("pipeline/score.py", "--dataset", dataset, *arguments))
    assert "ingest.py" in refused(call_job("pipeline/score.py", "--dataset", tmp_path / "none", "--model", model))
    assert not (dataset / "scores").exists()
