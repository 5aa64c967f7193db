"""XUT, the cross-U-transformer of HDM (report, section 3.1): noisy latents, time, text and positions -> velocity.

    latents -> patches --+                              routed under TREAD
                         +-> N dense blocks -> encoder stages -> decoder stages -> M dense blocks -> velocity
    text -> projection --+                           |______ skips ______|

With 1 encoder block, 2 decoder blocks and depth 3 the U is the report's example,
input > a > b > c > (c,c) > d > (d,b) > e > (e,a) > output: the first decoder stage reads the last encoder stage. Text
tokens follow the image tokens through every block; TREAD routes only image tokens around the U.

Axes: B batch, C latent channels, H W latent rows and columns, N image tokens, T text tokens, S = N + T, K kept tokens,
D width, V = C * patch_size^2 values of a patch, 2 = position (y, x).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.model.attention import Kernel, padding_of
from trainer.model.blocks import AdaLN, Attention, Block, BranchKind, Context, RMSNorm, SwiGLU
from trainer.model.config import XUTConfig
from trainer.model.rope import axial_frequencies, rotary_table
from trainer.model.routing import gather_tokens, scatter_tokens, select_tokens

Checkpointing = Literal["none", "blocks", "all"]  # activation checkpointing of no block, every second one, or all
Precision = Literal["fp32", "bf16"]  # of matrix products; weights, gradients, optimizer state and loss stay float32

_LEAST_TIME = 0.05  # by which a prediction of the data is divided, at least
_WAVES = (0.5, 1.0, 2.0)  # cycles per unit of the position map, which is about the side of the picture
POSITION_WAVES = 4 * len(_WAVES)  # cosine and sine of y and of x
_BRANCH_KINDS: tuple[BranchKind, ...] = get_args(BranchKind)
MOST_TEXT_LENGTHS = 64  # of a compiled model: graphs are made for each
_MAX_GRAPHS = 2 * 4 * MOST_TEXT_LENGTHS  # four a length, in training and in evaluation; torch's limit is 8


class TimeEmbedding(nn.Module):
    """Maps t (B,) in [0, 1] to (B, D): cosines and sines of 1000 t, then Linear and Mish.

    Periods run geometrically from 2 pi to 10000 * 2 pi.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequency_1F = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))[None]
        self.frequency: Tensor
        self.register_buffer("frequency", frequency_1F)  # persistent: the release saves it too, rounded to float16
        self.proj = nn.Linear(dim, dim)

    def forward(self, t_B: Tensor) -> Tensor:
        angle_BF = 1000 * t_B.float()[:, None] * self.frequency.float()
        return F.mish(self.proj(torch.cat([angle_BF.cos(), angle_BF.sin()], dim=-1)))


@dataclass
class BlockOutput:
    """Asks a forward pass for the image tokens that one block puts out, for a loss on them. The pass fills it."""

    block: int  # its number in forward order, from 1
    tokens_BKD: Tensor | None = None
    index_BK: Tensor | None = None  # places of these tokens among the N image tokens; None: all of them, in order


class Standardization(nn.Module):
    """Maps features (..., D) to (feature - mean) / deviation. Both are saved with the weights; until `set` they are 0
    and 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def set(self, mean_D: Tensor, deviation_D: Tensor) -> None:
        """Raises ValueError unless both are (D,) and finite, and the deviations above 0."""
        shapes = {tuple(self.mean.shape), tuple(mean_D.shape), tuple(deviation_D.shape)}
        if len(shapes) > 1 or not mean_D.isfinite().all() or not (deviation_D.isfinite() & (deviation_D > 0)).all():
            raise ValueError(f"statistics of text features must be finite, deviations above 0, of one shape: {shapes}")
        self.mean.copy_(mean_D)
        self.deviation.copy_(deviation_D)

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean.to(features.dtype)) / self.deviation.to(features.dtype)


class XUT(nn.Module):
    """The model of an `XUTConfig`. Raises ValueError for an unknown `checkpointing`."""

    # Roles of the layers under muP (trainer.optimization.optimizers): layers whose fan-in, or whose fan-out, does not
    # grow with the width, those whose fan-in is the text encoder's width, and modules whose layers see one vector per
    # sample instead of one per token.
    INPUT_LAYERS = ("patch_in", "position_in", "aspect_in")
    TEXT_LAYERS = ("text_in",)
    OUTPUT_LAYERS = ("patch_out",)
    CONDITION_LAYERS = ("time_in", "aspect_out", "adaln")

    def __init__(self, config: XUTConfig, checkpointing: Checkpointing = "none") -> None:
        super().__init__()
        if checkpointing not in get_args(Checkpointing):
            raise ValueError(
                f"checkpointing must be one of {', '.join(get_args(Checkpointing))}: got {checkpointing!r}"
            )
        self.config = config
        self.attention_kernel: Kernel = "default"  # how attention is computed; changes results by rounding only
        dim, patch_values = config.dim, config.in_channels * config.patch_size**2

        self.patch_in = nn.Linear(patch_values, dim)
        self.position_in = nn.Linear(POSITION_WAVES, dim, bias=False) if config.absolute_position == "waves" else None
        averaged = config.text_layers == "average"
        self.text_norm = nn.LayerNorm(config.text_dim, elementwise_affine=False) if averaged else nn.Identity()
        standardized = config.text_features == "standardized"
        self.text_standard = Standardization(config.text_dim) if standardized else nn.Identity()
        self.text_in = nn.Linear(config.text_dim, dim)
        self.time_in = TimeEmbedding(dim)
        self.aspect_in = nn.Linear(1, dim)
        self.aspect_out = nn.Linear(dim, dim)
        self.adaln = None
        if config.adaln == "shared":
            kinds = [kind for kind in _BRANCH_KINDS if kind != "cross" or config.skip == "cross"]
            self.adaln = nn.ModuleDict({kind: AdaLN(dim, deep=True, zero_gate=config.zero_gate) for kind in kinds})
        # Not saved: the config determines it.
        frequency_1F2 = axial_frequencies(dim // config.heads) if config.rotary == "axial" else None
        self.frequency: Tensor | None
        self.register_buffer("frequency", frequency_1F2, persistent=False)

        def stage(blocks: int, *, reads_skip: bool = False) -> nn.ModuleList:
            return nn.ModuleList(Block(config, reads_skip=reads_skip and i == 0) for i in range(blocks))

        self.prev = stage(config.prev_blocks)
        self.encoder = nn.ModuleList(stage(config.enc_blocks) for _ in range(config.depth))
        self.decoder = nn.ModuleList(stage(config.dec_blocks, reads_skip=True) for _ in range(config.depth))
        self.post = stage(config.post_blocks)
        self.final_norm = RMSNorm(dim) if config.final_norm else nn.Identity()
        self.patch_out = nn.Linear(dim, patch_values)

        for i, block in enumerate(module for module in self.modules() if isinstance(module, Block)):
            block.number = i + 1
            block.recompute = checkpointing == "all" or (checkpointing == "blocks" and i % 2 == 0)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draws weights from N(0, 1/fan_in) and sets biases to 0, so activations start near unit scale at any width.

        The output, the modulations and the aspect start at zero: a new model predicts 0 for every input. Layers that
        write into the residual stream are scaled by 1 / sqrt(number of writers), which keeps its scale at any depth.
        """
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            linear.weight.normal_(std=linear.in_features**-0.5)
            if linear.bias is not None:
                linear.bias.zero_()
        writers = [module.out for module in self.modules() if isinstance(module, Attention)]
        writers += [module.down for module in self.modules() if isinstance(module, SwiGLU)]
        for writer in writers:
            writer.weight.div_(len(writers) ** 0.5)
        for adaln in (module for module in self.modules() if isinstance(module, AdaLN)):
            adaln.out.weight.zero_()
        self.aspect_out.weight.zero_()
        self.patch_out.weight.zero_()

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        *,
        text: Tensor,
        position_map: Tensor,
        text_mask: Tensor | None = None,
        aspect: Tensor | None = None,
        selection_rate: float = 0.0,
        routing_key: Tensor | None = None,
        output: BlockOutput | None = None,
    ) -> Tensor:
        """Velocity (B, C, H, W), an estimate of noise - data, of latents at time t (B,) in [0, 1]; 1 is pure noise.

        text: (B, T, text_dim), hidden states of the text encoder. text_mask: (B, T), True for real tokens; None if all
        are, which is faster. With the attention kernel varlen the real tokens of a text come first. position_map:
        (B, N, 2), the (y, x) of every token (`trainer.diffusion.positions`), or (B, H * W, 2), that of every latent
        pixel, for configs with position_grid="latent". aspect: (B,), log(width / height) of the whole picture (width /
        height for the released weights); None adds nothing to the condition.

        selection_rate: the share of image tokens, in [0, 1), that TREAD routes AROUND the U; 0 is the dense model, the
        papers train with 0.5. routing_key: (B,) int64, required if the rate is above 0. Which tokens a sample keeps is
        a function of its own key.

        output: is filled with the image tokens of its block, under TREAD with the kept ones if the block lies in the U.

        Raises ValueError for latents, a position map, a rate or a routing key of the wrong shape, type or range.
        """
        patches_BNV = self._patches(x_BCHW)
        image_tokens, text_tokens = patches_BNV.shape[1], text.shape[1]
        position_BN2 = self._token_positions(position_map, x_BCHW)
        image_BND = self.patch_in(patches_BNV)
        if self.position_in is not None:
            image_BND = image_BND + self.position_in(_waves(position_BN2).to(image_BND.dtype))
        h_BSD = torch.cat([image_BND, self.text_in(self.text_standard(self.text_norm(text)))], dim=1)
        context = self._context(t_B, position_BN2, text_tokens, text_mask, aspect)

        h_BSD = self._run(self.prev, h_BSD, context, output=output)
        index_BK = None
        if selection_rate == 0:
            h_BSD = self._u(h_BSD, context, output)
        else:
            if routing_key is None or routing_key.shape != t_B.shape or routing_key.dtype != torch.int64:
                given = None if routing_key is None else (tuple(routing_key.shape), routing_key.dtype)
                raise ValueError(
                    f"selection_rate={selection_rate} needs a routing_key, one int64 a sample: got {given}"
                )
            index_BK = select_tokens(routing_key, image_tokens, text_tokens, selection_rate)
            kept_BKD = self._u(gather_tokens(h_BSD, index_BK), _of_kept_tokens(context, index_BK), output)
            h_BSD = scatter_tokens(h_BSD, index_BK, kept_BKD)
        h_BSD = self._run(self.post, h_BSD, context, output=output)
        if output is not None and output.tokens_BKD is not None:
            kept = output.tokens_BKD.shape[1] - text_tokens
            output.tokens_BKD = output.tokens_BKD[:, :kept]
            output.index_BK = index_BK[:, :kept] if index_BK is not None and kept < image_tokens else None

        out_BCHW = self._unpatched(self._outputs(self.final_norm(h_BSD[:, :image_tokens])), x_BCHW)
        if self.config.prediction == "velocity":
            return out_BCHW
        # On the path x_t = (1 - t) * data + t * noise, noise - data = (x_t - data) / t. The bound on t bounds the error
        # of the velocity near t = 0.
        t_B111 = t_B.float().clamp(min=_LEAST_TIME)[:, None, None, None]
        return (x_BCHW.float() - out_BCHW.float()) / t_B111

    def _outputs(self, h_BND: Tensor) -> Tensor:
        """The output projection, not under autocast: guidance would multiply the rounding of a bfloat16 velocity."""
        dtype, device = next(self.patch_out.parameters()).dtype, h_BND.device.type
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
            out_BNV: Tensor = self.patch_out(h_BND.to(dtype))
        return out_BNV

    def _u(self, h_BSD: Tensor, context: Context, output: BlockOutput | None) -> Tensor:
        """Encoder stages, then decoder stages, each of which reads one encoder stage's output."""
        skips = []
        for stage in self.encoder:
            h_BSD = self._run(stage, h_BSD, context, output=output)
            skips.append(h_BSD)
        for i, stage in enumerate(self.decoder):
            skip_BSD = skips[-1] if self.config.skip_order == "last" else skips[-1 - i]
            h_BSD = self._run(stage, h_BSD, context, skip_BSD, output)
        return h_BSD

    def _run(
        self,
        blocks: nn.Module,
        h_BSD: Tensor,
        context: Context,
        skip_BSD: Tensor | None = None,
        output: BlockOutput | None = None,
    ) -> Tensor:
        """Blocks in order; the first one receives the skip."""
        for block in blocks.children():
            if block.recompute:
                h_BSD = checkpoint(block, h_BSD, context, skip_BSD, use_reentrant=False)
            else:
                h_BSD = block(h_BSD, context, skip_BSD)
            if output is not None and block.number == output.block:
                output.tokens_BKD = h_BSD
            skip_BSD = None
        return h_BSD

    def _context(
        self, t_B: Tensor, position_BN2: Tensor, text_tokens: int, text_mask: Tensor | None, aspect: Tensor | None
    ) -> Context:
        batch, image_tokens, _ = position_BN2.shape
        position_BS2 = torch.cat([position_BN2, position_BN2.new_zeros(batch, text_tokens, 2)], dim=1)
        padding = None
        if text_mask is not None:
            image_mask_BN = text_mask.new_ones(batch, image_tokens, dtype=torch.bool)
            padding = padding_of(torch.cat([image_mask_BN, text_mask.bool()], dim=1), self.attention_kernel)
        condition_BD: Tensor = self.time_in(t_B)
        if aspect is not None:
            condition_BD = condition_BD + self.aspect_out(F.mish(self.aspect_in(aspect.float()[:, None])))
        shared = None
        if self.adaln is not None:
            shared = {kind: self.adaln[kind](condition_BD) for kind in _BRANCH_KINDS if kind in self.adaln}
        rotary_BS1P2 = None if self.frequency is None else rotary_table(position_BS2, self.frequency)
        return Context(position_BS2, rotary_BS1P2, padding, condition_BD, shared, self.attention_kernel)

    def _token_positions(self, position_map: Tensor, x_BCHW: Tensor) -> Tensor:
        """Token positions (B, N, 2), float32, from a map of tokens or, for the release, of latent pixels.

        The release downscales its map with antialiasing, which moves border tokens slightly inwards.
        """
        batch, _, height, width = x_BCHW.shape
        patch, per_latent = self.config.patch_size, self.config.position_grid == "latent"
        rows, columns = height // patch, width // patch
        expected = (batch, height * width if per_latent else rows * columns, 2)
        if position_map.shape != expected:
            raise ValueError(
                f"position_map must be {expected}, one (y, x) per {self.config.position_grid} of latents "
                f"{tuple(x_BCHW.shape)} in patches of {patch}: got {tuple(position_map.shape)}"
            )
        if not per_latent:
            return position_map.float()
        map_B2HW = position_map.float().mT.reshape(batch, 2, height, width)
        return F.interpolate(map_B2HW, size=(rows, columns), mode="bilinear", antialias=True).flatten(2).mT

    def _patches(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, V); a patch's values are in the order channel, row, column."""
        patch = self.config.patch_size
        batch, channels, height, width = x_BCHW.shape
        if channels != self.config.in_channels or height % patch or width % patch:
            raise ValueError(
                f"latents must have {self.config.in_channels} channels and sides that are multiples of the patch size "
                f"{patch}: got {tuple(x_BCHW.shape)}"
            )
        x_BCRPGP = x_BCHW.reshape(batch, channels, height // patch, patch, width // patch, patch)
        return x_BCRPGP.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)

    def _unpatched(self, patches_BNV: Tensor, like_BCHW: Tensor) -> Tensor:
        """(B, N, V) -> (B, C, H, W); a patch's values are in the order row, column, channel, as in the release."""
        patch = self.config.patch_size
        batch, channels, height, width = like_BCHW.shape
        x_BRGPPC = patches_BNV.reshape(batch, height // patch, width // patch, patch, patch, channels)
        return x_BRGPPC.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


def compiled(model: XUT, backend: str | Callable[..., Any] = "inductor") -> XUT:
    """The model itself, whose blocks run through torch.compile from now on.

    Blocks of one kind share their graphs: four for each number of tokens, instead of one of the whole model with all of
    its blocks. Static shapes give the fastest kernels, and a run has few of them,
    because texts are padded to a multiple. A shape too many runs without compilation instead of ending the run.
    """
    torch._dynamo.config.recompile_limit = max(_MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.compile(backend=backend, dynamic=False)
    return model


def _waves(position_BN2: Tensor) -> Tensor:
    """(B, N, 2) -> (B, N, POSITION_WAVES): cosines and sines of y and x."""
    # Python floats: a tensor of them would be copied to the device, and waited for, in every forward pass.
    angle_BN2W = torch.stack([2 * torch.pi * wave * position_BN2 for wave in _WAVES], dim=-1)
    return torch.cat([angle_BN2W.cos(), angle_BN2W.sin()], dim=-1).flatten(2)


def _of_kept_tokens(context: Context, index_BK: Tensor) -> Context:
    """The context of the selected tokens."""
    return context._replace(
        position=gather_tokens(context.position, index_BK),
        rotary=None if context.rotary is None else gather_tokens(context.rotary, index_BK),
        padding=None if context.padding is None else context.padding.of_kept(index_BK, context.position.shape[1]),
    )
