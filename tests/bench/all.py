"""BENCH: all of them in turn, their rows in one Markdown table with machine, versions and date. Takes about 40 minutes.

A bench prints its figures as rows `| what | figure |`; each gets its command as a third column here. The table goes to
stdout, or between the two marks of a file. Run it on a machine that does nothing else, after `make demo` and `make
captioner`. What needs a GPU says "not measured" where there is none.

    python tests/bench/all.py --out tests/bench/RESULTS.md
    python tests/bench/all.py --only decode stream
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import PIL
import torch

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- all.py writes below -->", "<!-- all.py writes above -->"


@dataclass(frozen=True)
class Part:
    bench: str
    flags: str = ""
    gpu: bool = False
    venv: str = ".venv"

    @property
    def command(self) -> str:
        return f"{self.venv}/bin/python tests/bench/{self.bench}.py {self.flags}".strip()


STEP = "--dtype bf16 --compile --encoders --tread 0 0.5"
PARTS = (
    Part("decode"),
    Part("stream"),
    Part("sample", "--run demo/run"),
    Part("curate", "--rows 10000000"),
    Part("resume"),
    Part("train_stream", "--dataset demo/dataset --blocks 4"),
    Part("dedup"),
    Part("caption", venv=".venv-captioner"),
    Part("ingest", "--shards 4 --rows 100 --times 1 8"),
    Part("train_step", "--preset base --resolution 512 --batch 1 --steps 2"),
    Part("report"),
    *(
        Part("train_step", f"--preset base --resolution {side} --batch {batch} {STEP} --profile 10", gpu=True)
        for side, batch in ((256, 128), (512, 64), (768, 32), (1024, 16))
    ),
    Part("train_step", f"--preset large --resolution 256 --batch 64 {STEP}", gpu=True),
    Part("sample", "--preset base --resolution 1024 --pictures 8", gpu=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({part.bench for part in PARTS})
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, metavar="FILE", help="which has the two marks")
    args = parser.parse_args()
    if args.out and args.only:
        parser.error("--only prints its rows: in a table of one date and machine they have no place")
    if args.out and not (args.out.is_file() and BEGIN in args.out.read_text() and END in args.out.read_text()):
        parser.error(f"--out {args.out} has no lines {BEGIN} and {END}")
    rows = [machine(), "", "| what | figure | command |", "|---|---|---|"]
    for part in PARTS:
        if not args.only or part.bench in args.only:
            rows += measured(part)
            if args.out:  # after each: the rest may take half an hour
                write("\n".join(rows), args.out)
    if not args.out:
        print("\n".join(rows))
    sys.exit(any("| failed with " in row for row in rows))


def write(table: str, file: Path) -> None:
    before, rest = file.read_text().split(BEGIN)
    file.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}")


def measured(part: Part) -> list[str]:
    """The bench's rows, each with its command; what it prints besides goes to stderr."""
    if part.gpu and not torch.cuda.is_available():
        return [f"| {part.bench} on a GPU | not measured | `{part.command}` |"]
    if not (ROOT / part.venv).is_dir():
        return [f"| {part.bench} | not measured: there is no {part.venv} | `{part.command}` |"]
    print(f"all: {part.command}", file=sys.stderr, flush=True)
    # As a user's: no cluster that is joined by chance, and the checkout before what is installed.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    command = shlex.split(part.command)
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(f"all: exit code {done.returncode} after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    rows = [line.rstrip() for line in done.stdout.splitlines() if line.startswith("| ")]
    if done.returncode:
        rows.append(f"| {part.bench} | failed with exit code {done.returncode} |")
    return [f"{row} `{part.command}` |" for row in rows]


def machine() -> str:
    """What the figures were measured on, and when."""
    cpu = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "pyarrow", "numpy"))
    pillow = f"{'pillow-simd' if '.post' in PIL.__version__ else 'pillow'} {PIL.__version__}"
    return (
        f"{time.strftime('%Y-%m-%d')}, {cpu}, {os.cpu_count()} logical CPUs, {memory:.0f} GiB, {gpu}; "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {packages}, {pillow}; "
        f"load average before: {os.getloadavg()[1]:.1f}."
    )


if __name__ == "__main__":
    main()
