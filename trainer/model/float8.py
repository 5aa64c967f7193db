"""Float8 matrix products in the blocks of an XUT, by torchao.

Weights, inputs and gradients of a layer are multiplied by one scale per tensor, from its largest value at that moment,
and rounded to float8 (e4m3; gradients e5m2) for each of the layer's three products. Parameters stay plain float32
under the same names, so checkpoints, averages and exports are those of any other model.
"""

from importlib.util import find_spec

import torch
from torch import nn

from trainer.model.blocks import AdaLN, Block
from trainer.model.xut import XUT

_MULTIPLE = 16  # of both dimensions of a matrix, which cuBLAS's float8 products need
_FIRST_CAPABILITY = (8, 9)  # Ada; Hopper and Blackwell have float8 too


def check_installed() -> None:
    """Raises ValueError with the command that installs torchao if it is missing."""
    if find_spec("torchao") is None:
        raise ValueError(
            'fp8=true needs torchao, which is not installed; run: pip install -c deploy/constraints.txt -e ".[fp8]"'
        )


def use_float8(model: XUT, emulate: bool = False) -> int:
    """Converts the linear layers of the blocks in place, before optimizer and compilation. Returns how many.

    Layers whose dimensions are not multiples of 16 stay as they are, and so do adaLN's, which see one vector per
    sample. emulate: round to float8 but multiply in the layer's own dtype, which runs on any device, slowly.
    ValueError without torchao, or for a device that has no float8 products.
    """
    check_installed()
    device = next(model.parameters()).device
    if not emulate:
        _check_device(device)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    blocks = [module for module in model.modules() if isinstance(module, Block)]
    small = {id(layer) for module in model.modules() if isinstance(module, AdaLN) for layer in module.modules()}
    converted = 0

    def fits(layer: nn.Module, name: str) -> bool:
        nonlocal converted
        assert isinstance(layer, nn.Linear), name
        chosen = id(layer) not in small and layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0
        converted += chosen
        return chosen

    # The number of tokens, over which the gradient of a weight is summed, need not be a multiple of 16: it is padded.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for block in blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=fits)
    return converted


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"fp8=true needs a GPU with float8 matrix products, and the device is {device}: set fp8=false")
    capability = torch.cuda.get_device_capability(device)
    if capability < _FIRST_CAPABILITY:
        raise ValueError(
            f"fp8=true needs a GPU of compute capability 8.9 or higher, such as an RTX 4090 or an H100; "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: set fp8=false"
        )
