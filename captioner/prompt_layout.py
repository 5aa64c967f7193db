"""Which of the two Pixtral file layouts a checkpoint has, and how its prompt is written."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from captioner.prompts import Prompt

_ARCHITECTURE = "LlavaForConditionalGeneration"
_INST = ("[INST]", "[/INST]")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """File layout of a checkpoint, which decides how it is loaded and prompted."""

    kind: Literal["hf", "mistral"]
    image_token: str = "[IMG]"
    bos: str = ""  # start token, if the tokenizer does not add it itself

    def texts(self, prompt: Prompt) -> tuple[str, str]:
        """The prompt in the [INST] template, before and after the picture's token.

        Only for the Hugging Face layout: Mistral's tokenizer reads special tokens in a text as plain letters and takes
        chat messages instead.
        """
        assert self.kind == "hf"
        begin, end = _INST
        return f"{self.bos}{begin}{prompt.instructions}", f"{prompt.hints}{end}"


def detect_layout(model: str | Path) -> PromptLayout:
    """The layout of a model folder, from its JSON files, or of a Hugging Face hub name, from the name alone.

    Model cards and chat templates are ignored, since some belong to another model: a Pixtral tokenizer that has [INST]
    is prompted with it. mistralai/...pixtral... has the Mistral layout, any other ...pixtral... the Hugging Face
    layout. Raises ValueError with one line that says what to do.
    """
    folder = Path(model)
    if not folder.is_dir():
        return _layout_by_name(str(model))
    if (folder / "config.json").exists():
        return _hf_layout(folder)
    if (folder / "params.json").exists():
        return _mistral_layout(folder)
    raise ValueError(
        f"{folder} has neither config.json (HF layout) nor params.json (Mistral layout): give the folder of a model"
    )


def _layout_by_name(name: str) -> PromptLayout:
    lower = name.lower()
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(
            f"{name} is not a folder: give the folder of a Pixtral checkpoint or a name such as owner/pixtral-12b"
        )
    if "pixtral" not in lower:
        raise ValueError(f"{name} does not have pixtral in its name: download it and give its folder")
    return PromptLayout(kind="mistral" if lower.startswith("mistralai/") else "hf")


def _mistral_layout(folder: Path) -> PromptLayout:
    params = _json(folder / "params.json")
    if not params.get("vision_encoder"):
        raise ValueError(f"{folder}/params.json has no vision_encoder: give a Pixtral checkpoint, not a text model")
    if not (folder / "tekken.json").exists():
        raise ValueError(f"{folder} has no tekken.json (its tokenizer): download it from where params.json came from")
    return PromptLayout(kind="mistral")


def _hf_layout(folder: Path) -> PromptLayout:
    config = _json(folder / "config.json")
    architectures = config.get("architectures") or []
    vision = (config.get("vision_config") or {}).get("model_type")
    if _ARCHITECTURE not in architectures or vision != "pixtral":
        raise ValueError(
            f"{folder}/config.json has {', '.join(architectures) or 'no architecture'} with vision model {vision}: "
            f"give a Pixtral checkpoint ({_ARCHITECTURE} with vision model pixtral)"
        )
    if not any((folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json")):
        raise ValueError(f"{folder} has no processor_config.json: download the processor's files from the same model")
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} has no tokenizer.json: download the tokenizer's files from the same model")
    tokenizer = _json(folder / "tokenizer.json")
    tokens = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or []}
    named = _content(_json_or_empty(folder / "processor_config.json").get("image_token"))
    image_token = named or tokens.get(config.get("image_token_index", config.get("image_token_id", -1)), "[IMG]")
    missing = [token for token in (*_INST, image_token) if token not in tokens.values()]
    if missing:
        raise ValueError(
            f"{folder}/tokenizer.json has no token {' '.join(missing)}: give an instruct checkpoint of Pixtral with "
            "its own tokenizer"
        )
    bos = _bos(folder, tokenizer)
    return PromptLayout(kind="hf", image_token=image_token, bos=bos if bos in tokens.values() else "")


def _bos(folder: Path, tokenizer: dict[str, Any]) -> str:
    """The start token to write in front of a text; "" if the tokenizer adds it, because it must not occur twice."""
    settings = _json_or_empty(folder / "tokenizer_config.json")
    bos = _content(settings.get("bos_token")) or "<s>"
    adds = settings.get("add_bos_token") or json.dumps(bos) in json.dumps(tokenizer.get("post_processor"))
    return "" if adds else bos


def _content(token: str | dict[str, Any] | None) -> str:
    """The text of a token, which configs give as a string or as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else token or ""


def _json_or_empty(path: Path) -> dict[str, Any]:
    return _json(path) if path.exists() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} has no JSON object; download it again")
    return value
