"""Pixtral through vLLM's async engine, one in this process. Installed by `make captioner`, in .venv-captioner."""

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

from captioner.engines import Completion, Draw, EngineDied, EngineUnusable, Failure, RequestFailed
from captioner.prompts import Layout, Prompt, layout_of

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs, SamplingParams

# Loops are ended early, instead of at max_tokens: up to so many tokens, so often in a row. Four times, because "ha ha
# ha" is a caption; answers.py judges what ends otherwise.
_LONGEST_LOOP: Final = 40
_TIMES_ROUND: Final = 5
# Pixtral's largest picture, 1024x1024, has this many tokens, and a picture is never split over two batches.
_LARGEST_PICTURE: Final = 4160
# Where a picture keeps its name in vLLM's caches, the same for each attempt and engine. Unnamed, vLLM would hash all of
# its pixels.
_NAME: Final = "vllm"
_CLOSE_SECONDS: Final = 10.0  # for its processes to end by themselves


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """One engine. A name that is no folder is downloaded by vLLM; a folder is loaded without any network."""

    model: str
    revision: str = ""  # of a hub name: its commit; "": its newest
    tensor_parallel: int = 1  # GPUs that share the weights of one engine
    max_model_len: int = 8192  # tokens of picture, prompt and answer
    max_num_batched_tokens: int = 8192  # per step: at least the largest picture
    max_num_seqs: int = 128  # answers written at the same time
    gpu_memory: float = 0.9  # of the card's memory, for weights and KV cache
    cpu_kv_cache_gib: float = 1.0  # without a GPU
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel {self.tensor_parallel}: give 1 or more GPUs per engine")
        if self.max_num_batched_tokens < _LARGEST_PICTURE:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens}: give at least {_LARGEST_PICTURE}, what the "
                "largest picture has"
            )


class VllmEngine:
    """Loads on construction, in 20 s to minutes; belongs to the event loop that first calls it."""

    name = "vllm"

    def __init__(self, settings: VllmSettings) -> None:
        """ValueError for a model that is no Pixtral, EngineUnusable for one that vLLM cannot load; both name a mend."""
        self.model = settings.model
        self._layout = layout_of(settings.model)
        folder = Path(settings.model)
        if folder.is_dir():
            check_weights(folder)
        vllm = _import_vllm(is_folder=folder.is_dir())
        try:
            self._engine: Any = vllm.AsyncLLMEngine.from_engine_args(_engine_args(settings, self._layout))
        except Exception as error:
            raise EngineUnusable(_not_loaded(settings, error)) from error
        self._numbers = itertools.count()
        tokenizer = self._engine.get_tokenizer()
        is_mistral = self._layout.kind == "mistral"
        self._chat = _MistralChat(tokenizer) if is_mistral else _TextChat(tokenizer, self._layout)

    async def complete(self, prompt: Prompt, image: Image.Image, draw: Draw) -> Completion:
        from vllm.v1.engine.exceptions import EngineDeadError

        assert image.mode == "RGB", "vLLM checks neither alpha nor palettes of a decoded picture"
        number = str(next(self._numbers))
        if self._engine is None:
            raise EngineDied(f"the engine of {self.model} was closed")
        try:
            tokens = await self._chat.tokens(prompt, image)
            inputs = {
                "prompt_token_ids": tokens,
                "multi_modal_data": {"image": image},
                "multi_modal_uuids": {"image": [image.info.setdefault(_NAME, uuid4().hex)]},
            }
            # One output, when it is done.
            outputs = [output async for output in self._engine.generate(inputs, _sampling_params(draw), number)]
        except EngineDeadError as error:
            raise EngineDied(
                f"vLLM's process for {self.model} ended; its last words are above, or in Ray's log"
            ) from error
        except Exception as error:
            if self._engine is None or self._engine.errored:
                raise EngineDied(f"vLLM's process for {self.model} ended: {_line(error)}") from error
            raise RequestFailed(Failure.REFUSED, _line(error)) from error
        return _completion(outputs[-1])

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            # Work that waits learns of the end from the task that hands out answers; without any, it would only log.
            if engine.output_handler is not None and not engine.get_num_unfinished_requests():
                engine.output_handler.cancel()
            await asyncio.to_thread(engine.shutdown, _CLOSE_SECONDS)


class _TextChat:
    """Tokens of a prompt that is one text. What stands before the picture is nine tenths of it and the same for all
    pictures, so it is read once: the picture's token ends whatever stands before it."""

    def __init__(self, tokenizer: Any, layout: Layout) -> None:
        # A copy: vLLM's threads set and unset the limits of theirs, which is an error while another thread reads.
        self._tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._layout = layout
        self._read: dict[str, list[int]] = {}

    async def tokens(self, prompt: Prompt, image: Image.Image) -> list[int]:
        before, behind = self._layout.texts(prompt)
        if before not in self._read:
            self._read[before] = self._tokenizer.encode(before).ids
        # Behind the picture's token, as a tokenizer may read the first letters of a text otherwise.
        rest: list[int] = self._tokenizer.encode(self._layout.image_token + behind, add_special_tokens=False).ids
        return self._read[before] + rest


class _MistralChat:
    """Tokens of a prompt by Mistral's own tokenizer, which reads special tokens in a text as plain letters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.mistral

    async def tokens(self, prompt: Prompt, image: Image.Image) -> list[int]:
        return await asyncio.to_thread(self._tokens, prompt, image)  # it takes its time over the picture

    def _tokens(self, prompt: Prompt, image: Image.Image) -> list[int]:
        from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
        from mistral_common.protocol.instruct.messages import UserMessage
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        content = [TextChunk(text=prompt.instructions), ImageChunk(image=image), TextChunk(text=prompt.hints)]
        request = ChatCompletionRequest(messages=[UserMessage(content=content)])
        tokens: list[int] = self._tokenizer.encode_chat_completion(request).tokens
        return tokens


def check_weights(folder: Path) -> None:
    """ValueError for a model folder without its weights: vLLM would say so after half a minute and 100 lines."""
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} does not tell which file has which weight; download it again") from None
    missing = sorted(name for name in named if not (folder / name).exists())
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of its {len(named)} weight files, {missing[0]}; download it again"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no weights (*.safetensors): download them from where its config came from")


def _import_vllm(*, is_folder: bool) -> Any:
    """vLLM, quiet unless told otherwise. All this is read at import, here and in the processes that it starts."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns a dozen times of what is meant so
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if is_folder:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import vllm
    except ImportError as error:
        raise EngineUnusable(
            f"vLLM does not import here ({_line(error)}); run: make captioner, and then the job with "
            ".venv-captioner/bin/python"
        ) from error
    return vllm


def _engine_args(settings: VllmSettings, layout: Layout) -> "AsyncEngineArgs":
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform

    by_device: dict[str, Any] = {
        "gpu_memory_utilization": settings.gpu_memory,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
    }
    if current_platform.is_cpu():
        by_device = {
            "dtype": "float32",
            "enforce_eager": True,  # compiling takes longer than a test
            "kv_cache_memory_bytes": int(settings.cpu_kv_cache_gib * 2**30),
            # A prompt read in two steps winds its seeded generator back, which vLLM 0.29 cannot do on a CPU: the engine
            # dies ("CPU Generator does not use offset"). So each is read in one, which a step must then hold.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(settings.max_num_batched_tokens, settings.max_model_len),
        }
    return AsyncEngineArgs(
        model=settings.model,
        revision=settings.revision or None,
        tokenizer_revision=settings.revision or None,
        tensor_parallel_size=settings.tensor_parallel,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        limit_mm_per_prompt={"image": 1},
        mm_processor_cache_gb=0,  # every picture is new
        enable_prefix_caching=True,  # the instructions are not
        seed=settings.seed,
        generation_config="vllm",  # nothing of how answers are drawn comes from the model's folder
        disable_log_stats=True,
        **layout.engine_options,
        **by_device,
    )


def _sampling_params(draw: Draw) -> "SamplingParams":
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

    return SamplingParams(
        seed=draw.seed,
        temperature=draw.temperature,
        top_p=draw.top_p,
        max_tokens=draw.max_tokens,
        repetition_detection=RepetitionDetectionParams(max_pattern_size=_LONGEST_LOOP, min_count=_TIMES_ROUND),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any) -> Completion:
    """RequestFailed for an answer that vLLM gave up."""
    answer = output.outputs[0]
    if answer.finish_reason in ("error", "abort"):
        raise RequestFailed(Failure.ENGINE, answer.finish_reason)
    return Completion(answer.text, answer.finish_reason, len(output.prompt_token_ids or ()), len(answer.token_ids))


def _not_loaded(settings: VllmSettings, error: Exception) -> str:
    return (
        f"vLLM could not load {settings.model}: {_line(error)}. Its own words are above, or in Ray's logs; "
        "often memory (give more GPUs in --tensor-parallel, a lower --at-once or an FP8 checkpoint) or broken files"
    )


def _line(error: BaseException) -> str:
    """The error's innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
