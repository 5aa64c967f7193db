"""What differs between a run as it was begun and as it is asked for now, and what of it a run can bear. Pure."""

import json
from collections.abc import Mapping
from typing import Any

Changes = dict[str, tuple[Any, Any]]  # field, named as --set names it -> before, now

# What the weights mean: those of another model, of other latents or of other embeddings are noise. With every field of
# the model itself, among them those that change no shape: its patches, positions and branches are what it learnt.
ENCODERS = ("codec", "text_encoder")
# What the optimizer's state means: Muon keeps one moment of a matrix, AdamW two.
_STATE = ("optimizer.kind",)
# What decides which sample has which position: a checkpoint keeps one integer of the order, and in another order it
# would see samples twice and others never. The resolution chooses the tier of pictures, whose row groups are dealt.
# With every field of the selection but the place of the dataset, which may have been moved.
_ORDER = ("resolution", "batch_size", "seed", "streams", "window", "hold_out")
_DATASET = "selection.dataset"
# All else may change, and is printed: rates, schedule, captions, dropout, text length, precision, memory, logging. It
# changes what the steps to come do and neither the place in the data nor the sense of what was kept.


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a run's record (`Training.record`) by the names that --set has for them, as JSON keeps them."""
    stage = dict(record["stage"])
    del stage["model"], stage["patch_size"], stage["selection"]  # said in full by the record's model and selection
    settings = {name: record[name] for name in ("steps", "workers", "checkpoints") if name in record}
    lora = record.get("lora") or {"rank": 0, "sha256": "none"}
    settings |= {"lora.rank": lora["rank"], "lora.base": lora["sha256"][:12]}
    named = _dotted(stage) | _dotted({"model": record["model"], "selection": record["selection"]}) | settings
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


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Between two records. A field that only one has is no change: the other was written by another version."""
    old, new = flat(before), flat(now)
    return {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}


def of_weights(changed: Changes) -> Changes:
    """Those after which the weights mean nothing."""
    return {name: pair for name, pair in changed.items() if name in ENCODERS or name.startswith("model.")}


def of_adapters(changed: Changes) -> Changes:
    """Those after which adapters mean nothing: another rank, or other weights below them; the folder may have moved."""
    return {name: pair for name, pair in changed.items() if name.startswith("lora.")}


def of_state(changed: Changes) -> Changes:
    """Those after which the optimizer's state means nothing."""
    return {name: pair for name, pair in changed.items() if name in _STATE}


def of_order(changed: Changes) -> Changes:
    """Those after which a position means another sample."""
    return {
        name: pair
        for name, pair in changed.items()
        if name in _ORDER or (name.startswith("selection.") and name != _DATASET)
    }


def listed(changed: Changes) -> str:
    """ "samples: 36000 -> 72000, ..." """
    return ", ".join(f"{name}: {_text(before)} -> {_text(now)}" for name, (before, now) in changed.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
