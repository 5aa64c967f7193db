"""Benchmark: encoded bytes -> random square crop on one core, `square_crop` against plain Pillow.

The baseline decodes and resizes the whole picture and then crops it, as torchvision's Resize and RandomCrop do with a
picture opened by Pillow. It needs no torchvision. Its filter is LANCZOS, as in `square_crop`, or bilinear, which is
torchvision's default and less work. Everything runs in two builds of Pillow: the installed one, and plain Pillow of the
same version, which pip installs into a temporary folder.

Each method in each build has a process. They take turns, each over all pictures, and only one works at a time. Rates
are images per second of the thread's CPU time. The table has medians over the rounds, of rates and of ratios within a
round.

Full size means drawn pictures of 1.5 to 4 megapixels, or real ones (--raw). The 512 tier holds the same pictures as
`pipeline/ingest.py --downsize 512` stores them. Not measured: crops of 1024 pixels from the 512 tier, which would be
enlarged; AVIF and GIF; reading files.

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
# Width and height of the drawn pictures: 1.5 to 4 megapixels, portrait and landscape.
SIZES = [(1000, 1500), (1200, 1700), (1440, 2048), (1640, 2400), (1800, 1800), (1920, 1080), (2400, 1350)]
SIDES: dict[str, tuple[int, ...]] = {"JPEG": (256, 512, 1024), "WEBP": (256, 512, 1024), "PNG": (256, 512, 1024)}
SIDES |= {"JPEG of the 512 tier": (256, 512), "WEBP of the 512 tier": (256, 512)}
# Results in 0.2, 0.15 and 1.2 bytes per pixel, as in files of illustrations.
ENCODERS = {"JPEG": {"quality": 90}, "WEBP": {"quality": 90}, "PNG": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--raw", nargs="+", default=[], metavar="FILE", help="Parquet files with real pictures. Default: drawn ones."
    )
    parser.add_argument(
        "--pictures", type=int, default=len(SIZES), help="Maximum number of pictures per format. Default: %(default)s."
    )
    parser.add_argument("--rounds", type=int, default=7, help="Rounds that count, after one for warm-up. Default: 7.")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve_measurements(args.worker)
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-decode-"))
    builds: list[Build] = []
    try:
        print(f"| decode: pictures | {write_pictures(folder, args.raw, args.pictures)} |", flush=True)
        builds.append(Build(folder, [ROOT]))
        if missing := plain_pillow(folder / "plain"):
            print(f"| decode: plain Pillow | not measured: {missing} |", flush=True)
        else:
            builds.append(Build(folder, [folder / "plain", ROOT]))
        compared = f"square_crop in {builds[0].name} against the whole picture in {builds[-1].name}"
        print(f"| decode: what the ratios compare | {compared}; images/s on one core |", flush=True)
        for kind, sides in SIDES.items():
            for side in sides if (folder / kind).exists() else ():
                print(
                    f"| decode: {kind}, crop of {side} pixels | {compare(builds, kind, side, args.rounds)} |",
                    flush=True,
                )
    finally:
        for build in builds:
            build.stop()
        shutil.rmtree(folder)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, raw: list[str], most: int) -> str:
    """Writes a folder per kind with a file per picture. Returns a description of the pictures."""
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
            listed.append(f"{len(files)} {format} of {sizes}, {density:.2f} bytes per pixel")
    # Every drawing exists in several formats, so half of the files are enough for the smaller tier.
    for data in [data for files in found.values() for data in files[: most // 2]]:
        picture = decode(data)
        assert isinstance(picture, Picture)
        found.setdefault("JPEG of the 512 tier", []).append(downsize(picture, 512, "JPEG").data)
        found.setdefault("WEBP of the 512 tier", []).append(downsize(picture, 512, "WEBP").data)
    for kind, files in found.items():
        for number, data in enumerate(files):
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / f"{number:04d}").write_bytes(data)
    return f"{'real' if raw else 'drawn'}: {'; '.join(listed)}"


def real_pictures(raw: list[str]) -> list[bytes]:
    """The values of the column `image`, which holds bytes or structs with a field `bytes`."""
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
    """Soft light and flat outlined shapes under thousands of thin curves, with a little grain.

    Decoding takes as long as for an illustration; flat drawings decode faster, noise far slower.
    """
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


# --- Methods ----------------------------------------------------------------------------------------------------------


def cropped(data: bytes, side: int, across: float, down: float) -> None:
    square_crop(data, side, across, down)


def whole_picture(data: bytes, side: int, across: float, down: float, filter: int = Image.Resampling.LANCZOS) -> None:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    resized = picture.resize((width, height), filter)
    left, top = int(across * (width - side + 1)), int(down * (height - side + 1))
    np.array(resized.crop((left, top, left + side, top + side)))


BILINEAR = partial(whole_picture, filter=Image.Resampling.BILINEAR)
METHODS: dict[str, Callable[..., None]] = {"ours": cropped, "whole": whole_picture, "bilinear": BILINEAR}
# Names in pipeline.pictures.crops of the functions that are timed within `square_crop`; the rest is resizing.
PARTS = {"checks": "open_image", "decoding": "flatten"}


# --- Processes --------------------------------------------------------------------------------------------------------


def serve_measurements(folder: Path) -> None:
    """The worker process. Reads lines [kind, side, method] and answers each with seconds of CPU time per picture: the
    total, then the parts of `square_crop`."""
    print(json.dumps(f"{'pillow-simd' if '.post' in PIL.__version__ else 'pillow'} {PIL.__version__}"), flush=True)
    seconds_of = dict.fromkeys(PARTS, 0.0)
    for part, function in PARTS.items():
        setattr(crops, function, timed(getattr(crops, function), part, seconds_of))
    for line in sys.stdin:
        kind, side, method = json.loads(line)
        files = [path.read_bytes() for path in sorted((folder / kind).iterdir())]
        places = np.random.default_rng(0).random((len(files), 2)).tolist()
        seconds_of.update(dict.fromkeys(PARTS, 0.0))
        started = time.thread_time()
        for data, place in zip(files, places, strict=True):
            METHODS[method](data, side, *place)
        seconds = time.thread_time() - started
        print(json.dumps([seconds / len(files), *(seconds_of[part] / len(files) for part in PARTS)]), flush=True)


def timed(function: Callable[..., Any], part: str, seconds_of: dict[str, float]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*args)
        finally:
            seconds_of[part] += time.thread_time() - started

    return run


class Build:
    """Processes that use one build of Pillow, which they import from the folders `path`.

    Each method has its own process: faulting in memory that another method returned to the system takes time.
    """

    def __init__(self, pictures: Path, path: list[Path]) -> None:
        self.workers = {
            method: subprocess.Popen(
                [sys.executable, __file__, "--worker", str(pictures)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
            )
            for method in METHODS
        }  # fmt: skip
        names: list[str] = [self._answer(method) for method in METHODS]
        self.name = names[0]

    def measure(self, kind: str, side: int, method: str) -> list[float]:
        """CPU seconds per picture: the total, then the parts of `square_crop`."""
        question = self.workers[method].stdin
        assert question
        print(json.dumps([kind, side, method]), file=question, flush=True)
        return self._answer(method)

    def _answer(self, method: str) -> Any:
        answer = self.workers[method].stdout
        assert answer
        return json.loads(answer.readline())

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.kill()
            worker.wait()


def plain_pillow(folder: Path) -> str:
    """Installs plain Pillow into the folder. Returns "", or the reason why it could not."""
    version = PIL.__version__.partition(".post")[0]
    if version == PIL.__version__:
        return "it is the installed build; run deploy/setup.sh to build pillow-simd"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", "pillow"]
    done = subprocess.run([*command, "--target", str(folder), f"pillow=={version}"], stdout=sys.stderr)
    return f"pip could not install pillow=={version}" if done.returncode else ""


def compare(builds: list[Build], kind: str, side: int, rounds: int) -> str:
    """One table cell: `square_crop` in the first build against the baseline in the last one, and each build alone."""
    measured = [(build, method) for build in builds for method in METHODS]
    seconds: dict[tuple[Build, str], list[list[float]]] = {one: [] for one in measured}
    for _ in range(rounds + 1):
        for build, method in measured:
            seconds[build, method].append(build.measure(kind, side, method))
    counted = {one: np.array(of_rounds[1:]) for one, of_rounds in seconds.items()}

    def speedup(build: Build, over: Build, method: str = "whole") -> str:
        return f"{np.median(counted[over, method][:, 0] / counted[build, 'ours'][:, 0]):.2f}x"

    def within(build: Build) -> str:
        ours, whole = (f"{1 / np.median(counted[build, method][:, 0]):.0f}/s" for method in ("ours", "whole"))
        return f"within {build.name} {ours} against {whole}, {speedup(build, build)}"

    total, *parts = np.median(counted[builds[0], "ours"], axis=0)
    shares = {part: seconds / total for part, seconds in zip(PARTS, parts, strict=True)}
    shares["resizing"] = 1 - sum(shares.values())
    own_time = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    across = f"{speedup(builds[0], builds[-1])}; " if len(builds) > 1 else ""
    bilinear = f"{speedup(builds[0], builds[-1], 'bilinear')} against bilinear; "
    return f"{across}{bilinear}{'; '.join(map(within, builds))}; own time: {own_time}"


if __name__ == "__main__":
    main()
