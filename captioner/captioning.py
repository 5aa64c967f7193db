"""Captions one picture: asks an engine, checks the answer, retries, and falls back to the tags.

Knows neither shards nor Ray.
"""

import asyncio
from dataclasses import dataclass, replace
from typing import Final

from PIL import Image

from captioner.answers import check
from captioner.engines import EngineFailure, RequestFailed, VisionEngine
from captioner.engines.tags import caption_from_tags
from captioner.prompts import build_prompt
from captioner.requests import Answer, CaptionReason, CaptionRequest
from captioner.sampling import Sampling

ENGINE_FAILURES: Final = frozenset(map(str, EngineFailure))
# Reasons that another attempt may remove. Others are permanent, such as a picture that cannot be decoded.
MODEL_FAILURES: Final = ENGINE_FAILURES | frozenset(map(str, CaptionReason))


@dataclass(frozen=True)
class Outcome:
    """Result of a request. If the answer has a reason, its caption is made from the tags, or None without tags. The
    other fields describe the model's attempts."""

    answer: Answer
    attempts: int = 0
    finish_reason: str | None = None  # of the last attempt
    tokens_in: int = 0  # sum over all attempts: what was computed and paid for
    tokens_out: int = 0
    raw_text: str = ""  # the model's own words in the last attempt that it answered
    failure: str = ""  # what the engine said of the last request that failed


async def caption_image(
    request: CaptionRequest,
    image: Image.Image,
    engine: VisionEngine,
    sampling: Sampling,
    prompt_version: str,
    timeout: float | None = None,
    previous_attempts: int = 0,
) -> Outcome:
    """The first of `sampling.attempts` answers that passes all checks; `timeout` limits each attempt, in seconds.

    `previous_attempts` are those of earlier jobs. EngineDied and EngineUnusable are left to the caller, because they
    do not concern this picture.
    """
    prompt = build_prompt(request, prompt_version)
    answer = Answer(request.id, None, None)
    outcome = Outcome(answer, previous_attempts)
    for attempt in range(len(sampling.temperatures)):
        params = sampling.params(request.id, attempt, previous_attempts)
        outcome = replace(outcome, attempts=outcome.attempts + 1, finish_reason=None)
        try:
            async with asyncio.timeout(timeout):
                completion = await engine.complete(prompt, image, params)
        except TimeoutError:
            answer = Answer(request.id, None, EngineFailure.TIMEOUT)
        except RequestFailed as error:
            answer = Answer(request.id, None, error.failure)
            outcome = replace(outcome, failure=error.detail)
        else:
            answer = check(completion.text, completion.finish_reason, request)
            outcome = replace(
                outcome,
                finish_reason=completion.finish_reason,
                tokens_in=outcome.tokens_in + completion.tokens_in,
                tokens_out=outcome.tokens_out + completion.tokens_out,
                raw_text=completion.text,
            )
            if answer.reason is None:
                return replace(outcome, answer=answer)
    return replace(outcome, answer=caption_from_tags(request, answer.reason))
