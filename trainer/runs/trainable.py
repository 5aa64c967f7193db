"""What of a model a training changes, all of it or adapters on a frozen base: that is averaged, saved and loaded."""

from collections.abc import Mapping

from torch import Tensor, nn


def learning_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def learnt_state(model: nn.Module) -> dict[str, Tensor]:
    """By name, not copies: the whole state or, of a model that is partly frozen, the parameters that learn."""
    state: dict[str, Tensor] = model.state_dict()
    learning = learning_parameters(model)
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return {name: state[name] for name in learning} if frozen else state


def load_learnt_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse; what is frozen stays. RuntimeError, as of torch's `load_state_dict`, for a state of other names or
    shapes."""
    wanted = learnt_state(model).keys()
    if missing := sorted(wanted - tensors.keys()):
        raise RuntimeError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    if unknown := sorted(tensors.keys() - wanted):
        raise RuntimeError(f"{len(unknown)} tensors are unknown, such as {unknown[0]}")
    model.load_state_dict(dict(tensors), strict=False)
