"""Features for FID and KID: the Inception v3 that its authors trained for 1008 classes in 2015.

The weights are read from a file, never downloaded. Their names and shapes are those of the PyTorch conversions that
pytorch-fid and torch-fidelity publish (2015-12-05); either can be given after conversion to safetensors.

Szegedy et al. 2015, arXiv 1512.00567, figures 5 to 7 and 10. Differences from torchvision's network: average pools do
not count the padding, and the last block pools by the maximum.

Axes: N pictures, C channels, H W rows and columns.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.model.released import read_tensors

FEATURES = 2048
_BATCH = 32  # pictures
_SIDE = 299  # pixels: what the network was trained on
# SHA-256 of the names and shapes of the tensors, as JSON.
_LAYOUT = "4f5e4b100286952afb401a7c4049d030b8e427e342e90dd345e82fcc106bbb52"
_CONVOLUTION = ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias")
# A chain of steps: pools and convolutions, with "/stride" if there is no padding and with "+" between two that fork.
_STEM = "Conv2d_1a_3x3/2 Conv2d_2a_3x3/1 Conv2d_2b_3x3 max_pool/2 Conv2d_3b_1x1 Conv2d_4a_3x3/1 max_pool/2"
# The chains of a block, whose outputs are joined along the channels.
_BLOCK_A = (
    "branch1x1",
    "branch5x5_1 branch5x5_2",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "average_pool branch_pool",
)
_BLOCK_B = ("branch3x3/2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2", "max_pool/2")
_BLOCK_C = (
    "branch1x1",
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
    "average_pool branch_pool",
)
_BLOCK_D = ("branch3x3_1 branch3x3_2/2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2", "max_pool/2")
_BLOCK_E = (
    "branch1x1",
    "branch3x3_1 branch3x3_2a+branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a+branch3x3dbl_3b",
)
_BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _BLOCK_A),
    "Mixed_6a": _BLOCK_B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _BLOCK_C),
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": (*_BLOCK_E, "average_pool branch_pool"),
    "Mixed_7c": (*_BLOCK_E, "max_pool branch_pool"),
}


class Inception:
    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "Inception":
        """Raises ValueError if the file is not safetensors or holds the weights of another network."""
        weights = {
            name: tensor.to(device, torch.float32)
            for name, tensor in read_tensors(path).items()
            if not name.endswith("num_batches_tracked")
        }
        # torchvision and Keras have networks of this name, whose FID is not comparable.
        layout = json.dumps({name: list(weights[name].shape) for name in sorted(weights)})
        if hashlib.sha256(layout.encode()).hexdigest() != _LAYOUT:
            fc_shape = tuple(weights["fc.weight"].shape) if "fc.weight" in weights else None
            raise ValueError(
                f"{path} is not the Inception of FID: names or shapes differ (fc.weight {fc_shape}, expected (1008, "
                "2048)). Give the weights of 2015-12-05 that pytorch-fid or torch-fidelity publishes, as safetensors."
            )
        return cls(weights)

    def features(self, pictures: Iterable[NDArray[np.uint8]]) -> Tensor:
        """Features (N, FEATURES) on the CPU of pictures (H, W, 3) of one size, a batch in memory at a time."""
        remaining, batches = iter(pictures), [torch.empty(0, FEATURES)]
        while batch := list(islice(remaining, _BATCH)):
            batches.append(self._batch_features(batch))
        return torch.cat(batches)

    @torch.no_grad()
    def _batch_features(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        pixels_N3HW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(self._weights["fc.weight"].device)
        # Antialiased with half-pixel centres, as torchmetrics does. Other ways of resizing give other FIDs (Parmar et
        # al. 2022, arXiv 2104.11222).
        x_NCHW = F.interpolate(
            pixels_N3HW.float(), (_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=True
        )
        x_NCHW = self._chain((x_NCHW - 128) / 128, "", _STEM)
        for block, chains in _BLOCKS.items():
            x_NCHW = torch.cat([self._chain(x_NCHW, f"{block}.", steps) for steps in chains], 1)
        return x_NCHW.mean((2, 3)).cpu()

    def _chain(self, x_NCHW: Tensor, prefix: str, steps: str) -> Tensor:
        for step in steps.split():
            name, _, stride = step.partition("/")
            if name == "average_pool":
                x_NCHW = F.avg_pool2d(x_NCHW, 3, 1, 1, count_include_pad=False)
            elif name == "max_pool":
                x_NCHW = F.max_pool2d(x_NCHW, 3, int(stride or 1), 0 if stride else 1)
            else:
                x_NCHW = torch.cat([self._convolve(x_NCHW, prefix + one, stride) for one in name.split("+")], 1)
        return x_NCHW

    def _convolve(self, x_NCHW: Tensor, name: str, stride: str) -> Tensor:
        """Convolution, batch norm, ReLU. Without a stride, the output has the size of the input."""
        kernel, mean, var, scale, bias = (self._weights[f"{name}.{part}"] for part in _CONVOLUTION)
        rows, columns = kernel.shape[2:]
        x_NCHW = F.conv2d(x_NCHW, kernel, None, int(stride or 1), 0 if stride else (rows // 2, columns // 2))
        return F.relu(F.batch_norm(x_NCHW, mean, var, scale, bias, eps=1e-3))
