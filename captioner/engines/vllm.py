"""Pixtral through vLLM's async engine, in this process. `make captioner` installs it in .venv-captioner."""

import asyncio
import copy
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from PIL import Image

from captioner.engines import Completion, EngineDied, EngineFailure, EngineUnusable, RequestFailed
from captioner.prompt_layout import PromptLayout, detect_layout
from captioner.prompts import Prompt
from captioner.sampling import CompletionParams

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs, SamplingParams

# vLLM ends loops before max_tokens: up to 40 tokens, five times in a row, because "ha ha ha" may be in a caption.
# answers.py checks the rest.
_MAX_LOOP_TOKENS: Final = 40
_LOOP_REPEATS: Final = 5
_BATCHED_TOKENS: Final = 8192  # per step. A picture is never split, and the largest, 1024x1024, has 4,160
# Key in `image.info` of a picture's id in vLLM's caches, equal for each attempt and engine. Without an id, vLLM would
# hash all pixels.
_IMAGE_ID: Final = "vllm"
_CLOSE_SECONDS: Final = 10.0  # for vLLM's processes to end by themselves


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """One engine. vLLM downloads a name that is not a folder; a folder is loaded without network."""

    model: str
    revision: str = ""  # commit of a hub name; "": its newest
    tensor_parallel: int = 1  # GPUs that share the weights of one engine
    max_model_len: int = 8192  # tokens of picture, prompt and answer
    max_num_seqs: int = 128  # answers that are generated at the same time
    gpu_memory: float = 0.9  # share of the card's memory for weights and KV cache
    kv_cache: str = "auto"  # data type of the KV cache, auto (that of the weights) or fp8
    cpu_kv_cache_gib: float = 1.0  # without a GPU


class VllmEngine:
    """Loads on construction, in 20 seconds to minutes. Belongs to the event loop that first calls it."""

    name = "vllm"

    def __init__(self, settings: VllmSettings) -> None:
        """Raises ValueError if the model is not a Pixtral and EngineUnusable if vLLM cannot load it. Both messages say
        what to do."""
        self.model = settings.model
        layout = detect_layout(settings.model)
        folder = Path(settings.model)
        if folder.is_dir():
            check_weights(folder)
        vllm = _import_vllm(is_folder=folder.is_dir())
        try:
            self._engine: Any = vllm.AsyncLLMEngine.from_engine_args(_engine_args(settings, layout))
        except Exception as error:
            raise EngineUnusable(
                f"vLLM could not load {settings.model}: {_line(error)}. Its own messages are above or in Ray's logs. "
                "Often files are broken, or memory is short: give a higher --tensor-parallel, a lower --at-once or an "
                "FP8 checkpoint"
            ) from error
        self._numbers = itertools.count()
        tokenizer = self._engine.get_tokenizer()
        self._tokenizer = _MistralPrompts(tokenizer) if layout.kind == "mistral" else _TextPrompts(tokenizer, layout)

    async def complete(self, prompt: Prompt, image: Image.Image, params: CompletionParams) -> Completion:
        from vllm.v1.engine.exceptions import EngineDeadError

        assert image.mode == "RGB", "vLLM checks neither alpha nor palettes of a decoded picture"
        number = str(next(self._numbers))
        if self._engine is None:
            raise EngineDied("the engine was closed")
        try:
            inputs = {
                "prompt_token_ids": await self._tokenizer.tokens(prompt, image),
                "multi_modal_data": {"image": image},
                "multi_modal_uuids": {"image": [image.info.setdefault(_IMAGE_ID, uuid4().hex)]},
            }
            # One output, at the end.
            outputs = [output async for output in self._engine.generate(inputs, _sampling_params(params), number)]
        except Exception as error:
            if isinstance(error, EngineDeadError) or self._engine is None or self._engine.errored:
                raise EngineDied(f"vLLM ended ({_line(error)}); its last messages are in Ray's log") from error
            raise RequestFailed(EngineFailure.REFUSED, _line(error)) from error
        answer = outputs[-1].outputs[0]
        if answer.finish_reason in ("error", "abort"):
            raise RequestFailed(EngineFailure.ENGINE, answer.finish_reason)
        tokens_in = len(outputs[-1].prompt_token_ids or ())
        return Completion(answer.text, answer.finish_reason, tokens_in, len(answer.token_ids))

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            # Requests in flight learn of the end from the task that hands out outputs. Without any, it would only log.
            if engine.output_handler is not None and not engine.get_num_unfinished_requests():
                engine.output_handler.cancel()
            await asyncio.to_thread(engine.shutdown, _CLOSE_SECONDS)


class _TextPrompts:
    """Tokenizes prompts that are one text. The instructions before the picture are nine tenths of it and equal for all
    pictures, so they are tokenized once; the picture's token ends whatever comes before it."""

    def __init__(self, tokenizer: Any, layout: PromptLayout) -> None:
        # A copy, because vLLM's threads change the truncation of theirs, which fails while another thread encodes.
        self._tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._layout = layout
        self._cache: dict[str, list[int]] = {}

    async def tokens(self, prompt: Prompt, image: Image.Image) -> list[int]:
        before, after = self._layout.texts(prompt)
        if before not in self._cache:
            self._cache[before] = self._tokenizer.encode(before).ids
        # With the picture's token in front, because a tokenizer may treat the first letters of a text differently.
        rest: list[int] = self._tokenizer.encode(self._layout.image_token + after, add_special_tokens=False).ids
        return self._cache[before] + rest


class _MistralPrompts:
    """Tokenizes prompts with Mistral's own tokenizer, which reads special tokens in a text as plain letters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.mistral

    async def tokens(self, prompt: Prompt, image: Image.Image) -> list[int]:
        return await asyncio.to_thread(self._tokens, prompt, image)  # slow, because it prepares the picture too

    def _tokens(self, prompt: Prompt, image: Image.Image) -> list[int]:
        from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
        from mistral_common.protocol.instruct.messages import UserMessage
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        content = [TextChunk(text=prompt.instructions), ImageChunk(image=image), TextChunk(text=prompt.hints)]
        request = ChatCompletionRequest(messages=[UserMessage(content=content)])
        tokens: list[int] = self._tokenizer.encode_chat_completion(request).tokens
        return tokens


def check_weights(folder: Path) -> None:
    """Raises ValueError if a model folder lacks weights, which vLLM reports after half a minute and 100 lines."""
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} does not say which file has which weight; download it again") from None
    missing = sorted(name for name in named if not (folder / name).exists())
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of its {len(named)} weight files, {missing[0]}; download it again"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no weights (*.safetensors): download them from where its config came from")


def _import_vllm(*, is_folder: bool) -> Any:
    """vLLM, which reads these variables at import, here and in the processes that it starts."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns a dozen times about settings that are intended
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if is_folder:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import vllm
    except ImportError as error:
        raise EngineUnusable(
            f"cannot import vLLM ({_line(error)}); run: make captioner, and then the job with "
            ".venv-captioner/bin/python"
        ) from error
    return vllm


def _engine_args(settings: VllmSettings, layout: PromptLayout) -> "AsyncEngineArgs":
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform

    modes = ("tokenizer_mode", "config_format", "load_format")
    by_device: dict[str, Any] = {
        "gpu_memory_utilization": settings.gpu_memory, "max_num_batched_tokens": _BATCHED_TOKENS
    }  # fmt: skip
    if current_platform.is_cpu():
        by_device = {
            "dtype": "float32",
            "enforce_eager": True,  # compiling takes longer than a test
            "kv_cache_memory_bytes": int(settings.cpu_kv_cache_gib * 2**30),
            # A prompt read in two steps rewinds its seeded generator, which vLLM 0.29 cannot do on a CPU: the engine
            # dies ("CPU Generator does not use offset"). So each is read in one step, which it must then fit into.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_BATCHED_TOKENS, settings.max_model_len),
        }
    return AsyncEngineArgs(
        model=settings.model,
        revision=settings.revision or None,
        tokenizer_revision=settings.revision or None,
        tensor_parallel_size=settings.tensor_parallel,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        kv_cache_dtype=settings.kv_cache,
        limit_mm_per_prompt={"image": 1},
        mm_processor_cache_gb=0,  # every picture is new
        enable_prefix_caching=True,  # the instructions are not
        seed=0,
        generation_config="vllm",  # ignores sampling defaults in the model's folder
        disable_log_stats=True,
        **(dict.fromkeys(modes, "mistral") if layout.kind == "mistral" else {}),
        **by_device,
    )


def _sampling_params(params: CompletionParams) -> "SamplingParams":
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

    return SamplingParams(
        seed=params.seed,
        temperature=params.temperature,
        top_p=params.top_p,
        max_tokens=params.max_tokens,
        repetition_detection=RepetitionDetectionParams(max_pattern_size=_MAX_LOOP_TOKENS, min_count=_LOOP_REPEATS),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _line(error: BaseException) -> str:
    """The error's innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
