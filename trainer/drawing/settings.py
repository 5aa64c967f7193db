"""How a picture is drawn: `SamplingSettings`, and `PictureRequest` for one prompt and seed."""

from dataclasses import dataclass
from typing import Literal, get_args

from trainer.model.routing import kept_image_tokens

# These limits catch mistakes, and requests that would keep a machine busy for days.
LARGEST_SIDE = 4096  # pixels
_MAX_STEPS = 1000
_LARGEST_FACTOR = 8
_LEAST_STRENGTH = 0.01
_MAX_MAGNITUDE = 100.0  # of guidance and of shifts (in frames); also of zooming in or out

Sampler = Literal["euler", "heun"]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Settings of the sampler and the camera. Raises ValueError, naming the field, for values out of range."""

    width: int  # pixels
    height: int  # pixels
    negative: str = ""
    steps: int = 20
    guidance: float = 3.0  # 1 turns guidance off: only the conditional branch is computed
    sampler: Sampler = "euler"
    shift: float | None = None  # time shift as in `flow.shift_time`; None: chosen from the number of tokens
    x_shift: float = 0.0  # camera, as in `positions.camera`
    y_shift: float = 0.0
    zoom: float = 1.0
    # TREAD self-guidance: share of image tokens that skip the middle blocks, for the prompt and the negative prompt.
    selection_rate: float = 0.0
    unconditional_rate: float = 0.0
    # Drawn at width x height, then enlarged by this factor, mixed with noise up to the time hires_strength, and
    # finished at the larger size. 1: not enlarged.
    hires: float = 1.0
    hires_strength: float = 0.5  # how much may change: 1 draws the larger picture anew

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= _MAX_STEPS:
            raise ValueError(f"{self.steps} sampling steps: must be from 1 to {_MAX_STEPS}")
        limits: dict[str, tuple[float, float]] = {
            **dict.fromkeys(("width", "height"), (1, LARGEST_SIDE)),
            **dict.fromkeys(("guidance", "x_shift", "y_shift"), (-_MAX_MAGNITUDE, _MAX_MAGNITUDE)),
            **dict.fromkeys(("zoom", "shift"), (1 / _MAX_MAGNITUDE, _MAX_MAGNITUDE)),
            "hires": (1, _LARGEST_FACTOR),
            "hires_strength": (_LEAST_STRENGTH, 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails, too
                raise ValueError(f"{name} {value}: must be from {low:g} to {high:g}")
        if self.sampler not in get_args(Sampler):
            raise ValueError(f"sampler {self.sampler!r}: must be one of {', '.join(get_args(Sampler))}")
        for rate in (self.selection_rate, self.unconditional_rate):
            kept_image_tokens(1, rate)  # raises ValueError for a bad rate
        _check_utf8(self.negative)

    @property
    def hires_steps(self) -> int:
        """Sampling steps at the larger size: their share is that of the time that is left."""
        return 0 if self.hires == 1 else max(1, round(self.steps * self.hires_strength))


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """One picture. An empty prompt is the unconditional one. Raises ValueError for an invalid prompt or seed."""

    prompt: str
    seed: int
    settings: SamplingSettings

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed {self.seed}: must be from 0 to {2**62 - 1}")
        _check_utf8(self.prompt)


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the prompt {text!a} is not valid UTF-8") from None
