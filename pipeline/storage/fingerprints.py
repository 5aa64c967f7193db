"""Provenance of derived files: the inputs of each, so that a rerun makes only the files whose inputs have changed."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

# Increment when the code makes other files from the same inputs: all selections are then made again.
CODE_VERSION: Final = "1"

_NAMED_SHARDS = 3

Provenance = dict[str, str]  # input -> its digest, or its value where that is short


def changes(before: Mapping[str, Provenance], now: Mapping[str, Provenance]) -> dict[str, str]:
    """The reason, by shard, for each shard that must be made (again)."""
    why: dict[str, str] = {}
    for shard, inputs in now.items():
        if shard not in before:
            why[shard] = "new"
        elif changed := sorted(
            name for name in inputs.keys() | before[shard].keys() if before[shard].get(name) != inputs.get(name)
        ):
            why[shard] = "changed: " + ", ".join(changed)
    return why


def describe_changes(doing: str, why: Mapping[str, str], total: int) -> str:
    """One line, for example "judging 2 of 40 shards: 2 new (a, b)"."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for shard, reason in sorted(why.items()):
        by_reason[reason].append(shard)
    listed = [
        f"{len(names)} {reason} ({', '.join(names[:_NAMED_SHARDS])}{' ...' if len(names) > _NAMED_SHARDS else ''})"
        for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    return f"{doing} {len(why)} of {total} shards" + (f": {'; '.join(listed)}" if listed else "")


def digest(content: Any) -> str:
    """SHA-256 of bytes, of text, or of the JSON of anything else."""
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True, default=sorted).encode()
    return hashlib.sha256(content).hexdigest()
