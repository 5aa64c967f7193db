"""The optimizer: learning rates by muP role in a few fused parameter groups.

Under muP (arXiv 2203.03466, table 3, Adam) the best learning rate does not depend on the width if hidden and output
matrices learn at rate / fan_in and everything else at the plain rate, so a rate found on a narrow model fits a wide
one. The projection of the text learns at rate / fan_in too: its fan-in is the width of the text encoder. The papers'
0.5 "at base dim 1" is 0.5 / 128 = 0.0039 at our base width, and 0.5 / 1024 in the hidden matrices of XUT-base.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from trainer.optimization.muon import Muon

Role = Literal["input", "text", "hidden", "condition", "output", "vector", "frozen"]

# The matrices of an adapter (trainer.runs.lora), whose rank does not grow with the width: A has a fixed fan-out, B a
# fixed fan-in. muP thus gives A rate / fan_in and B the plain rate, which LoRA+ (arXiv 2402.12354) finds best. Muon is
# unsuitable: it fixes the spectral norm of updates to A and to B, but the model sees their product.
_ADAPTER_ROLES: dict[str, Role] = {"lora_A": "output", "lora_B": "input"}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of optimizer and schedule. Defaults: the papers' first stage, with the best rate for the demo's width.

    Raises ValueError naming the field if a value is out of range.
    """

    # muon: Muon for hidden matrices, AdamW for the rest. The condition's matrices stay with AdamW because the rank of
    # their gradient is at most the number of samples, and Muon would amplify noise in all other directions.
    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-3  # AdamW's peak, at the base width
    base_width: int = 128  # fan-in at which hidden matrices learn at the plain rate; the demo's width
    betas: tuple[float, float] = (0.9, 0.98)  # the papers use 0.995 from the 512 stage on
    eps: float = 1e-8
    weight_decay: float = 0.02  # matrices only; the papers use 0.005, then 0.002 in later stages
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay; see schedule.py
    warmup_steps: int = 1000
    decay_share: float = 0.2  # of the steps, with schedule=wsd
    final_ratio: float = 0.01  # learning rate of the last step, as a share of the peak
    # Muon's steps have the same spectral norm at every width, so its rate is not scaled. 0.02 is its authors' choice.
    muon_learning_rate: float = 0.02
    muon_momentum: float = 0.95

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise ValueError(f"optimizer kind must be adamw or muon: got {self.kind!r}")
        if self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"optimizer schedule must be cosine or wsd: got {self.schedule!r}")
        for name in ("learning_rate", "muon_learning_rate", "eps", "base_width"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in ("weight_decay", "warmup_steps"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("betas", all(0 <= beta < 1 for beta in self.betas), "at least 0 and below 1")
        self._require("muon_momentum", 0 <= self.muon_momentum < 1, "at least 0 and below 1")
        self._require("decay_share", 0 <= self.decay_share <= 1, "from 0 to 1")
        self._require("final_ratio", 0 <= self.final_ratio <= 1, "from 0 to 1")

    def _require(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"optimizer {name} must be {expected}: got {getattr(self, name)}")


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The muP role of every parameter, by name.

    frozen: does not require gradients. vector: biases, norms, rotary frequencies. Matrices have one of five roles:
    input, if the fan-in does not grow with the width (the model lists these layers in INPUT_LAYERS); text, if it is the
    text encoder's width (TEXT_LAYERS); output, if the fan-out does not grow (OUTPUT_LAYERS); condition, if both grow
    and the layer sees one vector per sample (CONDITION_LAYERS); hidden, if both grow and it sees tokens. The A and B
    matrices of adapters are output and input.
    """
    inputs = cast(tuple[str, ...], model.INPUT_LAYERS)
    texts = cast(tuple[str, ...], model.TEXT_LAYERS)
    outputs = cast(tuple[str, ...], model.OUTPUT_LAYERS)
    conditions = set(cast(tuple[str, ...], model.CONDITION_LAYERS))

    def role(name: str, parameter: nn.Parameter) -> Role:
        layer = name.rpartition(".")[0]
        if not parameter.requires_grad:
            return "frozen"
        if parameter.dim() != 2:
            return "vector"
        if adapter := _ADAPTER_ROLES.keys() & set(layer.split(".")):
            return _ADAPTER_ROLES[adapter.pop()]
        if layer in inputs:
            return "input"
        if layer in texts:
            return "text"
        if layer in outputs:
            return "output"
        return "condition" if conditions & set(layer.split(".")) else "hidden"

    return {name: role(name, parameter) for name, parameter in model.named_parameters()}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """One optimizer for all trainable parameters. Each group has its peak rate as `initial_lr` and its `role`.

    model: the model itself, not a compiled or distributed wrapper, whose parameter names differ.
    """
    roles = parameter_roles(model)
    members: dict[tuple[Role, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        role = roles[name]
        if role == "condition" and config.kind == "adamw":
            role = "hidden"  # one group: only Muon distinguishes them
        if role != "frozen":
            scaled = role in ("text", "output", "condition") or (role == "hidden" and config.kind == "adamw")
            members[role, config.base_width / parameter.shape[1] if scaled else 1.0].append(parameter)

    def groups(with_muon: bool) -> list[dict[str, Any]]:
        peak = config.muon_learning_rate if with_muon else config.learning_rate
        return [
            {
                "params": parameters,
                "lr": peak * scale,
                "initial_lr": peak * scale,
                "weight_decay": 0.0 if role == "vector" else config.weight_decay,
                "role": role,
            }
            for (role, scale), parameters in members.items()
            if (config.kind == "muon" and role == "hidden") == with_muon
        ]

    adamw = AdamW(groups(with_muon=False), betas=config.betas, eps=config.eps, fused=True)
    for_muon = groups(with_muon=True)
    return MuonAndAdamW(Muon(for_muon, momentum=config.muon_momentum), adamw) if for_muon else adamw


class MuonAndAdamW(Optimizer):
    """Muon and AdamW, each with its own groups, behind one list of groups, one state dict and one `found_inf`."""

    found_inf: Tensor | None = None

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts: tuple[tuple[Optimizer, int, int], ...] = ()
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        split = len(muon.param_groups)
        self.parts = ((muon, 0, split), (adamw, split, len(self.param_groups)))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "neither optimizer re-evaluates the loss"
        for part, first, last in self.parts:
            # Assigned at every step because load_state_dict replaces both.
            part.param_groups, part.state = self.param_groups[first:last], self.state
            part.found_inf = self.found_inf  # type: ignore[attr-defined]
            part.step()


def step_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """One optimizer step that changes nothing if `skip`, a 0-dim bool tensor on the parameters' device, is true.

    Weights, moments and counts then stay bit-identical, whatever the gradients, and the host does not wait for the
    value. It is passed as `found_inf`, which torch.amp uses to stop fused optimizers and `Muon` honours too.
    """
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer state by "<parameter name>.<state name>". The tensors are the optimizer's own, not copies."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; copies the tensors and keeps this optimizer's rates and groups.

    Raises ValueError for the state of another model or another kind of optimizer.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    loaded: dict[Tensor, dict[str, Tensor]] = {}
    for group in optimizer.param_groups:
        keys = ("momentum",) if "momentum" in group else ("step", "exp_avg", "exp_avg_sq")
        for parameter in group["params"]:
            # A parameter that never had a gradient has no state; any other has all of it.
            found = {key: tensors[name] for key in keys if (name := f"{names[parameter]}.{key}") in tensors}
            fits = all(t.shape == (() if key == "step" else parameter.shape) for key, t in found.items())
            if found and len(found) == len(keys) and fits:
                loaded[parameter] = {key: t.to(parameter.device, copy=True) for key, t in found.items()}
    unknown = tensors.keys() - {f"{names[p]}.{key}" for p, state in loaded.items() for key in state}
    if unknown:
        raise ValueError(
            f"this optimizer state is of another model or kind of optimizer: {len(unknown)} of its tensors do not fit, "
            f"such as {min(unknown)}. Continue with the settings that it was saved with"
        )
    optimizer.state.clear()
    optimizer.state.update(loaded)
