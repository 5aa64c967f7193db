"""Prometheus metrics of the page."""

from collections.abc import Callable
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MEDIA_TYPE: Final = CONTENT_TYPE_LATEST  # of `PageMetrics.text`
_PREFIX: Final = "hdm_page_"
_SECONDS: Final = (0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
REFUSALS: Final = ("input", "queue_full")  # why a picture was not drawn


class PageMetrics:
    """hdm_page_pictures_total, hdm_page_seconds_per_picture, hdm_page_queue_length, hdm_page_refused_total{reason} and
    hdm_page_failed_total of one server."""

    def __init__(self, queue_length: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._pictures = Counter(f"{_PREFIX}pictures", "Pictures drawn", registry=self._registry)
        self._seconds = Histogram(
            f"{_PREFIX}seconds_per_picture",
            "Seconds from a picture's turn to its file",
            buckets=_SECONDS,
            registry=self._registry,
        )
        length = Gauge(f"{_PREFIX}queue_length", "Pictures waiting to be drawn", registry=self._registry)
        length.set_function(queue_length)
        self._refused = Counter(f"{_PREFIX}refused", "Requests refused", ["reason"], registry=self._registry)
        for reason in REFUSALS:
            self._refused.labels(reason)  # present from the start, so that the first refusal shows in a rate
        self._failed = Counter(f"{_PREFIX}failed", "Pictures that failed with an error", registry=self._registry)

    def drawn(self, seconds: float) -> None:
        self._pictures.inc()
        self._seconds.observe(seconds)

    def refused(self, reason: str) -> None:
        assert reason in REFUSALS, reason
        self._refused.labels(reason).inc()

    def failed(self) -> None:
        self._failed.inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
