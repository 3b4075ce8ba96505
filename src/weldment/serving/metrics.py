"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "weldment_requests", "Answered requests by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "weldment_request_seconds",
            "From the request's first byte to the answer's last.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "weldment_first_token_seconds",
            "From the arrival of a row to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("weldment_requests_in_flight", "Requests without a full answer.", registry=registry)
        self.queued = Gauge("weldment_queue_rows", "Rows that wait for the model.", registry=registry)
        self.writing = Gauge("weldment_writing_rows", "Rows whose text is being written.", registry=registry)
        self.batches = Histogram(
            "weldment_batch_rows",
            "Rows of a forward pass; kind is classify, prompt or token.",
            ["kind"],
            buckets=_ROWS,
            registry=registry,
        )
        self.tokens = Counter(
            "weldment_tokens", "Tokens; kind is prompt (read) or generated (written).", ["kind"], registry=registry
        )
        self.experts = Counter(
            "weldment_rows", "Rows by the expert with the largest weight, or shared.", ["expert"], registry=registry
        )
        self.cancelled = Counter(
            "weldment_cancelled_rows", "Rows that were dropped because nobody waited any more.", registry=registry
        )

    def read(self, kind: str, lengths: Sequence[int]) -> None:
        """Count a batch of inputs of so many tokens."""
        self.batches.labels(kind).observe(len(lengths))
        self.tokens.labels("prompt").inc(sum(lengths))

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """In the format that Prometheus reads."""
        return generate_latest(self.registry)
