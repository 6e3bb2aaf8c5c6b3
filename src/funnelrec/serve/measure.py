"""Measure: the figures at /metrics, in the text format of Prometheus. No label holds what a client chose."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

__all__ = ["Measure"]

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Measure:
    """Counts and times of one server; several in one process do not mix."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        ProcessCollector(registry=own)
        GCCollector(registry=own)
        self.requests = Counter(
            "funnelrec_http_requests", "Answers by route, verb and status.", ("route", "method", "status"), registry=own
        )
        self.seconds = Histogram(
            "funnelrec_http_request_duration_seconds",
            "From the first byte of the question to that of the answer, whatever the status.",
            ("route",),
            buckets=SECONDS,
            registry=own,
        )
        self.stages = Histogram(
            "funnelrec_stage_duration_seconds", "Queue, match, rank, rerank.", ("stage",), buckets=SECONDS, registry=own
        )
        self.inside = Gauge("funnelrec_inflight", "Questions taken and not yet answered.", registry=own)
        self.shed = Counter("funnelrec_shed", "Requests refused for want of room.", registry=own)
        self.fallbacks = Counter(
            "funnelrec_fallback", "Popular items in place of an answer.", ("reason",), registry=own
        )
        self.degraded = Counter("funnelrec_degraded", "Answers in the order of retrieval.", registry=own)
        self.events = Counter("funnelrec_events", "Events taken.", registry=own)
        self.reloads = Counter("funnelrec_reload", "Reloads by result.", ("result",), registry=own)
        self.invalid = Counter("funnelrec_invalid_http", "What was no HTTP, or too slow or too large.", registry=own)
        self.model = Gauge("funnelrec_model_info", "1 for the version that serves.", ("model", "version"), registry=own)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """An answer has begun."""
        self.requests.labels(route, method, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def serves(self, model: str, version: str) -> None:
        """This version answers from now on."""
        self.model.clear()
        self.model.labels(model, version).set(1)

    def text(self) -> bytes:
        """The whole page."""
        return generate_latest(self.registry)
