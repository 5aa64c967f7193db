"""A rejected or failed attempt is retried. After the last one the caption is made from the tags, with the reason."""

import asyncio
from collections.abc import Callable

import pytest
from PIL import Image

from captioner.captioning import Outcome, caption_image
from captioner.engines import Completion, EngineDied, EngineFailure, EngineUnusable, RequestFailed
from captioner.prompts import PROMPT_VERSION, Prompt
from captioner.requests import CaptionReason, CaptionRequest
from captioner.sampling import CompletionParams, Sampling, seed_for

GOOD = "A girl with long silver hair stands under a red star and looks up at the night sky."
REQUEST = CaptionRequest("danbooru:7", {"special": ["1girl"], "general": ["silver hair", "red star"]})
PICTURE = Image.new("RGB", (32, 32))

Reply = Callable[[int], Completion]  # by the number of the call, from 0


class Scripted:
    """An engine that answers from a function and records the parameters of each call."""

    name, model = "scripted", "none"

    def __init__(self, reply: Reply, seconds: float = 0.0) -> None:
        self.reply, self.seconds, self.calls = reply, seconds, list[CompletionParams]()

    async def complete(self, prompt: Prompt, image: Image.Image, params: CompletionParams) -> Completion:
        self.calls.append(params)
        await asyncio.sleep(self.seconds)
        return self.reply(len(self.calls) - 1)

    async def close(self) -> None:
        pass


def ask(engine: Scripted, timeout: float | None = None, previous_attempts: int = 0) -> Outcome:
    return asyncio.run(
        caption_image(REQUEST, PICTURE, engine, Sampling(), PROMPT_VERSION, timeout, previous_attempts)
    )  # fmt: skip


def says(*texts: str) -> Reply:
    return lambda call: Completion(texts[call], "stop", 100, 10)


def test_a_good_answer_takes_one_attempt() -> None:
    outcome = ask(engine := Scripted(says(GOOD)))
    assert (outcome.answer.caption, outcome.answer.reason) == (GOOD, None)
    assert (outcome.attempts, outcome.finish_reason, outcome.tokens_in, outcome.tokens_out) == (1, "stop", 100, 10)
    assert [params.temperature for params in engine.calls] == [0.5]


def test_a_retry_has_another_seed_and_a_lower_temperature_and_all_tokens_count() -> None:
    outcome = ask(engine := Scripted(says("I'm sorry, I can't help with that.", GOOD)))
    assert (outcome.answer.caption, outcome.answer.reason, outcome.attempts) == (GOOD, None, 2)
    assert (outcome.tokens_in, outcome.tokens_out) == (200, 20)
    assert [(params.seed, params.temperature) for params in engine.calls] == [
        (seed_for(REQUEST.id, 0), 0.5),
        (seed_for(REQUEST.id, 1), 0.3),
    ]


def test_after_the_last_attempt_the_caption_is_made_from_tags_with_the_last_reason() -> None:
    outcome = ask(Scripted(says("", "I cannot see an image here, sorry.", "")))
    assert (outcome.answer.caption, outcome.answer.reason) == ("1girl, silver hair, red star", CaptionReason.EMPTY)
    assert (outcome.attempts, outcome.raw_text) == (3, "")


def test_a_failed_request_and_a_timeout_count_as_attempts() -> None:
    def fails(call: int) -> Completion:
        raise RequestFailed(EngineFailure.SERVER, "500")

    assert ask(engine := Scripted(fails)).answer.reason == EngineFailure.SERVER
    assert len(engine.calls) == 3
    outcome = ask(engine := Scripted(says(GOOD, GOOD, GOOD), seconds=5), timeout=0.01)
    assert (outcome.answer.reason, outcome.attempts, outcome.finish_reason) == (EngineFailure.TIMEOUT, 3, None)
    assert len(engine.calls) == 3


def test_a_later_job_uses_new_seeds() -> None:
    outcome = ask(engine := Scripted(says("", GOOD)), previous_attempts=3)
    assert [params.seed for params in engine.calls] == [seed_for(REQUEST.id, 3), seed_for(REQUEST.id, 4)]
    assert [params.temperature for params in engine.calls] == [0.5, 0.3]
    assert outcome.attempts == 5


@pytest.mark.parametrize("error", [EngineDied("gone"), EngineUnusable("no key")])
def test_errors_of_the_engine_itself_are_left_to_the_caller(error: Exception) -> None:
    def raises(call: int) -> Completion:
        raise error

    with pytest.raises(type(error)):
        ask(Scripted(raises))
