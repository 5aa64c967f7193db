"""Features of pictures for FID and KID: Inception v3 as its first authors trained it for 1008 classes in 2015.

The weights are given as a file, never downloaded. Parameters are named as in the two conversions to PyTorch that the
field uses (pytorch-fid's and torch-fidelity's file of 2015-12-05), so that either file can be given as safetensors.

Szegedy et al. 2015, arXiv 1512.00567, figures 5 to 7 and 10; where that graph differs from torchvision's network: its
average pools leave out the padding, and the branch of the last block pools by the maximum.

Axes: N pictures, C channels, H W rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.encoders.pretrained import first_line
from trainer.model.released import read_tensors

FEATURES = 2048
_SIDE = 299  # pixels: of what it was trained on
_CLASSES = 1008


@dataclass(frozen=True)
class _Conv:
    """Convolution, batch norm, ReLU; at stride 1 the picture keeps its size, at stride 2 nothing is padded."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# A branch is a chain of these; a tuple of convolutions forks, and what they give is joined.
_Step = _Conv | tuple[_Conv, ...] | str  # "average" and "maximum" keep the size, "shrink" halves it
_Block = Sequence[Sequence[_Step]]


def _block_a(pool: int) -> _Block:
    return [
        [_Conv("branch1x1", 64)],
        [_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, (5, 5))],
        [_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3))],
        ["average", _Conv("branch_pool", pool)],
    ]


def _block_c(narrow: int) -> _Block:
    """Each 7 x 7 convolution as a row and a column of it."""
    row, column = (1, 7), (7, 1)
    return [
        [_Conv("branch1x1", 192)],
        [_Conv("branch7x7_1", narrow), _Conv("branch7x7_2", narrow, row), _Conv("branch7x7_3", 192, column)],
        [
            _Conv("branch7x7dbl_1", narrow),
            _Conv("branch7x7dbl_2", narrow, column),
            _Conv("branch7x7dbl_3", narrow, row),
            _Conv("branch7x7dbl_4", narrow, column),
            _Conv("branch7x7dbl_5", 192, row),
        ],
        ["average", _Conv("branch_pool", 192)],
    ]


def _block_e(pool: str) -> _Block:
    return [
        [_Conv("branch1x1", 320)],
        [_Conv("branch3x3_1", 384), (_Conv("branch3x3_2a", 384, (1, 3)), _Conv("branch3x3_2b", 384, (3, 1)))],
        [
            _Conv("branch3x3dbl_1", 448),
            _Conv("branch3x3dbl_2", 384, (3, 3)),
            (_Conv("branch3x3dbl_3a", 384, (1, 3)), _Conv("branch3x3dbl_3b", 384, (3, 1))),
        ],
        [pool, _Conv("branch_pool", 192)],
    ]


_BLOCK_B: _Block = [
    [_Conv("branch3x3", 384, (3, 3), 2)],
    [_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3), 2)],
    ["shrink"],
]
_BLOCK_D: _Block = [
    [_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, (3, 3), 2)],
    [
        _Conv("branch7x7x3_1", 192),
        _Conv("branch7x7x3_2", 192, (1, 7)),
        _Conv("branch7x7x3_3", 192, (7, 1)),
        _Conv("branch7x7x3_4", 192, (3, 3), 2),
    ],
    ["shrink"],
]
# What comes in, and the blocks in their order.
_BLOCKS: dict[str, tuple[int, _Block]] = {
    "Mixed_5b": (192, _block_a(32)),
    "Mixed_5c": (256, _block_a(64)),
    "Mixed_5d": (288, _block_a(64)),
    "Mixed_6a": (288, _BLOCK_B),
    "Mixed_6b": (768, _block_c(128)),
    "Mixed_6c": (768, _block_c(160)),
    "Mixed_6d": (768, _block_c(160)),
    "Mixed_6e": (768, _block_c(192)),
    "Mixed_7a": (768, _BLOCK_D),
    "Mixed_7b": (1280, _block_e("average")),
    "Mixed_7c": (2048, _block_e("maximum")),
}


class _ConvNorm(nn.Module):
    def __init__(
        self, channels: int, out: int, kernel: tuple[int, int], stride: int = 1, padded: bool | None = None
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if (stride == 1 if padded is None else padded) else (0, 0)
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_NCHW)))


class _Mixed(nn.Module):
    """Branches over the same input, joined along the channels."""

    def __init__(self, channels: int, block: _Block) -> None:
        super().__init__()
        self._block = block
        for branch in block:
            before = channels
            for step in branch:
                convs = (step,) if isinstance(step, _Conv) else step
                if isinstance(convs, str):
                    continue
                for conv in convs:
                    self.add_module(conv.name, _ConvNorm(before, conv.channels, conv.kernel, conv.stride))
                before = sum(conv.channels for conv in convs)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        branches = []
        for branch in self._block:
            y_NCHW = x_NCHW
            for step in branch:
                y_NCHW = self._step(step, y_NCHW)
            branches.append(y_NCHW)
        return torch.cat(branches, 1)

    def _step(self, step: _Step, y_NCHW: Tensor) -> Tensor:
        if isinstance(step, _Conv):
            done: Tensor = self.get_submodule(step.name)(y_NCHW)
            return done
        if isinstance(step, tuple):
            return torch.cat([self._step(conv, y_NCHW) for conv in step], 1)
        if step == "average":
            return F.avg_pool2d(y_NCHW, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(y_NCHW, 3, 1, 1) if step == "maximum" else F.max_pool2d(y_NCHW, 3, 2)


class Inception(nn.Module):
    """uint8 pictures (N, 3, H, W) of any size -> features (N, FEATURES), fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNorm(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = _ConvNorm(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = _ConvNorm(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = _ConvNorm(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _ConvNorm(80, 192, (3, 3), padded=False)
        for name, (channels, block) in _BLOCKS.items():
            self.add_module(name, _Mixed(channels, block))
        self.fc = nn.Linear(FEATURES, _CLASSES)  # in the file; FID and KID stop before it
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "Inception":
        """ValueError, with the mend, for a file that is no safetensors or holds another network's weights."""
        tensors = read_tensors(path)
        # torchvision's and Keras' networks of the same name give other features: their FID would be nobody's.
        found = tuple(tensors["fc.weight"].shape) if "fc.weight" in tensors else None
        model = cls()
        try:
            if found != (_CLASSES, FEATURES):
                raise ValueError(f"its fc.weight is {found}, not {(_CLASSES, FEATURES)}")
            counters = {name: value for name, value in model.state_dict().items() if name.endswith("batches_tracked")}
            model.load_state_dict(counters | tensors)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path} is not the Inception of FID ({first_line(error)}); give the weights of 2015-12-05 that "
                "pytorch-fid and torch-fidelity publish, as safetensors"
            ) from error
        return model.to(device)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        x_NCHW = pixels_N3HW.float()
        # torchmetrics' own way: antialiased, half-pixel centres. FIDs of programs that resize otherwise differ (Parmar
        # et al. 2022, arXiv 2104.11222).
        x_NCHW = F.interpolate(x_NCHW, (_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=True)
        x_NCHW = (x_NCHW - 128) / 128
        x_NCHW = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_NCHW)))
        x_NCHW = F.max_pool2d(x_NCHW, 3, 2)
        x_NCHW = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x_NCHW)), 3, 2)
        for name in _BLOCKS:
            x_NCHW = self.get_submodule(name)(x_NCHW)
        return x_NCHW.mean((2, 3))

    @torch.no_grad()
    def features(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(N, FEATURES), on the CPU, of pictures (H, W, 3) of one size."""
        pixels_N3HW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(self.fc.weight.device)
        features_NC: Tensor = self(pixels_N3HW)
        return features_NC.cpu()
