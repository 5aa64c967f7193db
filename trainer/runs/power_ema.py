"""Averages from which others of any length can be made after training (Karras et al., EDM2, arXiv 2312.02696).

A power-function average after t updates weighs the parameters after update s in proportion to s^exponent: the window
grows with the run, and the random initial weights get no weight. Section 3.1 of the paper defines its length as the
standard deviation of the window relative to the run (sigma_rel), for example 0.10. Two averages of different lengths,
saved at several times, span a space of windows; least squares finds the combination that is nearest to a wanted window
(section 3.2, appendix C). Here windows are sums over the updates, not integrals, so short runs are exact too.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.runs.ema import trainable_parameters

_BEGAN, _UPDATES = "began", "updates"  # keys of a saved state besides "<length>/<parameter>"
LONGEST = 1 / math.sqrt(12)  # exponent 0: the plain mean of all updates


def exponent(length: float) -> float:
    """The exponent whose window has this relative standard deviation. ValueError outside (0, LONGEST]."""
    if not 0 < length <= LONGEST:
        raise ValueError(
            f"an EMA length must be above 0 and at most {LONGEST:.4f}, the mean of all steps: got {length}"
        )
    # length^2 = (exponent + 1) / ((exponent + 2)^2 (exponent + 3)), which has one root at or above 0.
    inverse = length**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


class PowerEMA:
    """Running power-function averages of a model's trainable parameters, in float32 on the model's device.

    `updates` counts the updates and `began` is the optimizer step at which they began: 0-dim int64 tensors.
    """

    def __init__(self, module: nn.Module, lengths: Sequence[float], began: int = 0) -> None:
        self.exponents = {length: exponent(length) for length in lengths}
        weights = {name: p.detach().float() for name, p in trainable_parameters(module).items()}
        self.averages = {length: {name: w.clone() for name, w in weights.items()} for length in lengths}
        device = next(iter(weights.values())).device
        self.began = torch.tensor(began, device=device)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, module: nn.Module, skip: Tensor) -> None:
        """Adds the current parameters. Changes nothing where `skip`, a 0-dim bool tensor, is true; never waits."""
        t = (self.updates + 1).double()
        parameters = trainable_parameters(module)
        for length, averages in self.averages.items():
            share = -torch.expm1((self.exponents[length] + 1) * torch.log1p(-1 / t))  # 1 - (1 - 1/t)^(exponent + 1)
            share = share.masked_fill(skip, 0).float()
            for name, average in averages.items():
                average.lerp_(parameters[name].detach().float(), share)
        self.updates += ~skip

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by "<length>/<parameter>", "updates" and "began": not copies."""
        named = {f"{length:g}/{name}": a for length, group in self.averages.items() for name, a in group.items()}
        return named | {_UPDATES: self.updates, _BEGAN: self.began}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> bool:
        """Loads a saved state. False, and no change, for other lengths or parameters, which averages cannot become."""
        own = self.state_dict()
        if {(n, t.shape) for n, t in own.items()} != {(n, t.shape) for n, t in state.items()}:
            return False
        for name, tensor in own.items():
            tensor.copy_(state[name])
        return True


def window(length: float, updates: int, total: int) -> NDArray[np.float64]:
    """(total,), sum 1: the weight of the parameters after each of `total` updates in an average after `updates`."""
    grown = (np.arange(updates + 1) / updates) ** (exponent(length) + 1)
    return np.concatenate([np.diff(grown), np.zeros(total - updates)])


def combination(saved: Sequence[tuple[float, int]], length: float) -> tuple[NDArray[np.float64], float]:
    """Factors of saved averages, given as (length, updates), whose sum is nearest to an average of another length.

    The wanted average ends at the largest number of updates. Also returns the relative error: the norm of the
    difference between both windows over the norm of the wanted one.
    """
    total = max(updates for _, updates in saved)
    wanted = window(length, total, total)
    windows = np.stack([window(each, updates, total) for each, updates in saved])
    factors = np.asarray(np.linalg.lstsq(windows.T, wanted, rcond=None)[0], np.float64)
    return factors, float(np.linalg.norm(windows.T @ factors - wanted) / np.linalg.norm(wanted))
