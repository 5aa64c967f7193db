"""Runs all benchmarks in turn and writes one Markdown table with machine, versions and date. Takes about 40 minutes.

Each benchmark prints rows `| what | figure |`; this script adds the command as a third column. The table goes to
stdout, or between the two marker lines of a file. Run it on an otherwise idle machine, after `make demo` and `make
captioner`. Without a GPU, the rows that need one say "not measured".

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
class Benchmark:
    name: str  # of the script
    flags: str = ""
    gpu: bool = False
    venv: str = ".venv"

    @property
    def command(self) -> str:
        return f"{self.venv}/bin/python tests/bench/{self.name}.py {self.flags}".strip()


BENCHMARKS = (
    Benchmark("decode"),
    Benchmark("stream"),
    Benchmark("sample", "--run demo/run"),
    Benchmark("curate", "--rows 10000000"),
    Benchmark("resume"),
    Benchmark("train_stream", "--dataset demo/dataset --blocks 4"),
    Benchmark("dedup"),
    Benchmark("caption", venv=".venv-captioner"),
    Benchmark("ingest", "--shards 4 --rows 100 --times 1 8"),
    Benchmark("train_step", "--stage 256 --preset small --share 8 --micro 4 --peer prx"),
    Benchmark("train_step", "--stage 512 --preset small --share 2 --micro 1"),
    Benchmark("report"),
    Benchmark("attention", gpu=True),
    Benchmark("train_step", "--stage 256 --share 128 --micro 64 --peer prx --syncs", gpu=True),
    Benchmark("train_step", "--stage 1024 --share 16 --micro 4 --only-all-on", gpu=True),
    Benchmark("sample", "--preset base --resolution 1024 --pictures 8", gpu=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({benchmark.name for benchmark in BENCHMARKS})
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"Run only these: {', '.join(names)}.")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="File whose table between the two marker lines is replaced. Default: stdout.",
    )
    parser.add_argument(
        "--gpu-rows",
        type=Path,
        metavar="FILE",
        help="Run nothing: put these rows of tests/bench/gpu.sh into --out, in place of those that are not measured.",
    )
    args = parser.parse_args()
    if args.gpu_rows:
        if not args.out:
            parser.error("--gpu-rows needs --out")
        fill(args.out, args.gpu_rows.read_text().splitlines())
        return
    if args.out and args.only:
        parser.error(
            "--only cannot be combined with --out, because one table has one date and one machine; leave out --out"
        )
    if args.out and not (args.out.is_file() and BEGIN in args.out.read_text() and END in args.out.read_text()):
        parser.error(f"--out {args.out} does not contain the lines {BEGIN} and {END}; add them")
    rows = [machine(), "", "| what | figure | command |", "|---|---|---|"]
    for benchmark in BENCHMARKS:
        if not args.only or benchmark.name in args.only:
            rows += run(benchmark)
            if args.out:  # after each benchmark, because the rest may take half an hour
                write("\n".join(rows), args.out)
    if not args.out:
        print("\n".join(rows))
    sys.exit(any("| failed with " in row for row in rows))


def write(table: str, file: Path) -> None:
    before, rest = file.read_text().split(BEGIN)
    file.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}")


def fill(file: Path, rows: list[str]) -> None:
    """Replaces the rows of GPU benchmarks that were not measured, in the table between the markers."""
    before, rest = file.read_text().split(BEGIN)
    table, after = rest.split(END)
    kept = [line for line in table.strip().splitlines() if " on a GPU | not measured |" not in line]
    measured = [f"{row.rstrip()} `sh tests/bench/gpu.sh` |" for row in rows if row.startswith("| ")]
    file.write_text(f"{before}{BEGIN}\n\n" + "\n".join(kept + measured) + f"\n\n{END}{after}")


def run(benchmark: Benchmark) -> list[str]:
    """Runs one benchmark and returns its rows, each with the command. Its stderr passes through."""
    if benchmark.gpu and not torch.cuda.is_available():
        return [f"| {benchmark.name} on a GPU | not measured | `{benchmark.command}` |"]
    if not (ROOT / benchmark.venv).is_dir():
        return [f"| {benchmark.name} | not measured: no {benchmark.venv} | `{benchmark.command}` |"]
    print(f"all: {benchmark.command}", file=sys.stderr, flush=True)
    # Never joins a running cluster, and imports this checkout rather than an installed package.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    command = shlex.split(benchmark.command)
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(f"all: exit code {done.returncode} after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    rows = [line.rstrip() for line in done.stdout.splitlines() if line.startswith("| ")]
    if done.returncode:
        rows.append(f"| {benchmark.name} | failed with exit code {done.returncode} |")
    return [f"{row} `{benchmark.command}` |" for row in rows]


def machine() -> str:
    """Date, hardware and versions of the measurement."""
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
        f"load average before the run: {os.getloadavg()[1]:.1f}."
    )


if __name__ == "__main__":
    main()
