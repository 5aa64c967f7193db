"""XUT, the cross-U-transformer of HDM: latents, time, text and positions -> velocity.

    latents -> patches -+                          routed under TREAD
                        +-> N dense blocks -> encoder stages -> decoder stages -> M dense blocks -> velocity
    text -> projection -+                           |______ skips ______|

With 1 encoder and 2 decoder blocks a stage and depth 3 the U is, as in the papers' example,
in > a > b > c > (c,c) > d > (d,b) > e > (e,a) > out: the first decoder stage reads the last encoder stage. Text tokens
follow the image tokens through every block; only image tokens are ever routed around the U.

Axes: B batch, C latent channels, H W latent rows and columns, N image tokens, T text tokens, S = N + T, K kept tokens,
D width, V = C * patch side^2 values of a patch, 2 = position (y, x).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.model.blocks import (
    AdaLN,
    Attention,
    Block,
    Branch,
    BranchKind,
    Context,
    CrossAttention,
    RMSNorm,
    SelfAttention,
    SwiGLU,
)
from trainer.model.rope import axial_frequencies, rotary_table
from trainer.model.routing import gather_tokens, scatter_tokens, select_tokens

Checkpointing = Literal["none", "blocks", "all"]
_WAVES = (0.5, 1.0, 2.0)  # per unit of the position map, whose unit is about the picture's side
POSITION_WAVES = 4 * len(_WAVES)  # cosine and sine, of y and of x
BRANCH_KINDS: tuple[BranchKind, ...] = get_args(BranchKind)


@dataclass(frozen=True, kw_only=True)
class XUTConfig:
    """The architecture. The defaults are the paper's design; `released` is what the public weights need instead."""

    dim: int
    heads: int
    mlp_dim: int
    depth: int  # encoder stages, and as many decoder stages
    enc_blocks: int = 1  # blocks of an encoder stage
    dec_blocks: int = 3  # blocks of a decoder stage; the first one reads the skip
    prev_blocks: int = 1  # N: dense blocks before the routed U
    post_blocks: int = 3  # M: dense blocks after it
    in_channels: int = 4  # channels of a latent
    patch_size: int = 2  # latent pixels along the side of a token
    text_dim: int = 1024  # width of the text encoder's hidden states (Qwen3-0.6B)

    # How a decoder stage reads its encoder stage. cross is the paper's central claim; the others (UViT's choices, and
    # none at all) are here to test it.
    skip: Literal["cross", "concat", "add", "none"] = "cross"
    # Normalise what cross-attention reads, as encoder-decoder transformers do: a pre-norm stream grows with depth, and
    # raw keys would grow with it. The paper's figure shows no norm; in the release the stream itself is normalised.
    skip_norm: bool = True
    # Which encoder stage a decoder stage reads: the mirrored one, or always the last one.
    skip_order: Literal["mirrored", "last"] = "mirrored"
    # RMSNorm of queries and keys: bounds attention logits, which can run away in long bfloat16 trainings. Off, as in
    # the paper, until such a run is seen: it costs two more passes over queries and keys.
    qk_norm: bool = False
    # RMSNorm before the output projection, which otherwise reads a stream whose scale training may change. Off, as in
    # the paper, until measured to help.
    final_norm: bool = False
    # One adaLN for all blocks, the paper's choice (section 3.3; Chroma): 50M parameters of base, where one for every
    # branch, a single Linear each as in DiT, takes 139M.
    adaln: Literal["shared", "per_layer"] = "shared"
    # A block starts as a plain pre-norm block; with True as the identity (adaLN-Zero of DiT).
    zero_gate: bool = False
    # What the text encoder gives: its last hidden state, as in the paper and taken as it is, or the average of its
    # layers' normalised states (arXiv 2506.08210), normalised once more here because averaging shrinks it.
    text_layers: Literal["last", "average"] = "last"
    # Pre-norm keeps the residual stream untouched; the release replaces it by the modulated norm at every branch.
    replace_stream: bool = False
    # axial: the paper's fixed frequencies on half of each head's dims; learned: those of each layer and head, on all.
    rotary: Literal["axial", "learned"] = "axial"
    # What a token knows of its position besides the rotation. none is the paper's design: where a token lies shows only
    # against the text, which sits at the centre, and is learnt late. waves adds cosines and sines of (y, x) to image
    # tokens: in the demo's few minutes only so do objects get a place and an end.
    absolute_position: Literal["none", "waves"] = "none"
    # Resolution of the position map that the model takes: one pair per token, or per latent pixel as the release does.
    position_grid: Literal["token", "latent"] = "token"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, choices = f"XUTConfig.{field.name}", getattr(self, field.name), get_args(field.type)
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}: got {value!r}")
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false: got {value!r}")
            least = 0 if field.name in ("prev_blocks", "post_blocks") else 1
            if field.type is int and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be a whole number of at least {least}: got {value!r}")
        multiple = self.heads * (8 if self.rotary == "axial" else 4)
        if self.dim % multiple:
            raise ValueError(
                f"XUTConfig.dim={self.dim} does not split into {self.heads} heads of whole rotary pairs: "
                f"make it a multiple of {multiple}"
            )

    @classmethod
    def tiny(cls, **overrides: Any) -> "XUTConfig":
        """2M parameters, for the demo: trains on two CPU cores in minutes."""
        shape = {"dim": 128, "heads": 2, "mlp_dim": 256, "depth": 2, "dec_blocks": 1, "post_blocks": 1}
        return cls(**{**shape, "absolute_position": "waves", **overrides})

    @classmethod
    def small(cls, **overrides: Any) -> "XUTConfig":
        """227M parameters. The authors only announce its size; the shape is ours."""
        return cls(**{"dim": 832, "heads": 13, "mlp_dim": 2496, "depth": 4, **overrides})

    @classmethod
    def base(cls, **overrides: Any) -> "XUTConfig":
        """343M parameters, Qwen3-0.6B text (HDM report, section 4.1)."""
        return cls(**{"dim": 1024, "heads": 8, "mlp_dim": 3072, "depth": 4, **overrides})

    @classmethod
    def large(cls, **overrides: Any) -> "XUTConfig":
        """556M parameters, Gemma3-1B text (HDM report, section 4.1)."""
        return cls(**{"dim": 1280, "heads": 10, "mlp_dim": 4096, "depth": 4, "text_dim": 1152, **overrides})

    @classmethod
    def released(cls, **overrides: Any) -> "XUTConfig":
        """The public 340M weights, which differ from their own paper."""
        shape = {"dim": 1024, "heads": 16, "mlp_dim": 3072, "depth": 4}
        behaviour = {
            "skip_norm": False,
            "skip_order": "last",
            "replace_stream": True,
            "rotary": "learned",
            "position_grid": "latent",
        }
        return cls(**{**shape, **behaviour, **overrides})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "XUTConfig":
        """The inverse of `to_dict`. Raises ValueError naming unknown and missing fields."""
        known = dataclasses.fields(cls)
        unknown = sorted(set(fields) - {field.name for field in known})
        missing = [f.name for f in known if f.default is dataclasses.MISSING and f.name not in fields]
        if unknown or missing:
            raise ValueError(
                f"model config: unknown fields [{', '.join(unknown)}], missing fields [{', '.join(missing)}]; "
                f"the fields are {', '.join(field.name for field in known)}"
            )
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


class TimeEmbedding(nn.Module):
    """t (B,) in [0, 1] -> (B, D): cosines and sines of 1000 t, periods from 2 pi to 10000 * 2 pi, Linear, Mish."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequency_1F = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))[None]
        self.frequency: Tensor
        self.register_buffer("frequency", frequency_1F)  # saved, because the release saves it, rounded to float16
        self.proj = nn.Linear(dim, dim)

    def forward(self, t_B: Tensor) -> Tensor:
        angle_BF = 1000 * t_B.float()[:, None] * self.frequency.float()
        return F.mish(self.proj(torch.cat([angle_BF.cos(), angle_BF.sin()], dim=-1)))


class XUT(nn.Module):
    """The model. checkpointing: recompute in the backward pass the activations of no block, of every second, of all."""

    # The layers whose fan-in, or fan-out, does not grow with the width (trainer.optimization.optimizers).
    INPUT_LAYERS = ("patch_in", "position_in", "text_in", "aspect_in")
    OUTPUT_LAYERS = ("patch_out",)
    # Modules whose layers see one vector a sample instead of one a token.
    CONDITION_LAYERS = ("time_in", "aspect_out", "adaln")

    def __init__(self, config: XUTConfig, checkpointing: Checkpointing = "none") -> None:
        super().__init__()
        if checkpointing not in get_args(Checkpointing):
            raise ValueError(
                f"checkpointing must be one of {', '.join(get_args(Checkpointing))}: got {checkpointing!r}"
            )
        self.config = config
        dim, patch_values = config.dim, config.in_channels * config.patch_size**2
        averaged = config.text_layers == "average"

        self.patch_in = nn.Linear(patch_values, dim)
        self.position_in = nn.Linear(POSITION_WAVES, dim, bias=False) if config.absolute_position == "waves" else None
        self.text_norm = nn.LayerNorm(config.text_dim, elementwise_affine=False) if averaged else nn.Identity()
        self.text_in = nn.Linear(config.text_dim, dim)
        self.time_in = TimeEmbedding(dim)
        self.aspect_in = nn.Linear(1, dim)
        self.aspect_out = nn.Linear(dim, dim)
        kinds = [kind for kind in BRANCH_KINDS if kind != "cross" or config.skip == "cross"]
        self.adaln = (
            nn.ModuleDict({kind: AdaLN(dim, deep=True, zero_gate=config.zero_gate) for kind in kinds})
            if config.adaln == "shared"
            else None
        )
        # A constant, not a weight: the config determines it.
        frequency_1F2 = axial_frequencies(dim // config.heads) if config.rotary == "axial" else None
        self.frequency: Tensor | None
        self.register_buffer("frequency", frequency_1F2, persistent=False)

        self.prev = nn.ModuleList(_block(config) for _ in range(config.prev_blocks))
        self.encoder = nn.ModuleList(
            nn.ModuleList(_block(config) for _ in range(config.enc_blocks)) for _ in range(config.depth)
        )
        self.decoder = nn.ModuleList(
            nn.ModuleList(_block(config, reads_skip=i == 0) for i in range(config.dec_blocks))
            for _ in range(config.depth)
        )
        self.post = nn.ModuleList(_block(config) for _ in range(config.post_blocks))
        self.final_norm = RMSNorm(dim) if config.final_norm else nn.Identity()
        self.patch_out = nn.Linear(dim, patch_values)

        for i, block in enumerate(module for module in self.modules() if isinstance(module, Block)):
            block.recompute = checkpointing == "all" or (checkpointing == "blocks" and i % 2 == 0)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Weights N(0, 1/fan_in), biases 0, so that every activation starts near unit scale at every width (muP).

        Zero: the velocity, the modulations and the aspect, so that a fresh model answers 0 to everything. Layers that
        write into the residual stream are smaller by sqrt(number of writers): the stream keeps its scale at any depth.
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
    ) -> Tensor:
        """Velocity (B, C, H, W), noise minus data, at time t (B,) in [0, 1], 1 being pure noise.

        text: (B, T, text_dim) hidden states. text_mask: (B, T), True for a real token; None means that all are, and is
        faster. position_map: (B, tokens, 2), the (y, x) of every token (`trainer.diffusion.positions`); (B, H * W, 2), of every
        latent pixel, where the config says position_grid="latent". aspect: (B,) log(W / H) of the whole picture (W / H
        for the released weights); None adds nothing to the condition.

        selection_rate: TREAD, the share of image tokens that is taken OUT of the routed blocks and passes around them;
        0 is the dense model, 0.5 the papers' training. routing_key: (B,) int64, which decides what tokens those are,
        sample by sample; needed where the rate is above 0.

        Raises ValueError for latents, a position map, a rate or a routing key that do not fit.
        """
        patches_BNV = self._patches(x_BCHW)
        image_tokens, text_tokens = patches_BNV.shape[1], text.shape[1]
        position_BN2 = self._token_positions(position_map, x_BCHW)
        image_BND = self.patch_in(patches_BNV)
        if self.position_in is not None:
            image_BND = image_BND + self.position_in(_waves(position_BN2).to(image_BND.dtype))
        h_BSD = torch.cat([image_BND, self.text_in(self.text_norm(text))], dim=1)
        context = self._context(t_B, position_BN2, text_tokens, text_mask, aspect)

        h_BSD = self._run(self.prev, h_BSD, context)
        if selection_rate == 0:
            h_BSD = self._u(h_BSD, context)
        else:
            if routing_key is None or routing_key.shape != t_B.shape or routing_key.dtype != torch.int64:
                given = None if routing_key is None else (tuple(routing_key.shape), routing_key.dtype)
                raise ValueError(
                    f"selection_rate={selection_rate} needs a routing_key, one int64 a sample: got {given}"
                )
            index_BK = select_tokens(routing_key, image_tokens, text_tokens, selection_rate)
            kept_BKD = self._u(gather_tokens(h_BSD, index_BK), _of_kept_tokens(context, index_BK))
            h_BSD = scatter_tokens(h_BSD, index_BK, kept_BKD)
        h_BSD = self._run(self.post, h_BSD, context)

        return self._unpatched(self.patch_out(self.final_norm(h_BSD[:, :image_tokens])), x_BCHW)

    def _u(self, h_BSD: Tensor, context: Context) -> Tensor:
        skips = []
        for stage in self.encoder:
            h_BSD = self._run(stage, h_BSD, context)
            skips.append(h_BSD)
        for i, stage in enumerate(self.decoder):
            skip_BSD = skips[-1] if self.config.skip_order == "last" else skips[-1 - i]
            h_BSD = self._run(stage, h_BSD, context, skip_BSD)
        return h_BSD

    def _run(self, blocks: nn.Module, h_BSD: Tensor, context: Context, skip_BSD: Tensor | None = None) -> Tensor:
        """Blocks in order; the first one is given the skip."""
        for block in blocks.children():
            if block.recompute:
                h_BSD = checkpoint(block, h_BSD, context, skip_BSD, use_reentrant=False)
            else:
                h_BSD = block(h_BSD, context, skip_BSD)
            skip_BSD = None
        return h_BSD

    def _context(
        self, t_B: Tensor, position_BN2: Tensor, text_tokens: int, text_mask: Tensor | None, aspect: Tensor | None
    ) -> Context:
        batch, image_tokens, _ = position_BN2.shape
        position_BS2 = torch.cat([position_BN2, position_BN2.new_zeros(batch, text_tokens, 2)], dim=1)
        key_mask_B11S = None
        if text_mask is not None:
            image_mask_BN = text_mask.new_ones(batch, image_tokens, dtype=torch.bool)
            key_mask_B11S = torch.cat([image_mask_BN, text_mask.bool()], dim=1)[:, None, None, :]
        condition_BD: Tensor = self.time_in(t_B)
        if aspect is not None:
            condition_BD = condition_BD + self.aspect_out(F.mish(self.aspect_in(aspect.float()[:, None])))
        shared = None
        if self.adaln is not None:
            shared = {kind: self.adaln[kind](condition_BD) for kind in BRANCH_KINDS if kind in self.adaln}
        return Context(
            position=position_BS2,
            rotary=None if self.frequency is None else rotary_table(position_BS2, self.frequency),
            key_mask=key_mask_B11S,
            condition=condition_BD,
            shared=shared,
        )

    def _token_positions(self, position_map: Tensor, x_BCHW: Tensor) -> Tensor:
        """Positions (B, N, 2) float32 from a map of tokens or, for the release, of latent pixels.

        The release scales its map down with antialiasing, which pulls border tokens slightly inwards: kept as it is.
        """
        batch, _, height, width = x_BCHW.shape
        patch, of_latents = self.config.patch_size, self.config.position_grid == "latent"
        rows, columns = height // patch, width // patch
        wanted = (batch, height * width if of_latents else rows * columns, 2)
        if position_map.shape != wanted:
            raise ValueError(
                f"position_map must be {wanted}, one (y, x) per {self.config.position_grid} of latents "
                f"{tuple(x_BCHW.shape)} in patches of {patch}: got {tuple(position_map.shape)}"
            )
        if not of_latents:
            return position_map.float()
        map_B2HW = position_map.float().mT.reshape(batch, 2, height, width)
        return F.interpolate(map_B2HW, size=(rows, columns), mode="bilinear", antialias=True).flatten(2).mT

    def _patches(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, V), the values of a patch in the order channel, row, column."""
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
        """(B, N, V) -> (B, C, H, W), the values of a patch in the order row, column, channel, as the release has it."""
        patch = self.config.patch_size
        batch, channels, height, width = like_BCHW.shape
        x_BRGPPC = patches_BNV.reshape(batch, height // patch, width // patch, patch, patch, channels)
        return x_BRGPPC.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


def compiled(model: XUT, backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """The forward pass as one graph for each (resolution, text length, selection rate), and nothing left to Python.

    Shapes are fixed, which makes the fastest kernels: a run has few, texts being padded to a multiple.
    """
    torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    forward: Callable[..., Tensor] = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    return forward


_MOST_GRAPHS = 64  # 512 text tokens in steps of 32 are 16, in training and in evaluation; torch stops at 8


def _waves(position_BN2: Tensor) -> Tensor:
    """(B, N, 2) -> (B, N, 12): cosines and sines of y and x."""
    # Plain numbers: a tensor made of them here would be a copy to the device, and a wait, in every pass.
    angle_BN2W = torch.stack([2 * torch.pi * wave * position_BN2 for wave in _WAVES], dim=-1)
    return torch.cat([angle_BN2W.cos(), angle_BN2W.sin()], dim=-1).flatten(2)


def _block(config: XUTConfig, reads_skip: bool = False) -> Block:
    dim, heads, qk_norm = config.dim, config.heads, config.qk_norm
    skip = config.skip if reads_skip else "none"

    def log_frequency() -> Tensor | None:
        start = torch.full((heads, dim // heads // 4, 2), math.log(math.pi))
        return start if config.rotary == "learned" else None

    def branch(kind: BranchKind, function: nn.Module) -> Branch:
        adaln = AdaLN(dim, deep=False, zero_gate=config.zero_gate) if config.adaln == "per_layer" else None
        return Branch(kind, dim, function, adaln=adaln, replace_stream=config.replace_stream)

    def cross() -> Branch:
        frequency, skip_norm = log_frequency(), config.skip_norm
        return branch(
            "cross", CrossAttention(dim, heads, qk_norm=qk_norm, log_frequency=frequency, skip_norm=skip_norm)
        )

    return Block(
        branch("attn", SelfAttention(dim, heads, qk_norm=qk_norm, log_frequency=log_frequency())),
        branch("mlp", SwiGLU(dim, config.mlp_dim)),
        cross=cross() if skip == "cross" else None,
        concat=nn.Linear(2 * dim, dim) if skip == "concat" else None,
        add=skip == "add",
    )


def _of_kept_tokens(context: Context, index_BK: Tensor) -> Context:
    """The same context for the chosen tokens only."""
    return context._replace(
        position=gather_tokens(context.position, index_BK),
        rotary=None if context.rotary is None else gather_tokens(context.rotary, index_BK),
        key_mask=None if context.key_mask is None else context.key_mask.gather(3, index_BK[:, None, None, :]),
    )
