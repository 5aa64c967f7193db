"""How completions are sampled: by a job, and by each of its attempts."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CompletionParams:
    """How one completion is sampled: the same parameters, prompt and picture give the same text."""

    seed: int  # 32 bits
    temperature: float = 0.5
    top_p: float = 0.9
    max_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a job samples: each retry of a rejected answer has another seed and at most the same temperature."""

    temperatures: tuple[float, ...] = (0.5, 0.3, 0.2)  # one per attempt: at most two retries
    top_p: float = 0.9
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if not 1 <= len(self.temperatures) <= 3:
            raise ValueError(f"{len(self.temperatures)} temperatures: give one per attempt, from 1 to 3")
        if any(not 0 <= t <= 2 for t in self.temperatures):
            raise ValueError(f"temperatures {self.temperatures}: each must be from 0 to 2, best from 0.2 to 0.6")
        if list(self.temperatures) != sorted(self.temperatures, reverse=True):
            raise ValueError(f"temperatures {self.temperatures}: a retry needs the same or a lower temperature")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens}: give 1 or more")

    def params(self, id: str, attempt: int, previous_attempts: int = 0) -> CompletionParams:
        """Parameters of an attempt, counted from 0. `previous_attempts` of earlier jobs shift the seed, because the
        seeds of those would give the same texts again."""
        return CompletionParams(
            seed=seed_for(id, previous_attempts + attempt),
            temperature=self.temperatures[attempt],
            top_p=self.top_p,
            max_tokens=self.max_tokens,
        )


def seed_for(id: str, attempt: int) -> int:
    """A 32-bit seed for an image's attempt, equal in every process and run (unlike Python's `hash`)."""
    return int.from_bytes(hashlib.blake2b(f"{attempt}:{id}".encode(), digest_size=4).digest(), "big")
