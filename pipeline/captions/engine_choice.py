"""Which engine a caption job asks, and what decides its captions."""

import asyncio
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from captioner.engines import KEY, EngineUnusable, VisionEngine
from captioner.prompts import PROMPT_VERSION, TEMPLATES, Sampling, layout_of
from pipeline.core.errors import UsageError
from pipeline.storage.fingerprints import MadeFrom, digest

# Of this code: whatever changes a caption of the same answer must raise it.
CAPTIONING_VERSION = "1"
_LONGEST_PAUSE = 60.0  # seconds between two tries of a request to a server


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """How an engine is started. None of this changes a caption but the model."""

    engine: str  # vllm | openai
    model: str  # folder or hub name (vllm), the server's name for it (openai)
    url: str = ""  # openai
    tensor_parallel: int = 1
    at_once: int = 128  # pictures that the engine is asked about at a time
    timeout: float = 180.0  # seconds for one answer
    tries: int = 5  # of one request to a server
    revision: str = ""  # of a hub name: the commit, known once it was asked for; "" for a folder
    # Read where the job is started: Ray's workers, on other machines, have environments of their own.
    key: str = field(default_factory=lambda: os.environ.get(KEY, ""), repr=False)

    def __post_init__(self) -> None:
        if self.engine == "vllm" and Path(self.model).is_dir():  # actors may have another working directory
            object.__setattr__(self, "model", str(Path(self.model).absolute()))

    @property
    def patience(self) -> float:
        """Seconds after which an attempt has failed: a server is asked several times in an attempt."""
        return self.timeout if self.engine == "vllm" else self.tries * (self.timeout + _LONGEST_PAUSE)

    @property
    def under_way(self) -> int:
        """Requests given to the engine at a time. vLLM prepares a picture before it has room to look at it: with half
        as many again waiting, its batch is full although that takes a while."""
        return self.at_once * 3 // 2 if self.engine == "vllm" else self.at_once

    async def start(self) -> VisionEngine:
        """EngineUnusable where it does not start."""
        try:
            return await self._start()
        except ValueError as error:  # such as a folder that this machine lacks
            raise EngineUnusable(str(error)) from error

    async def _start(self) -> VisionEngine:
        # Imported here: each wants packages that not every environment has.
        if self.engine == "openai":
            from captioner.engines.openai import OpenAIEngine, ServerSettings

            settings = ServerSettings(
                url=self.url, model=self.model, timeout=self.timeout, tries=self.tries, key=self.key
            )
            return await OpenAIEngine.connect(settings)
        from captioner.engines.vllm import VllmEngine, VllmSettings

        vllm = VllmSettings(
            model=self.model, revision=self.revision, tensor_parallel=self.tensor_parallel, max_num_seqs=self.at_once
        )
        return await asyncio.to_thread(VllmEngine, vllm)


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """What decides a caption, beside the picture and its tags."""

    engine: str
    model: str  # as known_model tells
    prompt_version: str
    sampling: Sampling
    max_side: int  # pixels of the longer side, as the model sees it

    def made_from(self, images: str) -> MadeFrom:
        """What a shard of captions is made from; `images` is the digest of the images' footer."""
        return {
            "images": images,
            "engine": self.engine,
            "model": self.model,
            "prompt": self.prompt_version,
            "sampling": json.dumps(asdict(self.sampling), sort_keys=True),
            "max side": str(self.max_side),
            "code": CAPTIONING_VERSION,
        }


def known_settings(
    choice: EngineChoice,
    prompt_version: str | None,
    temperatures: Sequence[float] | None,
    max_tokens: int | None,
    max_side: int,
) -> CaptionSettings:
    """What decides the captions of this choice; None stands for the default. UsageError where it cannot be."""
    version = prompt_version or PROMPT_VERSION
    if version not in TEMPLATES:
        raise UsageError(f"--prompt {version} is not known; give one of: {', '.join(TEMPLATES)}")
    given = {"temperatures": temperatures and tuple(temperatures), "max_tokens": max_tokens}
    try:
        sampling = Sampling(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(str(error)) from None
    return CaptionSettings(
        engine=choice.engine, model=known_model(choice), prompt_version=version, sampling=sampling, max_side=max_side
    )


def pinned(choice: EngineChoice) -> EngineChoice:
    """With the commit that the hub has under the model's name now, or had when it was last asked, where it cannot be
    reached: what all actors load, and what the captions are said to be from. UsageError where there is none.
    """
    if choice.engine != "vllm" or Path(choice.model).is_dir() or importlib.util.find_spec("vllm") is None:
        return choice
    from huggingface_hub import snapshot_download  # vLLM brings it along

    try:
        layout_of(choice.model)
        snapshot = snapshot_download(choice.model, allow_patterns=["config.json", "params.json"])
    except ValueError as error:
        raise UsageError(str(error)) from None
    except Exception as error:  # a dozen kinds, from a gated model to a proxy's refusal; all mean the same here
        why = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the Hugging Face hub did not give {choice.model} ({type(error).__name__}: {why}); give a folder with the "
            "model, or log in (hf auth login) where it asks for that"
        ) from None
    return replace(choice, revision=Path(snapshot).name)


def known_model(choice: EngineChoice) -> str:
    """Which weights these are, the same wherever they lie: for a folder its name and a hash of its configuration and
    of its files' names and sizes, for a hub's name that and its commit; a server's name for them.

    UsageError where the engine could not be started with them, as far as can be told without starting it.
    """
    try:
        if choice.engine == "openai":
            return asyncio.run(_served_model(choice))
        layout_of(choice.model)
        if Path(choice.model).is_dir():
            from captioner.engines.vllm import check_weights

            check_weights(Path(choice.model))
    except (ValueError, EngineUnusable) as error:
        raise UsageError(str(error)) from None
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "vLLM is not installed in this environment; run: make captioner, and then the job with "
            ".venv-captioner/bin/python"
        )
    if choice.revision:
        return f"{choice.model}@{choice.revision[:12]}"
    folder = Path(choice.model)
    return f"{folder.resolve().name}@{_folder_digest(folder)[:12]}"


async def _served_model(choice: EngineChoice) -> str:
    engine = await choice.start()
    await engine.close()
    return engine.model


def _folder_digest(folder: Path) -> str:
    configs = {name: (folder / name).read_text() for name in ("config.json", "params.json") if (folder / name).exists()}
    weights = (path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".model"))
    files = sorted((path.name, path.stat().st_size) for path in weights)
    return digest([configs, files])
