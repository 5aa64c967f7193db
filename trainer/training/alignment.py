"""The projector of a stage's alignment with a vision model (trainer/diffusion/repa.py), and its optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.diffusion.repa import RepaProjector, alignment_loss
from trainer.model.config import XUTConfig
from trainer.model.xut import BlockOutput
from trainer.optimization.optimizers import build_optimizer, load_optimizer_tensors, optimizer_tensors
from trainer.recipe.stages import StageConfig


class Alignment:
    """Equal on every worker, because projectors are drawn from the stage's seed.

    The optimizer is one of its own, with the stage's settings: that of the model, and its saved state, are the same
    with an alignment and without.
    """

    def __init__(self, stage: StageConfig, model: XUTConfig, feature_width: int, device: torch.device) -> None:
        self.block = stage.repa.block_of(model)
        self.projector = RepaProjector(model.dim, stage.repa.width, feature_width, stage.seed).to(device)
        self.optimizer = build_optimizer(self.projector, stage.optimizer)

    def losses(self, output: BlockOutput, features_BNF: Tensor | None) -> Tensor:
        """1 - cosine, the mean of each sample's tokens: (B,). ValueError without features."""
        if features_BNF is None:
            raise ValueError("the stage aligns tokens with a vision model, but the micro batch has no features")
        return alignment_loss(self.projector, output, features_BNF)

    def tensors(self) -> dict[str, Tensor]:
        """Projector and optimizer state for a checkpoint. Not copies."""
        weights: dict[str, Tensor] = self.projector.state_dict()
        return weights | optimizer_tensors(self.optimizer, self.projector)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`. A projector of other shapes, as for another vision model, is left as it is."""
        own = self.projector.state_dict()
        if any(name not in tensors or tensors[name].shape != own[name].shape for name in own):
            return
        self.projector.load_state_dict({name: tensors[name] for name in own})
        state = {name: tensor for name, tensor in tensors.items() if name not in own}
        load_optimizer_tensors(self.optimizer, self.projector, state)
