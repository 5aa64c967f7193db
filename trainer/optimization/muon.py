"""The Muon optimizer (Jordan et al. 2024): steps by the nearly orthogonalised momentum of each matrix.

torch.optim.Muon handles one matrix at a time and always in bfloat16. On a CPU without bfloat16 arithmetic that takes
2.4 s for a step of the demo's model, whose whole training step otherwise takes 0.2 s (tests/bench/RESULTS.md). This one
batches matrices of one shape, in float32 on a CPU and in bfloat16 on a GPU.

Axes: M matrices of one shape, R rows, C columns, R <= C.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# The authors' Newton-Schulz iteration x -> a x + b x^3 + c x^5. Five iterations move singular values in [0.01, 1] into
# [0.7, 1.2], in fewer iterations than convergence to exactly 1 would need.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalise(matrices_MRC: Tensor) -> Tensor:
    """Moves the singular values of each matrix to about 1 (0.7 to 1.2) and keeps its singular vectors."""
    dtype = torch.bfloat16 if matrices_MRC.is_cuda else torch.float32
    x_MRC = matrices_MRC.to(dtype)
    x_MRC = x_MRC / x_MRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value exceeds the Frobenius norm
    for _ in range(_ITERATIONS):
        gram_MRR = x_MRC @ x_MRC.mT
        polynomial_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=_B, alpha=_C)
        x_MRC = torch.baddbmm(x_MRC, polynomial_MRR, x_MRC, beta=_A)
    return x_MRC.to(matrices_MRC.dtype)


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised steps and decoupled weight decay, for matrices.

    Steps are scaled by sqrt(max(1, rows / columns)), as by its authors, so one learning rate serves every shape and
    width. As in torch's fused optimizers, a step changes nothing if `found_inf`, a 0-dim tensor on the device, is not
    0; the host does not wait for it. Raises ValueError for a parameter that is not a matrix.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.dim() != 2:
                raise ValueError(f"Muon steps matrices only: got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Muon does not re-evaluate the loss"
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.shape)].append(parameter)
            for parameters in by_shape.values():
                self._step_same_shape(parameters, group)

    def _step_same_shape(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of all matrices of one shape, as a batch."""
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
            step_MRC, kept = (
                step_MRC.masked_fill(skip, 0),
                kept.masked_fill(skip, 1),
            )  # 0 * nan would be nan
        torch._foreach_copy_(momenta, momentum_MRC.unbind())
        torch._foreach_mul_(parameters, kept)
        torch._foreach_add_(parameters, step_MRC.unbind(), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
