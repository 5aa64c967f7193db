"""An exponential moving average of what a module learns: the weights that are sampled from and evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.runs.trainable import learning_parameters

_UPDATES = "updates"  # the count's name in a saved state


class EMA:
    """`weights` holds the averages in fp32, by parameter name: what `module.load_state_dict` takes (buffers, and
    parameters that are frozen, apart).

    `updates` counts them, a 0-dim int64 tensor on the module's device: whether a step counts is known only there.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} must be at least 0 and below 1")
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in learning_parameters(module).items()}
        self.updates = torch.zeros((), dtype=torch.int64, device=next(iter(self.weights.values())).device)
        assert _UPDATES not in self.weights, "a parameter has the name of the count of updates"

    @torch.no_grad()
    def update(self, module: nn.Module, skip: Tensor | None = None) -> None:
        """average = d * average + (1 - d) * weight, with d = min(decay, (1 + n) / (10 + n)) after n updates.

        The warm-up (0.1 at first) lets go of the random start, which 0.999 would carry for thousands of steps.
        Averages and count stay where skip, a 0-dim bool on the module's device, is true; the host does not wait for it.
        """
        n = self.updates.double()  # 1 - 0.9999 in float32 would be off by one part in a thousand
        share = 1 - torch.clamp((1 + n) / (10 + n), max=self.decay)
        counts = torch.ones_like(self.updates)
        if skip is not None:
            share, counts = share.masked_fill(skip, 0), counts.masked_fill(skip, 0)
        share = share.float()
        for average, (_, parameter) in zip(self.weights.values(), self._parameters(module), strict=True):
            # One by one: torch._foreach_lerp_ takes no share that lies on the device without fetching it.
            average.lerp_(parameter.detach().float(), share)
        self.updates += counts

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module with the averages in place of its weights, which come back at the end, also after an error."""
        parameters = self._parameters(module)
        kept = [p.detach().clone() for _, p in parameters]
        with torch.no_grad():
            torch._foreach_copy_([p for _, p in parameters], list(self.weights.values()))
        try:
            yield module
        finally:
            with torch.no_grad():
                torch._foreach_copy_([p for _, p in parameters], kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name and the count of updates, all tensors: what a safetensors file holds."""
        return {**self.weights, _UPDATES: self.updates}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up a saved average. ValueError, with all of them, where its names or shapes are not this module's."""
        ours = {name: tuple(w.shape) for name, w in self.weights.items()} | {_UPDATES: ()}
        theirs = {name: tuple(w.shape) for name, w in state.items()}
        if ours != theirs:
            missing = sorted(set(ours.items()) - set(theirs.items()))
            unknown = sorted(set(theirs.items()) - set(ours.items()))
            raise ValueError(
                f"these EMA weights are of another model: missing {missing}, unknown {unknown}; "
                "build the model with the config that was saved beside them"
            )
        torch._foreach_copy_(list(self.weights.values()), [state[name] for name in self.weights])
        self.updates.copy_(state[_UPDATES])

    def _parameters(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        parameters = list(learning_parameters(module).items())
        assert [name for name, _ in parameters] == list(self.weights), "an EMA follows the module it was made from"
        return parameters
