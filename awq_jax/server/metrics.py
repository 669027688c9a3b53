"""Prometheus metrics of an engine."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from awq_jax.serve.engine.engine import Engine
from awq_jax.serve.engine.request import Request
from awq_jax.serve.engine.watch import Watch

SHORT = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
LONG = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


class Metrics(Watch):
    """Counts what an engine tells; in seconds and tokens."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("awq_jax_requests", "Requests that ended, by how", ["finish_reason"], registry=own)
        self.prompt_tokens = Counter("awq_jax_prompt_tokens", "Tokens of prompts that were read", registry=own)
        self.reused_tokens = Counter("awq_jax_prompt_tokens_reused", "Tokens found in the cache", registry=own)
        self.new_tokens = Counter("awq_jax_generation_tokens", "Tokens that were made", registry=own)
        self.reading = Counter("awq_jax_prefill_seconds", "Spent reading prompts", registry=own)
        self.stepping = Counter("awq_jax_decode_seconds", "Spent on steps of answers", registry=own)
        told = "From a request's arrival to its first token"
        self.first_token = Histogram("awq_jax_time_to_first_token_seconds", told, registry=own, buckets=LONG)
        told = "Between two tokens of an answer"
        self.gaps = Histogram("awq_jax_inter_token_latency_seconds", told, registry=own, buckets=SHORT)
        told = "From a request's arrival to its slot"
        self.queued = Histogram("awq_jax_queue_seconds", told, registry=own, buckets=LONG)
        self.running = Gauge("awq_jax_requests_running", "Requests in slots", registry=own)
        self.waiting = Gauge("awq_jax_requests_waiting", "Requests that wait for a slot", registry=own)
        self.used = Gauge(
            "awq_jax_cache_used_ratio", "Tokens in slots at work, of those there is room for", registry=own
        )
        self.speed = Gauge("awq_jax_generation_tokens_per_second", "Tokens made, over the last steps", registry=own)
        self.compiled = Gauge("awq_jax_programs_compiled", "Programs compiled since the start", registry=own)
        self.late = Gauge("awq_jax_programs_compiled_late", "Of those, after the warm-up", registry=own)

    def attach(self, engine: Engine) -> None:
        """Read what an engine knows itself whenever it is asked for."""
        self.running.set_function(lambda: engine.load[0])
        self.waiting.set_function(lambda: engine.load[1])
        self.used.set_function(lambda: engine.used)
        self.speed.set_function(lambda: engine.speed)
        self.compiled.set_function(lambda: engine.programs.compiled)
        self.late.set_function(lambda: engine.programs.late)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)

    def started(self, request: Request) -> None:
        self.queued.observe(request.times.started - request.times.submitted)
        self.reused_tokens.inc(request.reused)

    def read(self, tokens: int, seconds: float) -> None:
        self.prompt_tokens.inc(tokens)
        self.reading.inc(seconds)

    def stepped(self, seconds: float) -> None:
        self.stepping.inc(seconds)

    def wrote(self, request: Request) -> None:
        self.new_tokens.inc()
        times = request.times
        if request.made == 1:
            self.first_token.observe(times.first - times.submitted)
        else:
            self.gaps.observe(times.gap)

    def finished(self, request: Request) -> None:
        self.requests.labels(request.finish_reason).inc()

    def failed(self, request: Request) -> None:
        self.requests.labels("error").inc()
