"""The part of a checkpoint that is not tensors: where training continues, and what it was trained with."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.storage.run_record import versions

_CHECKOUT = Path(__file__).parents[2]


def training_state(
    *,
    stage_name: str,
    epoch: int,
    position: int,
    first_epoch: int,
    seed: int,
    config: Mapping[str, Any],
    selection: str,
) -> dict[str, Any]:
    """The content of state.json, apart from step, saved_at and files, which `Checkpoints.save` adds.

    epoch, position: where training continues in the order of samples; position counts samples since the start of
    training. first_epoch: the epoch in which the order of the current selection began. config: the whole resolved
    config, as JSON represents it. selection: its hash.
    """
    return {
        "stage_name": stage_name,
        "epoch": epoch,
        "position": position,
        "first_epoch": first_epoch,
        "seed": seed,
        "config": dict(config),
        "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "selection": selection,
        "versions": versions(),
        "git_revision": git_revision(),
    }


@lru_cache
def git_revision(checkout: Path = _CHECKOUT) -> str | None:
    """The commit of this code when the process first asked. None without git or outside a checkout.

    A folder inside another project's checkout has no revision either.
    """
    command = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    top, revision = answer.split("\n")[:2]
    return revision if Path(top).resolve() == checkout.resolve() else None
