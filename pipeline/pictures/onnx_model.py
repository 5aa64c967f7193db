"""model.onnx -> a function from normalised pictures to raw outputs. The only file that imports onnxruntime.

Axes: N pictures, H rows, W columns, C channels, L outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Forward = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # normalised (N, H, W, C) -> raw outputs (N, L)


@dataclass(frozen=True)
class OnnxModel:
    forward: Forward
    size: tuple[Any, Any]  # height and width of the input; ints where the graph fixes them
    channels_last: bool
    output: str  # name of the first output


def load_onnx(path: Path, device: str, threads: int) -> OnnxModel:
    """`device` is "cpu" or "cuda". Raises ValueError if the input is not a float32 tensor of N pictures."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    providers = ["CUDAExecutionProvider"] if device == "cuda" else []
    session = onnxruntime.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        found = ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in inputs)
        raise ValueError(f"{path.name} must have one input, a float32 tensor of four axes; it has {found}")
    batch, *axes = inputs[0].shape
    if isinstance(batch, int) and batch != 1:
        raise ValueError(f"{path.name} takes {batch} pictures at a time; export it for one, or for any number")
    if 3 not in (axes[0], axes[2]):
        raise ValueError(f"{path.name} has the input {inputs[0].shape}, neither (N, 3, H, W) nor (N, H, W, 3)")
    channels_last = axes[0] != 3
    height, width = axes[:2] if channels_last else axes[1:]
    output = session.get_outputs()[0].name

    def run(values_NHWC: NDArray[np.float32]) -> NDArray[np.float32]:
        values = np.ascontiguousarray(values_NHWC if channels_last else values_NHWC.transpose(0, 3, 1, 2))
        (result,) = session.run([output], {inputs[0].name: values})
        return np.asarray(result, np.float32).reshape(len(values), -1)

    def run_one_by_one(values_NHWC: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([run(one_1HWC) for one_1HWC in np.split(values_NHWC, len(values_NHWC))])

    return OnnxModel(run_one_by_one if batch == 1 else run, (height, width), channels_last, output)


def onnx_supports_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
