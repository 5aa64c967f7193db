"""BENCH: bytes -> random square crop on one core: ours against plain Pillow's whole decode, whole resize and crop.

The baseline is what torchvision's Resize and RandomCrop do to a picture opened with Pillow, in Pillow alone, so that
torchvision need not be there: with LANCZOS, which ours has too, and with torchvision's default, bilinear, which is less
work. All in two builds of Pillow: the one that runs this, and plain Pillow of the same version, which pip installs into
a folder that is deleted again. Each way in each build has a
process; only one works at a time, on all pictures, in turns. Images per second of that thread's processor time; medians
of the rates, and of the ratios within a turn.

Full size: drawn pictures of 1.5 to 4 megapixels, or real ones (--raw). 512 tier: the same, as `pipeline/ingest.py
--downsize 512` keeps them. Left out: its crops of 1024 pixels, which would be enlarged; AVIF and GIF; reading files.

    python tests/bench/decode.py
    python tests/bench/decode.py --raw SHARD.parquet...
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter

from pipeline.pictures import crops
from pipeline.pictures.crops import downsize, square_crop
from pipeline.pictures.decoder import DEFAULT_LIMITS, OpenedImage, Picture, decode, open_image

ROOT = Path(__file__).parents[2]
# Width and height in pixels, portrait and landscape: 1.5 to 4 megapixels.
SIZES = [(1000, 1500), (1200, 1700), (1440, 2048), (1640, 2400), (1800, 1800), (1920, 1080), (2400, 1350)]
SIDES = {"JPEG": (256, 512, 1024), "WEBP": (256, 512, 1024), "PNG": (256, 512, 1024)}
SIDES |= {"512 tier, JPEG": (256, 512), "512 tier, WEBP": (256, 512)}
# As files of illustrations are: 0.2, 0.15 and 1.2 bytes a pixel.
ENCODERS = {"JPEG": {"quality": 90}, "WEBP": {"quality": 90}, "PNG": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", nargs="+", default=[], metavar="FILE", help="parquet files with real pictures")
    parser.add_argument("--pictures", type=int, default=len(SIZES), help="at most so many of a format")
    parser.add_argument("--rounds", type=int, default=7, help="of turns; one more, the first, is not counted")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        answer(args.worker)
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-decode-"))
    builds: list[Build] = []
    try:
        print(f"| pictures | {write_pictures(folder, args.raw, args.pictures)} |", flush=True)
        builds.append(Build(folder, [ROOT]))
        if missing := plain_pillow(folder / "plain"):
            print(f"| plain Pillow beside it | not measured: {missing} |", flush=True)
        else:
            builds.append(Build(folder, [folder / "plain", ROOT]))
        against = f"the whole picture in {builds[-1].name}"
        print(f"| what the ratio compares | ours in {builds[0].name}, {against}; images/s of one core |", flush=True)
        for kind, sides in SIDES.items():
            for side in sides if (folder / kind).exists() else ():
                print(f"| {kind} to {side} | {compare(builds, kind, side, args.rounds)} |", flush=True)
    finally:
        for build in builds:
            build.stop()
        shutil.rmtree(folder)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, raw: list[str], most: int) -> str:
    """One folder a kind, one file a picture; in words, what they are."""
    found: dict[str, list[bytes]] = {format: [] for format in ENCODERS}
    for data in real_pictures(raw) if raw else drawn_pictures(most):
        opened = open_image(data, DEFAULT_LIMITS)
        if isinstance(opened, OpenedImage) and len(found.get(opened.header.format, range(most))) < most:
            found[opened.header.format].append(data)
    listed = []
    for format, files in found.items():
        opened_files = [open_image(data, DEFAULT_LIMITS) for data in files]
        headers = [opened.header for opened in opened_files if isinstance(opened, OpenedImage)]
        megapixels = [header.width * header.height / 1e6 for header in headers]
        if files:
            density = sum(map(len, files)) / sum(megapixels) / 1e6
            sizes = f"{min(megapixels):.1f} to {max(megapixels):.1f} megapixels"
            listed.append(f"{len(files)} {format} of {sizes}, {density:.2f} bytes a pixel")
    # One picture of a full size in two formats is two files: half of them in each tier are enough.
    for data in [data for files in found.values() for data in files[: most // 2]]:
        picture = decode(data)
        assert isinstance(picture, Picture)
        found.setdefault("512 tier, JPEG", []).append(downsize(picture, 512, "JPEG").data)
        found.setdefault("512 tier, WEBP", []).append(downsize(picture, 512, "WEBP").data)
    for kind, files in found.items():
        for number, data in enumerate(files):
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / f"{number:04d}").write_bytes(data)
    return f"{'real' if raw else 'drawn'}: {'; '.join(listed)}"


def real_pictures(raw: list[str]) -> list[bytes]:
    """Of the column `image`, flat or a struct with `bytes`."""
    values = [value for file in raw for value in pq.read_table(file, columns=["image"])["image"].to_pylist()]
    return [value["bytes"] if isinstance(value, dict) else value for value in values]


def drawn_pictures(count: int) -> list[bytes]:
    files = []
    for seed in range(count):
        drawing = draw(seed, *SIZES[seed % len(SIZES)])
        for format, options in ENCODERS.items():
            buffer = io.BytesIO()
            drawing.save(buffer, format, **options)
            files.append(buffer.getvalue())
    return files


def draw(seed: int, width: int, height: int) -> Image.Image:
    """Soft light and flat outlined shapes under thousands of thin curves, with a little grain: flat drawings are
    decoded faster than illustrations are, and noise far slower."""
    rng = np.random.default_rng(seed)
    light = rng.integers(60, 240, (5, 4, 3), np.uint8)
    canvas = Image.fromarray(light).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    for _ in range(40):
        x, y, radius = rng.uniform((0, 0, 0.02), (width, height, 0.15)) * (1, 1, width)
        colour = tuple(rng.integers(30, 255, 3).tolist())
        pen.regular_polygon((x, y, radius), int(rng.integers(3, 40)), int(rng.integers(360)), colour, "black", 3)
    canvas = canvas.filter(ImageFilter.GaussianBlur(1))
    pen = ImageDraw.Draw(canvas)
    along = np.linspace(0, 1, 24)[:, None]
    for _ in range(width * height // 2000):
        start = rng.uniform((0, 0), (width, height))
        bend, end = start + rng.normal(0, 0.05 * width, (2, 2))
        curve = (1 - along) ** 2 * start + 2 * along * (1 - along) * bend + along**2 * end
        under = np.array(canvas.getpixel((int(start[0]), int(start[1]))))
        tone = (under + rng.normal(0, 30)).clip(0, 255).astype(int)
        pen.line(curve.ravel().tolist(), tuple(tone.tolist()), int(rng.integers(1, 5)), "curve")
    pixels_HWC = np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.6)), np.float32)
    return Image.fromarray((pixels_HWC + rng.normal(0, 1, (height, width, 1))).clip(0, 255).astype(np.uint8))


# --- Ways -------------------------------------------------------------------------------------------------------------


def ours(data: bytes, side: int, across: float, down: float) -> None:
    square_crop(data, side, across, down)


def whole(data: bytes, side: int, across: float, down: float, filter: int = Image.Resampling.LANCZOS) -> None:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    resized = picture.resize((width, height), filter)
    left, top = int(across * (width - side + 1)), int(down * (height - side + 1))
    np.array(resized.crop((left, top, left + side, top + side)))


BILINEAR = partial(whole, filter=Image.Resampling.BILINEAR)
WAYS: dict[str, Callable[..., None]] = {"ours": ours, "whole": whole, "bilinear": BILINEAR}
PARTS = {
    "checks": "open_image",
    "decoding": "flatten",
}  # of pipeline.pictures.crops; the rest is resizing


# --- Turns ------------------------------------------------------------------------------------------------------------


def answer(folder: Path) -> None:
    """The worker: for each line that asks for kind, side and way, seconds of processor time for a picture; the whole
    and, of ours, the parts."""
    print(json.dumps(f"{'pillow-simd' if '.post' in PIL.__version__ else 'pillow'} {PIL.__version__}"), flush=True)
    spent = dict.fromkeys(PARTS, 0.0)
    for part, function in PARTS.items():
        setattr(crops, function, timed(getattr(crops, function), part, spent))
    for line in sys.stdin:
        kind, side, way = json.loads(line)
        files = [path.read_bytes() for path in sorted((folder / kind).iterdir())]
        places = np.random.default_rng(0).random((len(files), 2)).tolist()
        spent.update(dict.fromkeys(PARTS, 0.0))
        started = time.thread_time()
        for data, place in zip(files, places, strict=True):
            WAYS[way](data, side, *place)
        seconds = time.thread_time() - started
        print(json.dumps([seconds / len(files), *(spent[part] / len(files) for part in PARTS)]), flush=True)


def timed(function: Callable[..., Any], part: str, spent: dict[str, float]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*args)
        finally:
            spent[part] += time.thread_time() - started

    return run


class Build:
    """Processes with one build of Pillow, found first in these folders; one for each way, whose memory is then its own:
    what another way gave back to the system would be slow to get again."""

    def __init__(self, pictures: Path, first: list[Path]) -> None:
        self.workers = {
            way: subprocess.Popen(
                [sys.executable, __file__, "--worker", str(pictures)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, first))},
            )
            for way in WAYS
        }  # fmt: skip
        names: list[str] = [self._answer(way) for way in WAYS]
        self.name = names[0]

    def measure(self, kind: str, side: int, way: str) -> list[float]:
        """Seconds for a picture; the whole and the parts."""
        question = self.workers[way].stdin
        assert question
        print(json.dumps([kind, side, way]), file=question, flush=True)
        return self._answer(way)

    def _answer(self, way: str) -> Any:
        answer = self.workers[way].stdout
        assert answer
        return json.loads(answer.readline())

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.kill()
            worker.wait()


def plain_pillow(folder: Path) -> str:
    """Install it into the folder; in words why not, or "" where it is there."""
    version = PIL.__version__.partition(".post")[0]
    if version == PIL.__version__:
        return "it is the installed build: pillow-simd is not there (deploy/setup.sh builds it)"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", "pillow"]
    done = subprocess.run([*command, "--target", str(folder), f"pillow=={version}"], stdout=sys.stderr)
    return f"pip could not install pillow=={version}" if done.returncode else ""


def compare(builds: list[Build], kind: str, side: int, rounds: int) -> str:
    """The installed build comes first; the last one's baseline is what it is compared with."""
    asked = [(build, way) for build in builds for way in WAYS]
    seconds: dict[tuple[Build, str], list[list[float]]] = {one: [] for one in asked}
    for _ in range(rounds + 1):
        for build, way in asked:
            seconds[build, way].append(build.measure(kind, side, way))
    warm = {one: np.array(of_rounds[1:]) for one, of_rounds in seconds.items()}

    def faster(build: Build, than: Build, way: str = "whole") -> str:
        return f"{np.median(warm[than, way][:, 0] / warm[build, 'ours'][:, 0]):.2f}x"

    def each(build: Build) -> str:
        of, against = (f"{1 / np.median(warm[build, way][:, 0]):.0f}/s" for way in ("ours", "whole"))
        return f"{build.name} {of} against {against}: {faster(build, build)}"

    in_all, *parts = np.median(warm[builds[0], "ours"], axis=0)
    shares = {part: seconds / in_all for part, seconds in zip(PARTS, parts, strict=True)}
    shares["resizing"] = 1 - sum(shares.values())
    time_of_ours = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    across = f"{faster(builds[0], builds[-1])}; " if len(builds) > 1 else ""
    bilinear = f"of bilinear: {faster(builds[0], builds[-1], 'bilinear')}; in one build: "
    return f"{across}{bilinear}{'; '.join(map(each, builds))}; time of ours: {time_of_ours}"


if __name__ == "__main__":
    main()
