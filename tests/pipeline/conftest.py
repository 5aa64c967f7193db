"""Pictures for the tests of the pipeline."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw


def draw_circles(seed: int, size: tuple[int, int] = (480, 640)) -> Image.Image:
    """Outlined circles at random places."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(150, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = (rng.random(2) * size).astype(int).tolist()
        radius = int(rng.integers(40, 160))
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), tuple(rng.integers(0, 256, 3).tolist()), "black", 4
        )
    return image


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Image.Image]:
    """drawn(seed, size) -> a drawing."""
    return draw_circles
