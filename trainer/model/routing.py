"""TREAD token routing: a share of the image tokens bypasses the middle blocks unchanged (arXiv 2501.04765).

Which tokens a sample keeps depends only on its routing key, so they are the same in any batch, on any device and with
any number of workers. Shapes depend only on the rate and the host never waits for the device, so a routed step compiles
to one graph.

Axes: B batch, N image tokens, T text tokens, S = N + T, K kept tokens (some image tokens and all text), D width.
"""

import torch
from torch import Tensor


def kept_image_tokens(image_tokens: int, selection_rate: float) -> int:
    """The number of image tokens that pass through the routed blocks: N * (1 - rate), rounded, and at least 1.

    Raises ValueError unless the rate is in [0, 1).
    """
    if not 0.0 <= selection_rate < 1.0:
        raise ValueError(
            f"selection_rate is the share of image tokens that skip the routed blocks, in [0, 1): got {selection_rate}"
        )
    return max(1, image_tokens - round(image_tokens * selection_rate))


def select_tokens(key_B: Tensor, image_tokens: int, text_tokens: int, selection_rate: float) -> Tensor:
    """Ascending indices (B, K) of the kept tokens in a sequence of image then text tokens; all text is kept.

    key_B: int64. The kept image tokens are those with the lowest hashes of (key, index), which is a uniform draw
    without replacement.
    """
    kept = kept_image_tokens(image_tokens, selection_rate)
    index_N = torch.arange(image_tokens, device=key_B.device)
    low_B1, high_B1 = (key_B & 0xFFFFFFFF)[:, None], ((key_B >> 32) & 0xFFFFFFFF)[:, None]
    score_BN = _hash32(_hash32(_hash32(index_N + 1) ^ low_B1) ^ high_B1)
    # The index in the low bits makes all scores distinct, so every device sorts them alike.
    unique_BN = (score_BN << 24) | index_N
    image_BK = torch.topk(unique_BN, kept, dim=1, largest=False, sorted=False).values & 0xFFFFFF
    text_T = torch.arange(image_tokens, image_tokens + text_tokens, device=key_B.device)
    return torch.cat([image_BK.sort(dim=1).values, text_T.expand(key_B.shape[0], text_tokens)], dim=1)


def gather_tokens(x_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """The selected tokens (B, K, ...) of a sequence (B, S, ...)."""
    index = index_BK.reshape(*index_BK.shape, *[1] * (x_BSD.dim() - 2)).expand(-1, -1, *x_BSD.shape[2:])
    return x_BSD.gather(1, index)


def scatter_tokens(x_BSD: Tensor, index_BK: Tensor, kept_BKD: Tensor) -> Tensor:
    """The sequence x with the selected tokens replaced; the others stay bit-identical."""
    return x_BSD.scatter(1, index_BK[:, :, None].expand_as(kept_BKD), kept_BKD.to(x_BSD.dtype))


def _hash32(x: Tensor) -> Tensor:
    """The `lowbias32` hash of the low 32 bits of an int64.

    -0x7B935975 is 0x846CA68B modulo 2^32, chosen so that the product fits into int64.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * -0x7B935975) & 0xFFFFFFFF
    return x ^ (x >> 16)
