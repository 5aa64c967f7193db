"""Attention over sequences of unequal lengths: kernels that give the same result at different speeds.

The sequences of a batch end with padding, which no real token may attend to. `scaled_dot_product_attention` needs a
mask for that, and with a mask it cannot use flash attention. Flash attention for sequences of variable length needs
none: if the padded batch is one row of tokens, a sample's real tokens are one sequence and its padding is another.

Axes: B batch, S tokens, A heads, E dims of a head.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

# default: torch's choice among kernels that take a mask. varlen: flash attention, for half precision on a GPU.
Kernel = Literal["default", "efficient", "cudnn", "varlen"]

_TOLERANCE: Final = 0.02  # relative; bfloat16 rounds by up to 2^-9, attending to padding changes a tenth or more
_ROUNDS: Final = 10
_SAMPLES: Final = 8

_BACKENDS = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Padding(NamedTuple):
    """Which tokens are padding, in the form that the kernel needs: one of the two is None."""

    key_mask: Tensor | None  # (B, 1, 1, S), True where a token may be attended to
    boundaries: Tensor | None  # (2B + 1,), of varlen

    def of_kept(self, index_BK: Tensor, tokens: int) -> "Padding":
        """The padding of the selected tokens, if all that are left out are real ones."""
        kept = index_BK.shape[1]
        if self.boundaries is not None:
            lengths_B = self.boundaries[1::2] - self.boundaries[:-1:2]
            return Padding(None, boundaries(lengths_B - (tokens - kept), kept))
        assert self.key_mask is not None
        return Padding(self.key_mask.gather(3, index_BK[:, None, None, :]), None)


def padding_of(real_BS: Tensor, kernel: Kernel) -> Padding:
    """real_BS: True at real tokens, which come first in each sample if the kernel is varlen."""
    if kernel == "varlen":
        return Padding(None, boundaries(real_BS.sum(1), real_BS.shape[1]))
    return Padding(real_BS[:, None, None, :], None)


def boundaries(lengths_B: Tensor, tokens: int) -> Tensor:
    """Where sequences begin and end in the row of all tokens (B * S) of a padded batch: (2B + 1,), int32.

    lengths_B: real tokens of each sample, which come first. The sequences are the real tokens of the first sample, its
    padding, the real tokens of the second, and so on. Those without padding have an empty second sequence.
    """
    starts_B = torch.arange(len(lengths_B), device=lengths_B.device) * tokens
    pairs_B2 = torch.stack([starts_B, starts_B + lengths_B], dim=1).flatten()
    return torch.cat([pairs_B2, pairs_B2.new_full((1,), len(lengths_B) * tokens)]).int()


def attention(
    q_BSAE: Tensor,
    k_BSAE: Tensor,
    v_BSAE: Tensor,
    padding: "Padding | None",
    kernel: Kernel,
) -> Tensor:
    """Attended values (B, S, A, E) of real tokens; those of padding are finite and mean nothing. None: no padding."""
    if padding is not None and padding.boundaries is not None:
        batch, tokens = q_BSAE.shape[:2]
        q, k, v = (x_BSAE.to(v_BSAE.dtype).flatten(0, 1) for x_BSAE in (q_BSAE, k_BSAE, v_BSAE))
        cu_sequences = padding.boundaries
        attended: Tensor = varlen_attn(q, k, v, cu_sequences, cu_sequences, tokens, tokens)
        return attended.reshape(batch, tokens, *q.shape[1:])
    mask = None if padding is None else padding.key_mask
    backend = _BACKENDS.get(kernel)
    choice: Any = sdpa_kernel(backend) if backend else nullcontext()
    with choice:
        attended_BASE = F.scaled_dot_product_attention(
            q_BSAE.transpose(1, 2), k_BSAE.transpose(1, 2), v_BSAE.transpose(1, 2), attn_mask=mask
        )
    return attended_BASE.transpose(1, 2)


def measure(
    device: torch.device,
    heads: int,
    head_dim: int,
    image_tokens: int,
    text_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[Kernel, float]:
    """Seconds of a forward and a backward pass by each kernel that runs here and agrees with torch's default.

    Texts have from a quarter of `text_tokens` to all of them.
    """
    tokens = image_tokens + text_tokens
    generator = torch.Generator(device).manual_seed(0)
    shape = (4, _SAMPLES, tokens, heads, head_dim)
    *qkv, gradient_BSAE = torch.randn(shape, generator=generator, device=device, dtype=dtype).unbind(0)
    lengths_B = torch.linspace(image_tokens + text_tokens / 4, tokens, _SAMPLES, device=device).long()
    real_BS = torch.arange(tokens, device=device) < lengths_B[:, None]
    gradient_BSAE = gradient_BSAE * real_BS[:, :, None, None]

    def run(kernel: Kernel) -> list[Tensor]:
        inputs = q, k, v = [x_BSAE.detach().requires_grad_() for x_BSAE in qkv]
        out_BSAE = attention(q, k, v, padding_of(real_BS, kernel), kernel)
        torch.autograd.backward(out_BSAE, gradient_BSAE)
        return [x[real_BS].float() for x in (out_BSAE.detach(), *(x.grad for x in inputs if x.grad is not None))]

    expected = run("default")
    seconds: dict[Kernel, float] = {}
    for kernel in get_args(Kernel):
        try:
            found = run(kernel)
        except (RuntimeError, TypeError, NotImplementedError):  # not for this device, dtype or head size
            continue
        if all((a - b).norm() < _TOLERANCE * b.norm() for a, b in zip(found, expected, strict=True)):
            seconds[kernel] = min(_timed(partial(run, kernel), device) for _ in range(_ROUNDS))
    return seconds


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
