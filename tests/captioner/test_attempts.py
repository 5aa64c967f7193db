"""A refused or failed answer is drawn again; after the last the tags are the caption, and the reason stays."""

import asyncio
from collections.abc import Callable

import pytest
from PIL import Image

from captioner.attempts import Outcome, caption
from captioner.engines import Completion, Draw, EngineDied, EngineUnusable, Failure, RequestFailed
from captioner.prompts import Prompt, Sampling, seed_for
from captioner.requests import Reason, Request

GOOD = "A girl with long silver hair stands under a red star and looks up at the night sky."
REQUEST = Request("danbooru:7", {"special": ["1girl"], "general": ["silver hair", "red star"]})
PICTURE = Image.new("RGB", (32, 32))

Reply = Callable[[int], Completion]  # by the number of the call, from 0


class Scripted:
    """An engine that answers from a function and remembers its draws."""

    name, model = "scripted", "none"

    def __init__(self, reply: Reply, seconds: float = 0.0) -> None:
        self.reply, self.seconds, self.draws = reply, seconds, list[Draw]()

    async def complete(self, prompt: Prompt, image: Image.Image, draw: Draw) -> Completion:
        self.draws.append(draw)
        await asyncio.sleep(self.seconds)
        return self.reply(len(self.draws) - 1)

    async def close(self) -> None:
        pass


def ask(engine: Scripted, timeout: float | None = None, drawn_before: int = 0) -> Outcome:
    return asyncio.run(
        caption(REQUEST, PICTURE, engine, Sampling(), timeout=timeout, drawn_before=drawn_before)
    )  # fmt: skip


def says(*texts: str) -> Reply:
    return lambda call: Completion(texts[call], "stop", 100, 10)


def test_a_good_answer_is_drawn_once() -> None:
    outcome = ask(engine := Scripted(says(GOOD)))
    assert (outcome.answer.caption, outcome.answer.reason) == (GOOD, None)
    assert (outcome.attempts, outcome.finish_reason, outcome.tokens_in, outcome.tokens_out) == (1, "stop", 100, 10)
    assert [draw.temperature for draw in engine.draws] == [0.5]


def test_a_refused_answer_is_drawn_again_with_another_seed_and_cooler_and_all_tokens_count() -> None:
    outcome = ask(engine := Scripted(says("I'm sorry, I can't help with that.", GOOD)))
    assert (outcome.answer.caption, outcome.answer.reason, outcome.attempts) == (GOOD, None, 2)
    assert (outcome.tokens_in, outcome.tokens_out) == (200, 20)
    assert [(draw.seed, draw.temperature) for draw in engine.draws] == [
        (seed_for(REQUEST.id, 0), 0.5),
        (seed_for(REQUEST.id, 1), 0.3),
    ]


def test_after_the_last_attempt_the_tags_are_the_caption_and_the_last_reason_stays() -> None:
    outcome = ask(Scripted(says("", "I cannot see an image here, sorry.", "")))
    assert (outcome.answer.caption, outcome.answer.reason) == ("1girl, silver hair, red star", Reason.EMPTY)
    assert outcome.attempts == 3


def test_a_failed_request_and_one_that_takes_too_long_are_attempts() -> None:
    def fails(call: int) -> Completion:
        raise RequestFailed(Failure.SERVER, "500")

    assert ask(engine := Scripted(fails)).answer.reason == Failure.SERVER
    assert len(engine.draws) == 3
    outcome = ask(engine := Scripted(says(GOOD, GOOD, GOOD), seconds=5), timeout=0.01)
    assert (outcome.answer.reason, outcome.attempts, outcome.finish_reason) == (Failure.TIMEOUT, 3, None)
    assert len(engine.draws) == 3


def test_a_later_job_draws_with_seeds_that_no_earlier_one_used() -> None:
    outcome = ask(engine := Scripted(says("", GOOD)), drawn_before=3)
    assert [draw.seed for draw in engine.draws] == [seed_for(REQUEST.id, 3), seed_for(REQUEST.id, 4)]
    assert [draw.temperature for draw in engine.draws] == [0.5, 0.3]
    assert outcome.attempts == 5


@pytest.mark.parametrize("error", [EngineDied("gone"), EngineUnusable("no key")])
def test_what_is_not_about_the_picture_is_the_callers(error: Exception) -> None:
    def raises(call: int) -> Completion:
        raise error

    with pytest.raises(type(error)):
        ask(Scripted(raises))
