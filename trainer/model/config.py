"""The architecture of an XUT as one dataclass, with a preset for each published size."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

# Of the presets for new models. The fields' own defaults are those of models saved before they existed.
_TEXT: dict[str, Any] = {"text_prefix": True, "text_features": "standardized"}


@dataclass(frozen=True, kw_only=True)
class XUTConfig:
    """Architecture of an XUT. Defaults are the paper's design; `released` is the design of the public weights.

    Raises ValueError naming the field if a value is of the wrong type or out of range.
    """

    dim: int  # width of the residual stream
    heads: int
    mlp_dim: int  # hidden width of the SwiGLU feed-forward
    depth: int  # number of encoder stages, and of decoder stages
    enc_blocks: int = 1  # blocks per encoder stage
    dec_blocks: int = 3  # blocks per decoder stage; the first one reads the skip connection
    prev_blocks: int = 1  # N: dense blocks before the routed U
    post_blocks: int = 3  # M: dense blocks after the routed U
    in_channels: int = 4  # latent channels
    patch_size: int = 2  # side of a token's patch, in latent pixels
    text_dim: int = 1024  # width of the text encoder's hidden states (Qwen3-0.6B: 1024)

    # How a decoder stage merges its skip connection. Cross-attention is the paper's central claim (section 3.1);
    # concatenation and addition (UViT, arXiv 2209.12152) and no skip at all are baselines for it.
    skip: Literal["cross", "concat", "add", "none"] = "cross"
    # RMSNorm on the input of the keys and values of cross-attention. A pre-norm stream grows with depth and raw keys
    # would grow with it. The paper's figure shows no norm; the release normalises the stream itself.
    skip_norm: bool = True
    # Which encoder stage a decoder stage reads: its mirror image, as in the paper, or always the last one.
    skip_order: Literal["mirrored", "last"] = "mirrored"
    # RMSNorm on queries and keys: bounds attention logits, which can diverge in long bfloat16 runs. Off, as in the
    # paper, because it costs two more passes over queries and keys.
    qk_norm: bool = False
    # RMSNorm before the output projection, whose input otherwise has the scale of the residual stream. Off, as in the
    # paper.
    final_norm: bool = False
    # shared: one adaLN for all blocks, as in the paper (section 3.3), 50M parameters in XUT-base. per_layer: one Linear
    # per branch as in DiT, 139M parameters.
    adaln: Literal["shared", "per_layer"] = "shared"
    # Initial gate of a residual branch. False: 1, a plain pre-norm block. True: 0, the identity (adaLN-Zero of DiT).
    zero_gate: bool = False
    # What the text encoder returns: its last hidden state, as in the paper, or the average of its layer-normalised
    # hidden states (arXiv 2506.08210), which is normalised again here because averaging shrinks it.
    text_layers: Literal["last", "average"] = "last"
    # True: the text encoder reads a constant token before every text, whose state is dropped (TextEncoder).
    text_prefix: bool = False
    # standardized: each feature of the text minus its mean, divided by its deviation. Both are of the texts that the
    # first stage was trained on, and saved with the weights. raw: as the text encoder returns it.
    text_features: Literal["raw", "standardized"] = "raw"
    # What the output projection estimates: the velocity, as in the report, or the clean latents x, from which the
    # velocity follows (arXiv 2511.13720). The model returns the velocity, and is trained on its error, either way.
    prediction: Literal["velocity", "x"] = "velocity"
    # True: the modulated norm replaces the residual stream at every branch, as in the release. False: pre-norm.
    replace_stream: bool = False
    # axial: fixed frequencies on the first half of each head's dims (section 3.4). learned: frequencies of each layer
    # and head, on all dims.
    rotary: Literal["axial", "learned"] = "axial"
    # Position input besides the rotation. none: the paper's design, in which only attention to the text, at the centre,
    # reveals where a token lies; it is learned late. waves: cosines and sines of (y, x) added to image tokens, without
    # which a demo of a few minutes learns neither where objects are nor where they end.
    absolute_position: Literal["none", "waves"] = "none"
    # Resolution of the position map: one (y, x) per token, or per latent pixel as in the release.
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
        """2M parameters: the demo, which trains on two CPU cores in minutes."""
        shape = {"dim": 128, "heads": 2, "mlp_dim": 256, "depth": 2, "dec_blocks": 1, "post_blocks": 1}
        return cls(**{**shape, **_TEXT, "absolute_position": "waves", **overrides})

    @classmethod
    def small(cls, **overrides: Any) -> "XUTConfig":
        """227M parameters. The authors announce only this size; the shape is ours."""
        return cls(**{"dim": 832, "heads": 13, "mlp_dim": 2496, "depth": 4, **_TEXT, **overrides})

    @classmethod
    def base(cls, **overrides: Any) -> "XUTConfig":
        """343M parameters, text from Qwen3-0.6B (HDM report, section 4.1)."""
        return cls(**{"dim": 1024, "heads": 8, "mlp_dim": 3072, "depth": 4, **_TEXT, **overrides})

    @classmethod
    def large(cls, **overrides: Any) -> "XUTConfig":
        """556M parameters, text from Gemma3-1B (HDM report, section 4.1)."""
        return cls(**{"dim": 1280, "heads": 10, "mlp_dim": 4096, "depth": 4, "text_dim": 1152, **_TEXT, **overrides})

    @classmethod
    def released(cls, **overrides: Any) -> "XUTConfig":
        """The public 340M weights, whose design differs from the paper's."""
        shape = {"dim": 1024, "heads": 16, "mlp_dim": 3072, "depth": 4}
        design = {"skip_norm": False, "skip_order": "last", "replace_stream": True}
        positions = {"rotary": "learned", "position_grid": "latent"}
        return cls(**{**shape, **design, **positions, **overrides})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "XUTConfig":
        """The inverse of `to_dict`. Raises ValueError naming unknown and missing fields."""
        known = dataclasses.fields(cls)
        unknown = sorted(fields.keys() - {field.name for field in known})
        missing = [f.name for f in known if f.default is dataclasses.MISSING and f.name not in fields]
        if unknown or missing:
            raise ValueError(
                f"model config: unknown fields [{', '.join(unknown)}], missing fields [{', '.join(missing)}]; "
                f"the fields are {', '.join(field.name for field in known)}"
            )
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields, in a form that JSON can represent."""
        return dataclasses.asdict(self)
