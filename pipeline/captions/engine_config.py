"""Which engine a caption job asks, and everything that decides its captions."""

import asyncio
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from captioner.engines import API_KEY_VARIABLE, EngineUnusable, VisionEngine
from captioner.prompt_layout import detect_layout
from captioner.sampling import Sampling
from pipeline.core.errors import UsageError
from pipeline.storage.fingerprints import Provenance, digest

# Version of this code. Raise it with any change that makes another caption of the same answer.
CAPTIONING_VERSION = "1"
ResolvedModel = tuple["EngineConfig", str]
_MAX_PAUSE = 60.0  # seconds between two tries of a request to a server


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine is started. Only the model and the KV cache's data type change captions."""

    engine: str  # vllm or openai
    model: str  # vllm: folder or hub name; openai: the server's name
    url: str = ""  # openai
    tensor_parallel: int = 1
    concurrency: int = 128  # requests at a time
    timeout: float = 180.0  # seconds for one answer
    tries: int = 5  # of one request to a server
    max_model_len: int = 8192  # vllm: tokens of picture, prompt and answer
    gpu_memory: float = 0.9  # vllm: share of a card's memory
    kv_cache: str = "auto"  # vllm: data type of the KV cache, auto or fp8
    revision: str = ""  # commit of a hub name, after `resolve_model`; "" for a folder
    # Read where the job starts, because Ray's workers on other machines have other environments.
    key: str = field(default_factory=lambda: os.environ.get(API_KEY_VARIABLE, ""), repr=False)

    @property
    def attempt_timeout(self) -> float:
        """Seconds after which an attempt has failed. An attempt includes all tries of a request to a server."""
        return self.timeout if self.engine == "vllm" else self.tries * (self.timeout + _MAX_PAUSE)

    @property
    def max_in_flight(self) -> int:
        """Requests given to the engine at a time. vLLM prepares each picture before it is scheduled: with 50% more
        requests than it runs, its batch stays full although that takes a while."""
        return self.concurrency * 3 // 2 if self.engine == "vllm" else self.concurrency

    async def start(self) -> VisionEngine:
        """Raises EngineUnusable if the engine does not start."""
        try:
            # Imported here because each needs packages that not every environment has.
            if self.engine == "openai":
                from captioner.engines.openai import OpenAIEngine, ServerSettings

                return await OpenAIEngine.connect(
                    ServerSettings(url=self.url, model=self.model, timeout=self.timeout, tries=self.tries, key=self.key)
                )
            from captioner.engines.vllm import VllmEngine, VllmSettings

            settings = VllmSettings(
                model=self.model, revision=self.revision, tensor_parallel=self.tensor_parallel,
                max_num_seqs=self.concurrency, max_model_len=self.max_model_len, gpu_memory=self.gpu_memory,
                kv_cache=self.kv_cache,
            )  # fmt: skip
            return await asyncio.to_thread(VllmEngine, settings)
        except ValueError as error:  # such as a folder that this machine does not have
            raise EngineUnusable(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Everything that decides a caption, beside the picture and its tags."""

    engine: str
    model: str  # identity of the weights, see `resolve_model`
    prompt_version: str
    sampling: Sampling
    max_side: int  # pixels: longer side of the picture that the model sees
    kv_cache: str = "auto"  # data type

    def provenance(self, images: str) -> Provenance:
        """What a shard of captions is made from. `images` is the digest of the image shard's footer."""
        made_from = {
            "images": images,
            "engine": self.engine,
            "model": self.model,
            "prompt": self.prompt_version,
            "sampling": json.dumps(asdict(self.sampling), sort_keys=True),
            "max side": str(self.max_side),
            "code": CAPTIONING_VERSION,
        }
        # Captions made before there was a choice do not have this.
        return made_from if self.kv_cache == "auto" else made_from | {"kv cache": self.kv_cache}


def resolve_model(config: EngineConfig) -> ResolvedModel:
    """The config with an absolute folder, or with the commit of a hub name, so that all workers load the same weights;
    and the identity of the weights: NAME@HASH for a folder, wherever it lies (a hash of its configuration and of the
    names and sizes of its files), NAME@COMMIT for a hub name, the name on a server.

    Raises UsageError if the engine cannot be started with them, as far as this can be told without starting it.
    """
    folder = Path(config.model)
    try:
        if config.engine == "openai":
            return config, asyncio.run(_served_model(config))
        detect_layout(config.model)
        if folder.is_dir():
            from captioner.engines.vllm import check_weights

            check_weights(folder)
    except (ValueError, EngineUnusable) as error:
        raise UsageError(str(error)) from None
    if folder.is_dir():
        # Workers may have another working directory.
        return replace(config, model=str(folder.absolute())), f"{folder.resolve().name}@{_folder_digest(folder)[:12]}"
    commit = _hub_commit(config.model)
    return replace(config, revision=commit), f"{config.model}@{commit[:12]}"


async def _served_model(config: EngineConfig) -> str:
    engine = await config.start()
    await engine.close()
    return engine.model


def _hub_commit(model: str) -> str:
    """The newest commit of a hub name, or the one in the cache if the hub cannot be reached."""
    try:
        from huggingface_hub import snapshot_download  # installed with vLLM and with the trainer

        return Path(snapshot_download(model, allow_patterns=["config.json", "params.json"])).name
    except Exception as error:  # a dozen kinds, from a gated model to a refusal of a proxy, with the same remedy
        why = " ".join(str(error).split())[:200]
        raise UsageError(
            f"cannot get {model} from the Hugging Face hub ({type(error).__name__}: {why}); give a folder with the "
            "model, or log in (hf auth login) if it asks for that"
        ) from None


def _folder_digest(folder: Path) -> str:
    configs = {name: (folder / name).read_text() for name in ("config.json", "params.json") if (folder / name).exists()}
    weights = (path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".model"))
    files = sorted((path.name, path.stat().st_size) for path in weights)
    return digest([configs, files])
