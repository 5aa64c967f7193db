"""A small drawing beside the camera's sliders: the frame of training, and what the camera sees.

Unit: half a side of the frame, from its centre, x right and y down, so that the frame is [-1, 1] in both directions at
any aspect ratio. camera_outline.js does the same arithmetic in the browser, where it follows the sliders.
"""

import math
from dataclasses import astuple, dataclass
from pathlib import Path

# A function of width, height, x shift, y shift and zoom, which gradio runs in the browser.
MOVE_OUTLINE = Path(__file__).with_name("camera_outline.js").read_text()


@dataclass(frozen=True)
class CameraView:
    """Edges of what the camera sees."""

    left: float
    top: float
    right: float
    bottom: float


def camera_view(width: int, height: int, x_shift: float, y_shift: float, zoom: float) -> CameraView:
    """Where `positions.camera` puts the edges of a picture of width x height pixels (`paper` convention).

    It measures in units of sqrt(width * height), so half a side is sqrt(width / height) / 2.
    """
    half_x, half_y = math.sqrt(width / height) / 2, math.sqrt(height / width) / 2
    x, y = x_shift / half_x, y_shift / half_y
    return CameraView((x - 1) / zoom, (y - 1) / zoom, (x + 1) / zoom, (y + 1) / zoom)


def outline_html(width: int, height: int) -> str:
    """The drawing for a camera that is not moved."""
    seen = camera_view(width, height, 0, 0, 1)
    edges = " ".join(f"{edge:g}" for edge in astuple(seen))
    x, y = math.sqrt(width / height), math.sqrt(height / width)  # half sides, in a unit that is the same for both
    box = 1.25 * max(x, y)
    rectangle = f'x="{-x:.4f}" y="{-y:.4f}" width="{2 * x:.4f}" height="{2 * y:.4f}"'
    return f"""<div id="outline" data-view="{edges}">
<svg viewBox="{-box:.4f} {-box:.4f} {2 * box:.4f} {2 * box:.4f}" role="img" aria-label="where the camera looks">
<rect class="frame" {rectangle} /><path class="frame" d="M-0.1 0H0.1M0-0.1V0.1" />
<rect class="view" {rectangle} />
</svg>
<p class="frame-key">- - the frame as trained</p><p class="view-key">— what the camera sees</p>
<p class="words">all of the frame</p>
</div>"""
