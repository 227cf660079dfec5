"""What the server counts, for Prometheus. Names end as vLLM's do, so that dashboards translate."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sphinx_jax.server.bridge import Bridge
from sphinx_jax.server.ticket import Ticket

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TOKENS = tuple(float(1 << n) for n in range(16))


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self, bridge: Bridge):
        self._registry = CollectorRegistry()
        self.rejected = self._make(Counter, "requests_rejected", "Requests that were not accepted.", ["reason"])
        self._succeeded = self._make(Counter, "request_success", "Requests that ended.", ["finished_reason"])
        self._prompt = self._make(Counter, "prompt_tokens", "Tokens of prompts, image tokens included.")
        self._cached = self._make(Counter, "prompt_tokens_cached", "Tokens of prompts that were in the KV cache.")
        self._generated = self._make(Counter, "generation_tokens", "Tokens sampled.")
        self._ttft = self._seconds("time_to_first_token_seconds", "From submission to the first token.")
        self._tpot = self._seconds("time_per_output_token_seconds", "Between tokens.", _TOKEN_SECONDS)
        self._latency = self._seconds("e2e_request_latency_seconds", "From submission to the end.")
        self._prompt_size = self._tokens("request_prompt_tokens", "Tokens of a prompt.")
        self._answer_size = self._tokens("request_generation_tokens", "Tokens of an answer.")
        self._follow(bridge)

    def text(self) -> bytes:
        """All values, as Prometheus reads them."""
        return generate_latest(self._registry)

    def count(self, ticket: Ticket) -> None:
        """A ticket that has ended."""
        reason = "abort" if ticket.finish == "cancelled" else str(ticket.finish)
        self._succeeded.labels(reason).inc()
        self._prompt.inc(ticket.prompt_len)
        self._cached.inc(ticket.cached_tokens)
        self._generated.inc(ticket.num_tokens)
        self._prompt_size.observe(ticket.prompt_len)
        self._answer_size.observe(ticket.num_tokens)
        if ticket.started_at is None or ticket.ended_at is None:
            return
        self._ttft.observe(ticket.started_at - ticket.submitted_at)
        self._latency.observe(ticket.ended_at - ticket.submitted_at)
        if ticket.num_tokens > 1:
            self._tpot.observe((ticket.ended_at - ticket.started_at) / (ticket.num_tokens - 1))

    def _follow(self, bridge: Bridge) -> None:
        """Gauges that are read when they are asked for."""

        def gauge(name: str, text: str, read: Callable[[], float]) -> None:
            self._make(Gauge, name, text).set_function(lambda: read() if bridge.served else 0)

        def scheduler():
            assert bridge.served is not None
            return bridge.served.lockstep.scheduler

        def engine():
            assert bridge.served is not None
            return bridge.served.model.engine

        gauge("num_requests_running", "Sequences in batch slots.", lambda: scheduler().num_running)
        gauge("num_requests_waiting", "Sequences that wait for a slot.", lambda: scheduler().num_waiting)
        gauge("num_requests_open", "Requests that are accepted and have not ended.", lambda: bridge.num_open)
        gauge("max_num_seqs", "Batch slots.", lambda: scheduler().shape.num_seqs)
        gauge("prefill_tokens_computed", "Positions computed by prefill so far.", lambda: scheduler().tokens_prefilled)
        gauge("image_cache_bytes", "Image embeddings kept on the device.", lambda: engine().image_cache_bytes)
        gauge("compilations", "Programs compiled so far.", lambda: engine().compilations)
        gauge("compile_seconds", "Time spent compiling.", lambda: engine().compile_seconds)

    def _make(self, kind: type, name: str, text: str, labels: list[str] | None = None):
        return kind(f"sphinx_jax_{name}", text, labels or [], registry=self._registry)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"sphinx_jax_{name}", text, buckets=buckets, registry=self._registry)

    def _tokens(self, name: str, text: str) -> Histogram:
        return Histogram(f"sphinx_jax_{name}", text, buckets=_TOKENS, registry=self._registry)
