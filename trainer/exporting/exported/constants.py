"""Constants of a model stay float32 whatever its weights are cast to: in half precision frequencies would turn times
and positions by other angles than in training, and the rows of a codec's matrix would not be orthonormal."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import is_accelerate_available
from torch import nn


def kept_in_fp32(*names: str) -> list[str] | None:
    """For `_keep_in_fp32_modules`, which diffusers takes only where accelerate loads the weights. Elsewhere, and after
    loading, `constants_kept` does the same."""
    return list(names) if is_accelerate_available() else None


@contextmanager
def constants_kept(module: nn.Module) -> Iterator[None]:
    """For `_apply`: what happens inside may move the module's buffers to another device and not change their type."""
    constants = {name: constant for name, constant in module.named_buffers() if not constant.is_meta}
    yield
    for name, constant in constants.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, constant.to(module.get_buffer(name).device))
