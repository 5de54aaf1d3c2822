"""Figures for Prometheus: what the engine counts, read when asked, and what the server sees of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..events import Result
from .logs import Record

if TYPE_CHECKING:
    from ..engine import Status

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
TOKENS = (1, 2, 4, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 100, 256)

# name: (field of Status, what it is)
GAUGES = {
    "dgemma_requests_queued": ("queued", "Requests that wait for a place in the batch."),
    "dgemma_requests_running": ("running", "Requests in the batch."),
    "dgemma_batch_rows": ("batch", "Rows of the last step."),
    "dgemma_cache_pages_used": ("pages_used", "Pages of the cache in use."),
    "dgemma_cache_pages": ("pages", "Pages of the cache."),
}
COUNTERS = {
    "dgemma_steps": ("steps", "Steps of the engine."),
    "dgemma_forwards": ("forwards", "Denoising steps, summed over the rows of the batch."),
    "dgemma_tokens": ("tokens", "Tokens given to users."),
    "dgemma_prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "dgemma_reused_tokens": ("reused_tokens", "Tokens of prompts that were in the cache already."),
    "dgemma_preemptions": ("preemptions", "Requests put back into the queue for want of pages."),
}


class Metrics:
    """A registry of its own, so that several servers can live in one process.

    Args:
        status: gives the engine's figures, or None before there is an engine.
    """

    def __init__(self, status: Callable[[], Status | None]):
        self._status = status
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._requests = Counter(
            "dgemma_http_requests",
            "Requests that were answered.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self._first_text = Histogram(
            "dgemma_time_to_first_text_seconds",
            "From a request's arrival to its first text.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._seconds = Histogram(
            "dgemma_request_seconds",
            "From a request's arrival to its end.",
            ("endpoint",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._tokens = Histogram(
            "dgemma_tokens_per_forward",
            "Tokens of an answer for each of its denoising steps.",
            buckets=TOKENS,
            registry=self._registry,
        )

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client calls at every reading."""
        status = self._status()
        yield GaugeMetricFamily(
            "dgemma_ready", "Whether requests are taken.", float(status is not None and not status.draining)
        )
        if status is None:
            return
        for name, (field, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, getattr(status, field))
        for name, (field, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, getattr(status, field))

    def answered(self, record: Record) -> None:
        """A request is over."""
        self._requests.labels(record.endpoint, str(record.status or 500)).inc()
        if record.prompt_tokens:
            self._seconds.labels(record.endpoint).observe(record.seconds)
        if record.first_text_seconds is not None:
            self._first_text.observe(record.first_text_seconds)

    def finished(self, result: Result) -> None:
        """An answer is whole."""
        if result.stats.tokens_per_forward:
            self._tokens.observe(result.stats.tokens_per_forward)

    def text(self) -> bytes:
        """All of them in Prometheus' text form."""
        return generate_latest(self._registry)
