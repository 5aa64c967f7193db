"""The trainable part of a model (all of it, or adapters on a frozen base) and its exponential moving average."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_UPDATES = "updates"  # key of the update count in a saved state


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint stores of a model: the state dict or, if some parameters are frozen, the trainable ones.

    The tensors are the model's own, not copies.
    """
    state: dict[str, Tensor] = model.state_dict()
    trainable = trainable_parameters(model)
    frozen = len(trainable) < len(list(model.parameters()))
    return {name: state[name] for name in trainable} if frozen else state


def load_trainable_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `trainable_state`. Raises RuntimeError, as torch does, for other names or shapes."""
    expected = trainable_state(model).keys()
    if missing := sorted(expected - tensors.keys()):
        raise RuntimeError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    if unknown := sorted(tensors.keys() - expected):
        raise RuntimeError(f"{len(unknown)} tensors are unknown, such as {unknown[0]}")
    model.load_state_dict(dict(tensors), strict=False)


class EMA:
    """Moving averages of a model's trainable parameters, the weights used for sampling and evaluation.

    `weights` holds them in float32 by parameter name; buffers are not averaged. `updates` is the number of updates, a
    0-dim int64 tensor on the model's device, because only the device knows which steps were skipped.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} must be at least 0 and below 1")
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in trainable_parameters(module).items()}
        self.updates = torch.zeros((), dtype=torch.int64, device=next(iter(self.weights.values())).device)
        assert _UPDATES not in self.weights, "a parameter has the name of the update count"

    @torch.no_grad()
    def update(self, module: nn.Module, skip: Tensor | None = None) -> None:
        """average = d * average + (1 - d) * weight, where d = min(decay, (1 + n) / (10 + n)) after n updates.

        The warm-up, which starts at d = 0.1, forgets the random initial weights; a decay of 0.999 alone would carry
        them for thousands of steps. Averages and count stay unchanged where skip, a 0-dim bool tensor on the model's
        device, is true. The host never waits for the device.
        """
        n = self.updates.double()  # in float32, 1 - 0.9999 would be off by one part in a thousand
        share = 1 - torch.clamp((1 + n) / (10 + n), max=self.decay)
        counts = torch.ones_like(self.updates)
        if skip is not None:
            share, counts = share.masked_fill(skip, 0), counts.masked_fill(skip, 0)
        share = share.float()
        for average, parameter in zip(self.weights.values(), self._parameters(module), strict=True):
            # One at a time: torch._foreach_lerp_ would copy a weight that lies on the device to the host.
            average.lerp_(parameter.detach().float(), share)
        self.updates += counts

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module with the averages in place of its weights, which are restored at the end, also after an error."""
        parameters = self._parameters(module)
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, list(self.weights.values()))
        try:
            yield module
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name and the number of updates, all as tensors for a safetensors file."""
        return {**self.weights, _UPDATES: self.updates}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads a saved average. Raises ValueError listing every name and shape that differs from this module's."""
        ours = {(name, tuple(tensor.shape)) for name, tensor in self.state_dict().items()}
        theirs = {(name, tuple(tensor.shape)) for name, tensor in state.items()}
        if ours != theirs:
            raise ValueError(
                f"these EMA weights belong to another model: missing {sorted(ours - theirs)}, "
                f"unknown {sorted(theirs - ours)}. Build the model with the config that was saved beside them"
            )
        torch._foreach_copy_(list(self.weights.values()), [state[name] for name in self.weights])
        self.updates.copy_(state[_UPDATES])

    def _parameters(self, module: nn.Module) -> list[Tensor]:
        parameters = trainable_parameters(module)
        assert list(parameters) == list(self.weights), "the module is not the one that this EMA was built from"
        return list(parameters.values())
