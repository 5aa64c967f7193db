"""Frozen models that others trained: the folder that a name stands for, and the number format that they run in."""

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError


def model_folder(name: str | Path, files: Sequence[str], kind: str, needs: str, example: str) -> Path:
    """The folder of the model `name`: itself, without touching the network, or of a name of the Hugging Face hub the
    hub's own cache, to which what matches `files` is downloaded once.

    ValueError where neither has it, in words: the `kind` of model ("codec"), the files that it `needs`, an `example`
    of a name.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except Exception as error:  # a dozen kinds, from a malformed name to a proxy's refusal; all mean the same here
        raise ValueError(
            f"the {kind} {str(name)!r} is no folder here, and the Hugging Face hub did not give it "
            f"({first_line(error)}). Give a folder with {needs}, or a name like {example} where the hub can be reached "
            "or has been before"
        ) from error


def folder_at_hand(name: str) -> Path | None:
    """The folder of the model `name` where it is on this machine, whole or not; the network is not touched."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def frozen_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on a GPU: nothing is accumulated in a frozen model's weights, and half the bytes are read. fp32 on a
    CPU, few of which compute in less."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
