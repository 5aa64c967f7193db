"""What loading any frozen pretrained model needs: its folder, its dtype, and a library that stays quiet meanwhile."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

# transformers and diffusers import torchao if it is installed. It then warns of kernels and classes that are not used.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def pretrained_folder(name: str | Path, files: Sequence[str], kind: str, needs: str, example: str) -> Path:
    """The folder of a model: `name` itself, without network access, or the Hugging Face cache of the hub name.

    Files of a hub model that match `files` are downloaded once. Raises ValueError if there is no such folder and the
    hub does not answer with the model; its message contains the `kind` of model, the files it `needs` and an `example`.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except Exception as error:  # from a malformed name to a proxy's refusal; the advice is the same
        raise ValueError(
            f"the {kind} {str(name)!r} is not a folder, and the Hugging Face hub did not provide it "
            f"({first_line(error)}). Give a folder with {needs}, or a name like {example} when the hub or its cache "
            "has it"
        ) from error


def cached_folder(name: str) -> Path | None:
    """The folder of a model that is on this machine, complete or not; None otherwise. Uses no network."""
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
    """bfloat16 on a GPU, where it halves memory traffic; float32 on a CPU, few of which compute in bfloat16."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


@contextmanager
def quiet(library: Literal["transformers", "diffusers"]) -> Iterator[None]:
    """Suppresses the warnings and progress bars of a library; its failures arrive as exceptions."""
    logging = import_module(f"{library}.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
