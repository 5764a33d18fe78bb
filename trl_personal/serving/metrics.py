"""Numbers for Prometheus: no user, no key, no text in them."""

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .interface import Engine, Job


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
PREFIX = "trl_personal"


class Metrics:
    """
    The metrics of one server, in a registry of its own.

    Args:
        engine ([`Engine`]): Its gauges are read when the metrics are.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by route and status", "route", "status")
        self.answers = self._counter("answers", "Answers begun, by whose soft prompt was used", "answered_for")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.answer_tokens = self._counter("answer_tokens", "Tokens written")
        self.wait = self._histogram("wait_seconds", "Until the engine began with a request")
        self.first_token = self._histogram("first_token_seconds", "Until a first token")
        self.seconds = self._histogram("request_seconds", "Length of requests", "route")
        self._gauge("users", "Known users", lambda: self._engine.num_users)
        for name in engine.gauges():
            self._gauge(f"engine_{name}", f"Of the engine: {name}", partial(self._of_engine, name))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace=PREFIX, registry=self.registry, buckets=SECONDS)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, namespace=PREFIX, registry=self.registry).set_function(value)

    def _of_engine(self, name: str) -> float:
        return self._engine.gauges()[name]

    def begun(self, job: Job, seconds: float) -> None:
        """An answer has its first piece, after some seconds."""
        self.first_token.observe(seconds)
        self.answers.labels(job.answered_for).inc()
        self.prompt_tokens.inc(len(job.prompt_ids))
        if job.started is not None:
            self.wait.observe(max(0.0, job.started - job.created))

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
