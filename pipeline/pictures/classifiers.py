"""A folder with an image classifier -> scores of pictures.

Two layouts, distinguished by model.onnx:

    transformers   config.json, preprocessor_config.json, *.safetensors of a model that transformers supports without
                   remote code. Pickled weights are refused: loading them may run code.
    ONNX           model.onnx with one float32 input, NCHW or NHWC, and a first output (N, labels); with
                   preprocessor_config.json, and config.json (id2label, problem_type) unless it has one output;
                   or with selected_tags.csv (WD taggers: column `name`; NHWC, BGR, 0 to 255; outputs probabilities).

preprocessor_config.json must be that of ViT, BEiT, CLIP or SigLIP. Nothing is downloaded.

Axes: N pictures, H rows, W columns, C channels, L labels.
"""

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UsageError
from pipeline.core.records import scores_schema
from pipeline.pictures.onnx_model import Forward, OnnxModel, load_onnx, onnx_supports_cuda
from pipeline.pictures.preprocessing import Preprocessing, read_preprocessing, wd_tagger

Activation = Literal["softmax", "sigmoid", "none"]

_CONFIG, _PREPROCESSOR, _ONNX, _TAGS = "config.json", "preprocessor_config.json", "model.onnx", "selected_tags.csv"
# Parts of the names that exporters give to an output after softmax or sigmoid.
_PROBABILITIES = ("prob", "softmax", "sigmoid")
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Classifier:
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    activation: Activation
    forward: Forward

    def scores(self, pixels_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, L) for pictures from `preprocessing.resized`. Raises ValueError if an output is not finite."""
        outputs_NL = self.forward(self.preprocessing.normalised(pixels_NHWC))
        expected = (len(pixels_NHWC), len(self.labels))
        if outputs_NL.shape != expected:
            raise ValueError(f"the model outputs {outputs_NL.shape}, its labels say {expected}")
        if not np.isfinite(outputs_NL).all():
            raise ValueError("the model outputs values that are not finite")
        return _ACTIVATIONS[self.activation](outputs_NL)

    def describe(self) -> str:
        """Preprocessing and activation as JSON, kept with the scores."""
        return json.dumps(asdict(self.preprocessing) | {"activation": self.activation}, sort_keys=True)


def load_classifier(folder: Path, device: str, threads: int, flag: str = "--model") -> Classifier:
    """Loads a folder and tries it on a grey picture.

    `device` is torch's name, "cpu" or "cuda"; `threads` is the number of CPU threads per batch; `flag` is named in
    errors. Raises UsageError if the folder cannot be used.
    """
    if not folder.is_dir():
        raise UsageError(f"{flag} {folder} is no folder; give one with config.json and *.safetensors, or model.onnx")
    is_onnx = (folder / _ONNX).exists()
    try:
        classifier = (_load_onnx_folder if is_onnx else _load_transformers_folder)(folder, device, threads)
        scores_schema(classifier.labels)
        classifier.scores(_grey_picture(classifier.preprocessing))
    except UsageError:
        raise
    except ImportError as error:
        raise UsageError(
            f"{flag} {folder} needs a package that is not installed ({_first_line(error)}); run: "
            f'pip install -c deploy/constraints.txt -e ".[{"score" if is_onnx else "trainer"}]"'
        ) from error
    except Exception as error:  # both libraries raise many kinds for files that they cannot use
        raise UsageError(
            f"{flag} {folder} cannot be used: {_first_line(error)}; the head of pipeline/pictures/classifiers.py "
            "lists what can"
        ) from error
    return classifier


def uses_gpu(folder: Path) -> bool:
    """True if the installed packages can run this classifier on a GPU; otherwise none needs to be reserved."""
    if (folder / _ONNX).exists():
        return onnx_supports_cuda()
    import torch

    return torch.version.cuda is not None


def digest(folder: Path) -> str:
    """One hash of all files in a classifier's folder, except *.md and hidden files: if it changes, the model did."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".md")
    whole = hashlib.sha256()
    for name in names:
        if not name.startswith("."):
            with (folder / name).open("rb") as file:
                whole.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _load_transformers_folder(folder: Path, device: str, threads: int) -> Classifier:
    if not (folder / _CONFIG).exists():
        raise ValueError(f"it has neither {_ONNX} nor {_CONFIG}")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            "it has no *.safetensors; weights in pickle (pytorch_model.bin) may run code and are not loaded: convert "
            "them with transformers' save_pretrained"
        )
    preprocessing = _read_preprocessor(folder)
    import torch
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model, loading = AutoModelForImageClassification.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} more, which would be random")
    model = model.to(device).eval()

    @torch.inference_mode()
    def forward(values_NHWC: NDArray[np.float32]) -> NDArray[np.float32]:
        values_NCHW = torch.from_numpy(np.ascontiguousarray(values_NHWC.transpose(0, 3, 1, 2))).to(device)
        logits_NL: NDArray[np.float32] = model(pixel_values=values_NCHW).logits.float().cpu().numpy()
        return logits_NL

    labels, problem = _in_order(model.config.id2label), model.config.problem_type
    return _classifier(labels, problem, preprocessing, forward, _activation(problem, len(labels)))


def _load_onnx_folder(folder: Path, device: str, threads: int) -> Classifier:
    model = load_onnx(folder / _ONNX, device, threads)
    preprocessing = _onnx_preprocessing(folder, model)
    probe_1L = model.forward(preprocessing.normalised(_grey_picture(preprocessing)))
    labels, problem = _onnx_labels(folder, probe_1L.shape[1])
    activation = _activation(problem, len(labels))
    if activation != "none" and _are_probabilities(folder, model.output, activation, probe_1L):
        activation = "none"
    return _classifier(labels, problem, preprocessing, model.forward, activation)


def _onnx_preprocessing(folder: Path, model: OnnxModel) -> Preprocessing:
    if _is_wd_tagger(folder):
        height, width = model.size
        if not (model.channels_last and isinstance(height, int) and isinstance(width, int)):
            raise ValueError(f"{_TAGS} without {_PREPROCESSOR} is for inputs (N, H, W, 3) of fixed size")
        return wd_tagger(height, width)
    preprocessing = _read_preprocessor(folder)
    for fixed, made in zip(model.size, preprocessing.size, strict=True):
        if isinstance(fixed, int) and fixed != made:
            raise ValueError(f"{_ONNX} takes {model.size} pixels, {_PREPROCESSOR} makes {preprocessing.size}")
    return preprocessing


def _onnx_labels(folder: Path, outputs: int) -> tuple[list[str], str | None]:
    """The labels and the problem_type, as in transformers' config.json."""
    config = _read_json(folder / _CONFIG)
    if "id2label" in config:
        return _in_order(config["id2label"]), config.get("problem_type")
    if (folder / _TAGS).exists():
        return _tag_names(folder / _TAGS), "multi_label_classification"
    if outputs == 1:
        return ["score"], config.get("problem_type")
    raise ValueError(f"it has {outputs} outputs and no names for them: {_CONFIG} needs id2label")


def _are_probabilities(folder: Path, output: str, activation: Activation, outputs_1L: NDArray[np.float32]) -> bool:
    """True if the graph includes its softmax or sigmoid: according to the layout, the name of the output or, for a
    softmax, a sum of one, which logits have only by chance."""
    within = bool(((outputs_1L >= 0) & (outputs_1L <= 1)).all())
    if _is_wd_tagger(folder) or any(part in output.lower() for part in _PROBABILITIES):
        if not within:
            raise ValueError(f"its output {output} should be probabilities and is not in [0, 1]")
        return True
    return activation == "softmax" and within and abs(float(outputs_1L.sum()) - 1) < _SUM_TOLERANCE


def _classifier(
    labels: list[str], problem: str | None, preprocessing: Preprocessing, forward: Forward, activation: Activation
) -> Classifier:
    """The only output of a regression is called "score": transformers makes its label up."""
    is_score = len(labels) == 1 and problem in (None, "regression")
    names = ("score",) if is_score else tuple(labels)
    return Classifier(labels=names, preprocessing=preprocessing, activation=activation, forward=forward)


def _activation(problem_type: str | None, labels: int) -> Activation:
    """The default is that of transformers: a regression for one label, one class of several otherwise."""
    problem = problem_type or ("regression" if labels == 1 else "single_label_classification")
    if problem == "single_label_classification" and labels == 1:
        raise ValueError("one label out of one is always certain: problem_type must be regression or multi_label")
    known: dict[str, Activation] = {
        "regression": "none",
        "single_label_classification": "softmax",
        "multi_label_classification": "sigmoid",
    }
    if problem not in known:
        raise ValueError(f"problem_type {problem} is none of {', '.join(known)}")
    return known[problem]


def _softmax(outputs_NL: NDArray[np.float32]) -> NDArray[np.float32]:
    powers_NL = np.exp(outputs_NL - outputs_NL.max(axis=1, keepdims=True))
    result: NDArray[np.float32] = powers_NL / powers_NL.sum(axis=1, keepdims=True)
    return result


def _sigmoid(outputs_NL: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = 0.5 * (1 + np.tanh(0.5 * outputs_NL))  # does not overflow
    return result


_ACTIVATIONS: dict[Activation, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "none": lambda outputs_NL: outputs_NL,
}


def _grey_picture(preprocessing: Preprocessing) -> NDArray[np.uint8]:
    return np.full((1, *preprocessing.size, 3), 128, np.uint8)


def _is_wd_tagger(folder: Path) -> bool:
    return (folder / _TAGS).exists() and not (folder / _PREPROCESSOR).exists()


def _in_order(id2label: dict[Any, Any]) -> list[str]:
    """Labels in the order of their numbers, which JSON stores as text."""
    by_number = {int(number): str(label) for number, label in id2label.items()}
    if set(by_number) != set(range(len(by_number))):
        raise ValueError(f"id2label does not number its {len(by_number)} labels from 0")
    return [by_number[number] for number in range(len(by_number))]


def _tag_names(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "name" not in rows[0]:
        raise ValueError(f"{path.name} has no column 'name'")
    return [row["name"] for row in rows]


def _read_preprocessor(folder: Path) -> Preprocessing:
    config = _read_json(folder / _PREPROCESSOR)
    if not config:
        raise ValueError(f"it has no {_PREPROCESSOR}, which says how pictures are resized and normalised")
    try:
        return read_preprocessing(config)
    except ValueError as error:
        raise ValueError(f"{_PREPROCESSOR}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """{} if there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return found


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:;") if lines else type(error).__name__
