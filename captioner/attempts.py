"""One picture -> its caption: drawn, judged, drawn again, and in the end put together from its tags.

Knows neither shards nor Ray.
"""

import asyncio
from dataclasses import dataclass, replace
from typing import Final

from PIL import Image

from captioner.answers import check
from captioner.engines import Draw, Failure, RequestFailed, VisionEngine
from captioner.engines.tags import TagEngine
from captioner.prompts import PROMPT_VERSION, Sampling, prompt_for, seed_for
from captioner.requests import Answer, Reason, Request

# Reasons that another draw may do away with; others, such as a picture that cannot be decoded, stay.
MODEL_FAILURES: Final = frozenset({reason.value for reason in (*Reason, *Failure)})
ENGINE_FAILURES: Final = frozenset({failure.value for failure in Failure})


@dataclass(frozen=True)
class Outcome:
    """What became of a request. An answer with a reason has the caption of the tags, or none where there are no tags
    either; the other fields tell of the model."""

    answer: Answer
    attempts: int = 0
    finish_reason: str | None = None  # of the last attempt
    tokens_in: int = 0  # of all attempts: what was computed and paid
    tokens_out: int = 0
    said: str = ""  # the model's own words in the last attempt that it answered


async def caption(
    request: Request,
    image: Image.Image,
    engine: VisionEngine,
    sampling: Sampling,
    version: str = PROMPT_VERSION,
    timeout: float | None = None,
    drawn_before: int = 0,
) -> Outcome:
    """The first good one of sampling.attempts answers, each of which may take `timeout` seconds.

    `drawn_before`: attempts of earlier jobs, whose seeds would give the same answers again. EngineDied and
    EngineUnusable are the caller's: they are not about this picture.
    """
    prompt = prompt_for(request, version)
    answer = Answer(request.id, None, None)
    outcome = Outcome(answer, drawn_before)
    for attempt in range(sampling.attempts):
        draw = replace(Draw.of(sampling, request.id, attempt), seed=seed_for(request.id, outcome.attempts))
        outcome = replace(outcome, attempts=outcome.attempts + 1, finish_reason=None)
        try:
            async with asyncio.timeout(timeout):
                completion = await engine.complete(prompt, image, draw)
        except TimeoutError:
            answer = Answer(request.id, None, Failure.TIMEOUT)
        except RequestFailed as error:
            answer = Answer(request.id, None, error.failure)
        else:
            answer = check(completion.text, completion.finish_reason, request)
            outcome = replace(
                outcome,
                finish_reason=completion.finish_reason,
                tokens_in=outcome.tokens_in + completion.tokens_in,
                tokens_out=outcome.tokens_out + completion.tokens_out,
                said=completion.text,
            )
        if answer.reason is None:
            return replace(outcome, answer=answer)
    assert answer.reason, "at least one attempt"
    return replace(outcome, answer=from_tags(request, answer.reason))


def from_tags(request: Request, reason: str) -> Answer:
    """The caption of last resort, with why there is no better one."""
    [answer] = TagEngine().caption([request])
    return Answer(request.id, answer.caption, reason)
