"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from camelid.serve.worker import Ticket, Worker


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter, gauge = self._counter, self._gauge
        self.requests = counter("requests", "Requests answered", ["route", "status"])
        self._prompt = counter("prompt_tokens", "Tokens of prompts")
        self._new = counter("completion_tokens", "Tokens generated")
        self.open = gauge("requests_open", "Requests being answered")
        self._pending = gauge("texts_pending", "Texts waiting or running")
        self._pages = gauge("cache_pages_taken", "Pages of the KV cache that a text holds")
        self._preempted = gauge("preempted", "Texts sent back to the queue for want of pages, since the start")
        self._guessed = gauge("guessed_tokens", "Tokens that were guessed, by lookup or a draft, since the start")
        self._came_true = gauge("guesses_come_true", "Guessed tokens that the model then chose, since the start")
        self._first = Histogram(
            "camelid_first_token_seconds", "Until a text's first token", registry=self._registry,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )  # fmt: skip

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"camelid_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"camelid_{name}", text, registry=self._registry)

    def texts(self, prompt_tokens: int, tickets: Sequence[Ticket]) -> None:
        """Count a request's texts."""
        self._prompt.inc(prompt_tokens)
        self._new.inc(sum(ticket.progress.tokens for ticket in tickets))
        for ticket in tickets:
            if ticket.first is not None:
                self._first.observe(ticket.first)

    def watch(self, worker: Worker) -> None:
        """Read these of the engine whenever they are asked for."""
        scheduler = worker.engine.scheduler
        watched: list[tuple[Gauge, Callable[[], float]]] = [
            (self._pending, lambda: worker.pending),
            (self._pages, lambda: scheduler.pages.taken),
            (self._preempted, lambda: scheduler.preempted),
            (self._guessed, lambda: scheduler.guessed),
            (self._came_true, lambda: scheduler.came_true),
        ]
        for gauge, value in watched:
            gauge.set_function(value)

    def text(self) -> bytes:
        return generate_latest(self._registry)
