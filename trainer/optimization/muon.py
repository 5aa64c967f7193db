"""Muon (Jordan et al. 2024): the momentum of a matrix, made nearly orthogonal, is the step.

torch.optim.Muon does the same, one matrix after the other and always in bfloat16: 2.4 s for a step of the demo's model
on a CPU without bfloat16 products, where the rest of a training step takes 0.2 s (tests/bench/RESULTS.md). Here the
matrices of one shape go together, in float32 on a CPU and in bfloat16 on a GPU.

Axes: M matrices of one shape, R rows, C columns, R <= C.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# The odd polynomial a x + b x^3 + c x^5 of Muon's authors: five times over it takes singular values from 0.01 to 1 to
# between 0.7 and 1.2, sooner than it would take them to exactly 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalise(matrices_MRC: Tensor) -> Tensor:
    """Each matrix with its singular values moved to about 1 (0.7 to 1.2), its singular vectors kept."""
    dtype = torch.bfloat16 if matrices_MRC.is_cuda else torch.float32
    x_MRC = matrices_MRC.to(dtype)
    x_MRC = x_MRC / x_MRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above the norm
    for _ in range(_ITERATIONS):
        gram_MRR = x_MRC @ x_MRC.mT
        polynomial_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=_B, alpha=_C)
        x_MRC = torch.baddbmm(x_MRC, polynomial_MRR, x_MRC, beta=_A)
    return x_MRC.to(matrices_MRC.dtype)


class Muon(Optimizer):
    """Nesterov momentum, orthogonal steps, decoupled weight decay. Takes matrices only.

    A step is scaled by sqrt(max(1, rows / columns)), as its authors do, so that one rate serves every shape and width.
    As with torch's fused optimizers, weights and momenta stay as they are where `found_inf`, a 0-dim tensor on the
    device, is not 0; the host does not wait for it.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.dim() != 2:
                raise ValueError(f"Muon steps matrices only: got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loss is not evaluated again"
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.shape)].append(parameter)
            for parameters in by_shape.values():
                self._step_alike(parameters, group)

    def _step_alike(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of matrices that have the same shape."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        before_MRC, gradient_MRC = torch.stack(momenta), torch.stack(gradients)
        momentum_MRC = torch.lerp(before_MRC, gradient_MRC, 1 - group["momentum"])
        ahead_MRC = torch.lerp(gradient_MRC, momentum_MRC, group["momentum"])
        rows, columns = ahead_MRC.shape[1:]
        step_MRC = orthogonalise(ahead_MRC) if rows <= columns else orthogonalise(ahead_MRC.mT).mT
        kept = torch.full((), 1 - group["lr"] * group["weight_decay"], device=step_MRC.device)
        if self.found_inf is not None:
            skip = self.found_inf.bool()
            momentum_MRC = torch.where(skip, before_MRC, momentum_MRC)
            step_MRC, kept = step_MRC.masked_fill(skip, 0), kept.masked_fill(skip, 1)  # 0 times nan would be nan
        torch._foreach_copy_(momenta, momentum_MRC.unbind())
        torch._foreach_mul_(parameters, kept)
        torch._foreach_add_(parameters, step_MRC.unbind(), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
