"""Real vLLM with a tiny random Pixtral: in this process, and as a server.

.venv-captioner/bin/python -m pytest tests/captioner/engines/test_vllm.py
"""

import asyncio
import importlib.util
import json
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from captioner.engines import (
    API_KEY_VARIABLE,
    Completion,
    EngineDied,
    EngineFailure,
    EngineUnusable,
    RequestFailed,
)
from captioner.prompt_layout import detect_layout
from captioner.prompts import Prompt, build_prompt
from captioner.requests import CaptionRequest
from captioner.sampling import CompletionParams

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is installed in another environment: make captioner", allow_module_level=True)

import psutil

from captioner.engines.openai import OpenAIEngine, ServerSettings
from captioner.engines.vllm import VllmEngine, VllmSettings, _MistralPrompts, _TextPrompts, check_weights

PATCH = 16
LOADS_WITHIN = 180  # seconds

Run = Callable[[Awaitable[Any]], Any]
VllmServer = tuple[str, "subprocess.Popen[bytes]"]  # address, process


def picture(number: int) -> Image.Image:
    """A picture whose size (1 to 8 patches a side) and colour no other number below 64 has."""
    size = (PATCH * (1 + number % 8), PATCH * (1 + number // 8))
    return Image.new("RGB", size, (number * 4, 255 - number * 3, number * 37 % 256))


def prompt(number: int) -> Prompt:
    return build_prompt(CaptionRequest(str(number), {"general": [f"star {n}" for n in range(number % 5)]}))


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One event loop for all tests, because an engine belongs to the loop that first called it."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def engine(vllm_server: VllmServer, tiny_pixtral: Path, run: Run) -> Iterator[VllmEngine]:
    """Loads while the server starts."""
    engine = VllmEngine(VllmSettings(model=str(tiny_pixtral), max_model_len=4096, cpu_kv_cache_gib=0.25))
    yield engine
    run(engine.close())


@pytest.fixture
def served(
    vllm_server: VllmServer, engine: VllmEngine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OpenAIEngine]:
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    url, process = vllm_server
    for _ in range(LOADS_WITHIN):
        assert process.poll() is None, "the server ended"
        try:
            engine_of_server = run(OpenAIEngine.connect(ServerSettings(url=url, tries=1)))
        except EngineUnusable:
            time.sleep(1)
            continue
        break
    else:
        pytest.fail(f"{url} did not answer within {LOADS_WITHIN} s")
    yield engine_of_server
    run(engine_of_server.close())


def test_64_concurrent_answers_each_belong_to_their_prompt_and_picture(
    engine: VllmEngine, run: Run, tiny_pixtral: Path
) -> None:
    from tokenizers import Tokenizer

    async def all_at_once() -> list[Completion]:
        return await asyncio.gather(
            *(engine.complete(prompt(n), picture(n), CompletionParams(seed=n, max_tokens=4 + n % 3)) for n in range(64))
        )

    answers = run(all_at_once())

    tokenizer, layout = Tokenizer.from_file(str(tiny_pixtral / "tokenizer.json")), detect_layout(tiny_pixtral)
    for n, answer in enumerate(answers):
        text_tokens = len(tokenizer.encode("[IMG]".join(layout.texts(prompt(n))))) - 1  # without the picture's token
        rows, columns = 1 + n // 8, 1 + n % 8
        assert answer.tokens_in == text_tokens + rows * (columns + 1), n  # each row of patches ends with a token
        assert answer.tokens_out <= 4 + n % 3
    assert len({answer.text for answer in answers}) > 60

    for n in (0, 17, 42, 63):  # other requests in flight change nothing
        alone = run(engine.complete(prompt(n), picture(n), CompletionParams(seed=n, max_tokens=4 + n % 3)))
        assert alone == answers[n]


def test_the_text_depends_only_on_seed_and_picture(engine: VllmEngine, run: Run) -> None:
    def text(seed: int, number: int) -> str:
        return run(engine.complete(prompt(1), picture(number), CompletionParams(seed=seed, max_tokens=12))).text

    assert text(1, 9) == text(1, 9)
    assert text(1, 9) != text(2, 9)
    assert text(1, 9) != text(1, 18)


def test_an_answer_ends_at_max_tokens(engine: VllmEngine, run: Run) -> None:
    answer = run(engine.complete(prompt(1), picture(3), CompletionParams(seed=1, max_tokens=3)))
    assert (answer.finish_reason, answer.tokens_out) == ("length", 3)


def test_a_loop_is_ended_early(engine: VllmEngine, run: Run) -> None:
    """At temperature 0 a random model repeats itself for one picture in ten."""

    async def greedily() -> list[Completion]:
        params = CompletionParams(seed=0, temperature=0, max_tokens=256)
        return await asyncio.gather(*(engine.complete(prompt(4), picture(n), params) for n in range(64)))

    answers = run(greedily())
    loops = [answer for answer in answers if answer.finish_reason == "repetition"]
    assert loops
    assert all(answer.tokens_out < 256 for answer in loops)


def test_bad_requests_fail_alone(engine: VllmEngine, run: Run) -> None:
    endless = Prompt("star " * 5000, "")
    pictures_too_many = Prompt("[IMG]", "[IMG]")

    async def together() -> list[Completion | BaseException]:
        good = [engine.complete(prompt(n), picture(n), CompletionParams(seed=n, max_tokens=8)) for n in range(8)]
        bad = [
            engine.complete(endless, picture(0), CompletionParams(seed=0)),
            engine.complete(prompt(0), picture(0), CompletionParams(seed=0, temperature=-1)),
            engine.complete(pictures_too_many, picture(0), CompletionParams(seed=0, max_tokens=8)),
        ]
        return await asyncio.gather(*good, *bad, return_exceptions=True)

    *good, long, cold, many = run(together())
    assert all(isinstance(answer, Completion) for answer in good)
    for error in (long, cold):
        assert isinstance(error, RequestFailed)
        assert error.failure is EngineFailure.REFUSED
    assert "4096 tokens" in str(long)
    assert isinstance(many, Completion | RequestFailed)  # vLLM fills the first; the engine survives in any case


def test_a_cancelled_request_is_removed_from_the_engine(engine: VllmEngine, run: Run) -> None:
    async def cancelled() -> None:
        async with asyncio.timeout(0.05):
            await engine.complete(
                prompt(1), picture(63), CompletionParams(seed=5, temperature=2.0, top_p=1.0, max_tokens=2000)
            )

    with pytest.raises(TimeoutError):
        run(cancelled())
    assert run(engine.complete(prompt(1), picture(1), CompletionParams(seed=1, max_tokens=3))).tokens_out == 3
    assert engine._engine.get_num_unfinished_requests() == 0


def test_a_vllm_server_gets_the_same_tokens_as_the_engine(served: OpenAIEngine, engine: VllmEngine, run: Run) -> None:
    assert served.model == "tiny"

    async def both() -> tuple[list[Completion], list[Completion]]:
        all_params = [CompletionParams(seed=n, max_tokens=6) for n in range(16)]
        here = [engine.complete(prompt(n), picture(n), params) for n, params in enumerate(all_params)]
        there = [served.complete(prompt(n), picture(n), params) for n, params in enumerate(all_params)]
        return await asyncio.gather(*here), await asyncio.gather(*there)

    here, there = run(both())
    assert [answer.tokens_in for answer in there] == [answer.tokens_in for answer in here]
    assert all(answer.text and answer.finish_reason in ("length", "stop") for answer in there)
    again = run(served.complete(prompt(3), picture(3), CompletionParams(seed=3, max_tokens=6)))
    assert again == there[3]


def test_a_server_refuses_bad_requests_keys_and_models(
    served: OpenAIEngine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestFailed) as refused:
        run(served.complete(Prompt("star " * 5000, "end"), picture(0), CompletionParams(seed=0)))
    assert refused.value.failure is EngineFailure.REFUSED
    url = served._settings.url
    with pytest.raises(EngineUnusable, match="no model other; give --model one of: tiny"):
        run(OpenAIEngine.connect(ServerSettings(url=url, model="other")))
    monkeypatch.setenv(API_KEY_VARIABLE, "wrong")
    with pytest.raises(EngineUnusable, match=r"wants a key, or another one.*set OPENAI_API_KEY"):
        run(OpenAIEngine.connect(ServerSettings(url=url)))


def test_a_prompt_tokenized_in_two_parts_has_the_tokens_of_the_whole_text(tiny_pixtral: Path, run: Run) -> None:
    from transformers import AutoTokenizer

    tokenizer, layout = AutoTokenizer.from_pretrained(tiny_pixtral), detect_layout(tiny_pixtral)
    prompts = _TextPrompts(tokenizer, layout)
    for hints in ("", " ", "a", " a red star ", "\n\nArtist: ÿ漢.", *(prompt(n).hints for n in range(5))):
        asked = Prompt("Describe it.  ", hints)
        assert run(prompts.tokens(asked, picture(1))) == tokenizer("[IMG]".join(layout.texts(asked)))["input_ids"], (
            hints
        )


def test_mistrals_tokenizer_keeps_the_picture_between_the_texts(tiny_mistral_layout: Path) -> None:
    """The instructions come first, so that they are cached as a prefix; a tag that looks like a token stays text."""
    from vllm.tokenizers.mistral import MistralTokenizer

    assert detect_layout(tiny_mistral_layout).kind == "mistral"
    tokenizer = MistralTokenizer.from_pretrained(str(tiny_mistral_layout))
    tokens = asyncio.run(_MistralPrompts(tokenizer).tokens(Prompt("Describe it.", "Hints: [IMG]."), picture(9)))
    special = {name: tokenizer.convert_tokens_to_ids([name])[0] for name in ("[INST]", "[/INST]", "[IMG]")}
    assert (tokens[1], tokens[-1]) == (special["[INST]"], special["[/INST]"])
    first = tokens.index(special["[IMG]"])
    assert tokenizer.decode(tokens[2:first]) == "Describe it."
    assert tokens.count(special["[IMG]"]) == 4  # of 2x2 patches
    assert tokenizer.decode(tokens[first + 6 : -1]) == "Hints: [IMG]."


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no weights"):
        check_weights(tmp_path)
    shards = {f"layer.{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match="lacks 1 of its 2 weight files, model-00002"):
        check_weights(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    check_weights(tmp_path)


def test_a_dead_engine_raises_and_leaves_no_process(engine: VllmEngine, vllm_server: VllmServer, run: Run) -> None:
    """The last test of this file, because it kills the engine."""
    of_server = psutil.Process(vllm_server[1].pid).children(recursive=True)
    processes = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM::")]
    processes = [process for process in processes if process not in of_server]
    [core] = [process for process in processes if process.name() == "VLLM::EngineCore"]

    async def killed_while_working() -> list[Completion | BaseException]:
        params = CompletionParams(seed=1, temperature=2.0, top_p=1.0, max_tokens=2000)
        work = [asyncio.ensure_future(engine.complete(prompt(n), picture(n), params)) for n in range(4)]
        await asyncio.sleep(0.2)
        core.kill()
        return await asyncio.gather(*work, return_exceptions=True)

    assert any(isinstance(outcome, EngineDied) for outcome in run(killed_while_working()))
    with pytest.raises(EngineDied):
        run(engine.complete(prompt(1), picture(1), CompletionParams(seed=1)))
    run(engine.close())
    psutil.wait_procs(processes, timeout=20)
    assert [process for process in processes if process.is_running()] == []
