"""A folder with an image classifier -> scores of pictures. The only pipeline file that knows transformers and ONNX.

Two layouts, told apart by model.onnx:

    transformers   config.json, preprocessor_config.json, *.safetensors: of a model that transformers knows without code
                   of its own. Weights in pickle are refused: loading them may run whatever code they hold.
    ONNX           model.onnx of one float32 input, NCHW or NHWC, whose first output is (N, labels); with
                   preprocessor_config.json, and config.json (id2label, problem_type) unless it has one output;
                   or with selected_tags.csv (WD taggers: column `name`; NHWC, BGR, 0 to 255; gives probabilities).

Nothing is downloaded. Legend: N pictures, H rows, W columns, C channels, L labels.
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
from pipeline.pictures.preprocessing import Preprocessing, read_preprocessing, wd_tagger

Activation = Literal["softmax", "sigmoid", "none"]

_CONFIG, _PREPROCESSOR, _ONNX, _TAGS = "config.json", "preprocessor_config.json", "model.onnx", "selected_tags.csv"
# How exporters call an output that went through softmax or sigmoid already.
_PROBABILITIES = ("prob", "softmax", "sigmoid")
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Classifier:
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    activation: Activation
    forward: Callable[[NDArray[np.float32]], NDArray[np.float32]]  # normalised (N, H, W, C) -> raw outputs (N, L)

    def scores(self, pixels_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, L) for pictures as `preprocessing.resized` gives them. ValueError where the model gives no numbers."""
        outputs_NL = self.forward(self.preprocessing.normalised(pixels_NHWC))
        expected = (len(pixels_NHWC), len(self.labels))
        if outputs_NL.shape != expected:
            raise ValueError(f"the model gives {outputs_NL.shape}, its labels say {expected}")
        if not np.isfinite(outputs_NL).all():
            raise ValueError("the model gives values that are not finite")
        return _ACTIVATIONS[self.activation](outputs_NL)

    def describe(self) -> str:
        """What happens to a picture besides the model, as JSON."""
        return json.dumps(asdict(self.preprocessing) | {"activation": self.activation}, sort_keys=True)


def load_classifier(folder: Path, device: str, threads: int, flag: str = "--model") -> Classifier:
    """`device` is torch's name, "cpu" or "cuda"; `threads` are the CPU threads of one batch; `flag` gave the folder.

    Tried on a grey picture before it is returned. UsageError, with the mend, for a folder that cannot be used.
    """
    if not folder.is_dir():
        raise UsageError(f"{flag} {folder} is no folder; give one with config.json and *.safetensors, or model.onnx")
    try:
        load = _load_onnx if (folder / _ONNX).exists() else _load_transformers
        classifier = load(folder, device, threads)
        scores_schema(classifier.labels)
        grey_NHWC = np.full((1, *classifier.preprocessing.size, 3), 128, np.uint8)
        classifier.scores(grey_NHWC)
    except UsageError:
        raise
    except ImportError as error:
        extra = "score" if (folder / _ONNX).exists() else "trainer"
        raise UsageError(
            f"{flag} {folder} needs a package that is not installed ({_first_line(error)}); run: "
            f'pip install -c deploy/constraints.txt -e ".[{extra}]"'
        ) from error
    except Exception as error:  # of a dozen kinds: whatever two libraries make of files that are not what they need
        raise UsageError(
            f"{flag} {folder} cannot be used: {_first_line(error)}; the head of pipeline/pictures/classifiers.py says what can"
        ) from error
    return classifier


def uses_gpu(folder: Path) -> bool:
    """Whether what is installed here can run it on a GPU: else none is reserved in vain."""
    if (folder / _ONNX).exists():
        import onnxruntime

        return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    import torch

    return torch.version.cuda is not None


def digest(folder: Path) -> str:
    """One hash over the files of a classifier's folder: a change of any of them is another model. Read-mes do not
    count, nor do hidden files."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".md")
    whole = hashlib.sha256()
    for name in names:
        if not name.startswith("."):
            with (folder / name).open("rb") as file:
                whole.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _activation(problem_type: str | None, labels: int) -> Activation:
    """As transformers trains them; its default is regression for one label, else one label out of several."""
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


def _label_columns(labels: list[str], problem_type: str | None) -> tuple[str, ...]:
    """The only output of a regression is called "score": its label is a name made up by transformers."""
    return ("score",) if len(labels) == 1 and problem_type in (None, "regression") else tuple(labels)


def _json(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return found


def _preprocessor(folder: Path) -> Preprocessing:
    config = _json(folder / _PREPROCESSOR)
    if not config:
        raise ValueError(f"it has no {_PREPROCESSOR}, which says how pictures are resized and normalised")
    try:
        return read_preprocessing(config)
    except ValueError as error:
        raise ValueError(f"{_PREPROCESSOR}: {error}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:;") if lines else type(error).__name__


# --- transformers -----------------------------------------------------------------------------------------------------


def _load_transformers(folder: Path, device: str, threads: int) -> Classifier:
    if not (folder / _CONFIG).exists():
        raise ValueError(f"it has neither {_ONNX} nor {_CONFIG}")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            "it has no *.safetensors; weights in pickle (pytorch_model.bin) may run code and are not loaded: convert "
            "them with transformers' save_pretrained"
        )
    preprocessing = _preprocessor(folder)
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

    labels = _ordered(model.config.id2label)
    problem = model.config.problem_type
    return Classifier(
        labels=_label_columns(labels, problem),
        preprocessing=preprocessing,
        activation=_activation(problem, len(labels)),
        forward=forward,
    )


def _ordered(id2label: dict[Any, Any]) -> list[str]:
    """Labels by their numbers, which JSON keeps as text."""
    by_number = {int(number): str(label) for number, label in id2label.items()}
    if set(by_number) != set(range(len(by_number))):
        raise ValueError(f"id2label does not number its {len(by_number)} labels from 0")
    return [by_number[number] for number in range(len(by_number))]


# --- ONNX -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Input:
    name: str
    one_by_one: bool  # the graph takes one picture at a time
    channels_last: bool
    size: tuple[Any, Any]  # height and width, ints where the graph fixes them


def _load_onnx(folder: Path, device: str, threads: int) -> Classifier:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors: the rest is of no use to whoever runs the job
    providers = ["CUDAExecutionProvider"] if device == "cuda" else []
    session = onnxruntime.InferenceSession(str(folder / _ONNX), options, providers=[*providers, "CPUExecutionProvider"])
    taken = _onnx_input(session.get_inputs())
    preprocessing = _onnx_preprocessing(folder, taken)
    output = session.get_outputs()[0].name
    forward = _onnx_forward(session, taken, output)
    probe_1L = forward(preprocessing.normalised(np.full((1, *preprocessing.size, 3), 128, np.uint8)))
    labels, problem = _onnx_labels(folder, probe_1L.shape[1])
    activation = _activation(problem, len(labels))
    if activation != "none" and _are_probabilities(folder, output, activation, probe_1L):
        activation = "none"
    return Classifier(
        labels=_label_columns(labels, problem), preprocessing=preprocessing, activation=activation, forward=forward
    )


def _onnx_input(inputs: list[Any]) -> _Input:
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        found = ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in inputs)
        raise ValueError(f"{_ONNX} must have one input, a float32 tensor of four axes; it has {found}")
    batch, *axes = inputs[0].shape
    if isinstance(batch, int) and batch != 1:
        raise ValueError(f"{_ONNX} takes {batch} pictures at a time; export it for one, or for any number")
    if 3 not in (axes[0], axes[2]):
        raise ValueError(f"{_ONNX} has the input {inputs[0].shape}, neither (N, 3, H, W) nor (N, H, W, 3)")
    channels_last = axes[0] != 3
    height, width = axes[:2] if channels_last else axes[1:]
    return _Input(inputs[0].name, batch == 1, channels_last, (height, width))


def _onnx_preprocessing(folder: Path, taken: _Input) -> Preprocessing:
    if _is_wd_tagger(folder):
        height, width = taken.size
        if not (taken.channels_last and isinstance(height, int) and isinstance(width, int)):
            raise ValueError(f"{_TAGS} without {_PREPROCESSOR} is for inputs (N, H, W, 3) of fixed size")
        return wd_tagger(height, width)
    preprocessing = _preprocessor(folder)
    for fixed, made in zip(taken.size, preprocessing.size, strict=True):
        if isinstance(fixed, int) and fixed != made:
            raise ValueError(f"{_ONNX} takes {taken.size} pixels, {_PREPROCESSOR} makes {preprocessing.size}")
    return preprocessing


def _onnx_forward(session: Any, taken: _Input, output: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    def run(values_NHWC: NDArray[np.float32]) -> NDArray[np.float32]:
        values = np.ascontiguousarray(values_NHWC if taken.channels_last else values_NHWC.transpose(0, 3, 1, 2))
        (result,) = session.run([output], {taken.name: values})
        return np.asarray(result, np.float32).reshape(len(values), -1)

    def run_one_by_one(values_NHWC: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([run(one_1HWC) for one_1HWC in np.split(values_NHWC, len(values_NHWC))])

    return run_one_by_one if taken.one_by_one else run


def _onnx_labels(folder: Path, outputs: int) -> tuple[list[str], str | None]:
    """The labels, and problem_type as config.json would call it."""
    config = _json(folder / _CONFIG)
    if "id2label" in config:
        return _ordered(config["id2label"]), config.get("problem_type")
    if (folder / _TAGS).exists():
        return _tag_names(folder / _TAGS), "multi_label_classification"
    if outputs == 1:
        return ["score"], config.get("problem_type")
    raise ValueError(f"it has {outputs} outputs and no names for them: {_CONFIG} needs id2label")


def _are_probabilities(folder: Path, output: str, activation: Activation, outputs_1L: NDArray[np.float32]) -> bool:
    """Whether the graph ends in its softmax or sigmoid already: by the layout, by the name of the output, and for a
    softmax by what it adds up to, which logits do by chance only."""
    within = bool(((outputs_1L >= 0) & (outputs_1L <= 1)).all())
    if _is_wd_tagger(folder) or any(part in output.lower() for part in _PROBABILITIES):
        if not within:
            raise ValueError(f"its output {output} should be probabilities and is not in [0, 1]")
        return True
    return activation == "softmax" and within and abs(float(outputs_1L.sum()) - 1) < _SUM_TOLERANCE


def _is_wd_tagger(folder: Path) -> bool:
    return (folder / _TAGS).exists() and not (folder / _PREPROCESSOR).exists()


def _tag_names(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "name" not in rows[0]:
        raise ValueError(f"{path.name} has no column 'name'")
    return [row["name"] for row in rows]
