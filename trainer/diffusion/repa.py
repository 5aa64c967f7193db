"""REPA: image tokens of one block are aligned with the features of a vision model (arXiv 2410.06940).

A projector maps the tokens that the block puts out to the width of the features, and training minimises 1 minus their
cosine, besides the loss of the velocity. It speeds up the first part of a training; later it holds the model back, so
that HASTE (arXiv 2505.16792) ends it early. Projector and features are of the training only: the model does not change.

Axes: B batch, N image tokens, K image tokens that the block sees, D width of the model, F width of the features.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.config import XUTConfig
from trainer.model.routing import gather_tokens
from trainer.model.xut import BlockOutput


@dataclass(frozen=True, kw_only=True)
class RepaConfig:
    """Alignment with a vision model. ValueError, which names the field, for a number out of range."""

    features: str | None = None  # folder or hub name of a vision transformer, such as facebook/dinov2-base; none: off
    weight: float = 0.5  # of 1 - cosine, added to the loss
    samples: int = 0  # crops of the stage after which it ends; 0: never
    # Number of the block whose image tokens are aligned, from 1, in forward order. auto: the last one of the encoder,
    # block 5 of 20 in XUT-base. REPA takes block 8 of 28. Within the U only the tokens that TREAD keeps are aligned.
    block: int | Literal["auto"] = "auto"
    width: int = 2048  # hidden width of the projector

    def __post_init__(self) -> None:
        for name, least in (("samples", 0), ("width", 1)):
            self._require(name, getattr(self, name) >= least, f"at least {least}")
        self._require("weight", self.weight > 0, "above 0")
        self._require("block", self.block == "auto" or self.block >= 1, "auto, or at least 1")

    def _require(self, name: str, valid: bool, wanted: str) -> None:
        if not valid:
            raise ValueError(f"repa.{name} must be {wanted}: got {getattr(self, name)}")

    def active(self, samples: int) -> bool:
        """Whether tokens are aligned once the stage has seen `samples` crops."""
        return self.features is not None and (self.samples == 0 or samples < self.samples)

    def block_of(self, model: XUTConfig) -> int:
        """The number of the aligned block. ValueError if the model has fewer."""
        encoder = model.prev_blocks + model.depth * model.enc_blocks
        if self.block == "auto":
            return encoder
        blocks = encoder + model.depth * model.dec_blocks + model.post_blocks
        if self.block > blocks:
            raise ValueError(f"repa.block must be at most {blocks}, the number of the model's blocks: got {self.block}")
        return self.block


class RepaProjector(nn.Module):
    """Three linear layers with SiLU in between, as in REPA: (..., D) -> (..., F).

    Weights are drawn from N(0, 1/fan_in) by a generator of their own: no other random number of a training changes.
    """

    # Roles under muP: no layer's fan-out grows with the width of the model.
    INPUT_LAYERS = TEXT_LAYERS = CONDITION_LAYERS = ()
    OUTPUT_LAYERS = ("first", "second", "third")

    def __init__(self, dim: int, width: int, features: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.first = nn.Linear(dim, width)
            self.second = nn.Linear(width, width)
            self.third = nn.Linear(width, features)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self.children():
                assert isinstance(layer, nn.Linear)
                layer.weight.normal_(std=layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.silu(self.second(F.silu(self.first(tokens))))
        projected: Tensor = self.third(hidden)
        return projected


def alignment_loss(projector: nn.Module, output: BlockOutput, features_BNF: Tensor) -> Tensor:
    """1 - cosine of the projected tokens and the features at their places: the mean of each sample (B,), float32."""
    projected_BKF = projector(output.tokens_BKD)
    target_BKF = features_BNF if output.index_BK is None else gather_tokens(features_BNF, output.index_BK)
    return 1 - F.cosine_similarity(projected_BKF.float(), target_BKF.float(), dim=-1).mean(1)


def projector_parameters(dim: int, width: int, features: int) -> int:
    """Parameters of a `RepaProjector`, without allocating it."""
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in ((dim, width), (width, width), (width, features)))
