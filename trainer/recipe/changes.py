"""Which settings differ between two records of a run, and which of the differences the run cannot continue with."""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from trainer.model.config import XUTConfig

Changes = dict[str, tuple[Any, Any]]  # field, named as in --set -> (before, now)

# Weights are meaningless with other latents or other text embeddings.
ENCODERS = ("codec", "text_encoder")
# The fields that each kind of saved state depends on. All other fields may change between starts.
_DEPENDS_ON = {
    # Includes model fields that change no shape: the weights have learnt their positions and branches.
    "weights": r"codec|text_encoder|model\..+",
    # The rank and the base weights, which are compared by hash because their folder may move.
    "adapters": r"lora\..+",
    # Muon keeps one moment per matrix, AdamW two.
    "optimizer": r"optimizer\.kind",
    # A checkpoint stores one position. In another order the run would repeat some samples and miss others. The
    # resolution selects the tier of pictures and so its row groups. The dataset folder may move.
    "data order": r"resolution|batch_size|seed|streams|window|hold_out|selection\.(?!dataset$).+",
}
Affected = Literal["weights", "adapters", "optimizer", "data order"]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Fields whose values differ. Fields in only one record are ignored: another version of the program wrote it."""
    old, new = flat(before), flat(now)
    return {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}


def affecting(changed: Changes, *states: Affected) -> Changes:
    """The changes that make any of these kinds of saved state unusable."""
    pattern = "|".join(_DEPENDS_ON[state] for state in states)
    return {name: pair for name, pair in changed.items() if re.fullmatch(pattern, name)}


def listed(changed: Changes) -> str:
    """For example "samples: 36000 -> 72000, workers: 1 -> 2"."""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return ", ".join(f"{name}: {text(before)} -> {text(now)}" for name, (before, now) in changed.items())


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a record (`Training.record`) by the names that --set uses, with JSON's types."""
    stage = dict(record["stage"])
    del stage["model"], stage["patch_size"], stage["selection"]  # the record has these in full
    settings = {name: record[name] for name in ("steps", "workers", "checkpoints") if name in record}
    lora = record.get("lora") or {"rank": 0, "sha256": "none"}
    settings |= {"lora.rank": lora["rank"], "lora.base": lora["sha256"][:12]}
    model = XUTConfig.from_dict(record["model"]).to_dict()  # with the fields that are younger than the record
    named = _dotted(stage) | _dotted({"model": model, "selection": record["selection"]}) | settings
    plain: dict[str, Any] = json.loads(json.dumps(named))
    return plain


def _dotted(fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": each for inner, each in _dotted(value).items()}
        else:
            found[name] = value
    return found
