"""Keeps constants of a model in float32 when its weights are cast. In half precision, frequencies would rotate times
and positions by other angles than in training, and the rows of a codec's matrix would not be orthonormal."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import is_accelerate_available
from torch import nn


def kept_in_fp32(*names: str) -> list[str] | None:
    """For `_keep_in_fp32_modules`, which diffusers accepts only if accelerate loads the weights. Otherwise, and after
    loading, `constants_kept` does the same."""
    return list(names) if is_accelerate_available() else None


@contextmanager
def constants_kept(module: nn.Module) -> Iterator[None]:
    """For `_apply`: buffers keep their dtype, although they may move to another device."""
    constants = {name: constant for name, constant in module.named_buffers() if not constant.is_meta}
    yield
    for name, constant in constants.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, constant.to(module.get_buffer(name).device))
