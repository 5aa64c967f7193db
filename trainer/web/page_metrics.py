"""The page's figures for Prometheus, under one prefix."""

from collections.abc import Callable
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FORMAT: Final = CONTENT_TYPE_LATEST  # media type of `PageFigures.text`
_PREFIX: Final = "hdm_page_"
_SECONDS: Final = (0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
# Why a picture was not drawn; each is there from the start, so that a rate can be taken of the first one, too.
REFUSALS: Final = ("input", "queue_full")


class PageFigures:
    """Of one server. hdm_page_pictures_total, hdm_page_seconds_per_picture, hdm_page_queue_length,
    hdm_page_refused_total{reason}, hdm_page_failed_total."""

    def __init__(self, queue_length: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._pictures = Counter(f"{_PREFIX}pictures", "Pictures drawn", registry=self._registry)
        self._seconds = Histogram(
            f"{_PREFIX}seconds_per_picture",
            "From a picture's turn to its file, in seconds",
            buckets=_SECONDS,
            registry=self._registry,
        )
        length = Gauge(f"{_PREFIX}queue_length", "Pictures that wait for their turn", registry=self._registry)
        length.set_function(queue_length)
        self._refused = Counter(f"{_PREFIX}refused", "Requests refused in words", ["reason"], registry=self._registry)
        for reason in REFUSALS:
            self._refused.labels(reason)
        self._failed = Counter(f"{_PREFIX}failed", "Pictures that an error ended", registry=self._registry)

    def drawn(self, seconds: float) -> None:
        self._pictures.inc()
        self._seconds.observe(seconds)

    def refused(self, reason: str) -> None:
        assert reason in REFUSALS, reason
        self._refused.labels(reason).inc()

    def failed(self) -> None:
        self._failed.inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
