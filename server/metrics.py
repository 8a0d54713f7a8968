"""Prometheus metrics: vLLM's names under the prefix `trimtab:`, and what steering does, by correction and mode.

Invariant: a registry belongs to one app, so two apps in a process do not share counts. Gauges are read from the engine
when somebody looks; what moves with every token is in live.py, and here what moves with a request. No label's values
come from callers: a correction's name is one that an operator loaded, and of those MAX_CORRECTIONS have series of their
own, for as long as they are served; a path is its route's template. Beside ours stand prometheus_client's own series of
the process.
"""

import time
from collections.abc import Sequence, Set

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from trimtab.server.engine.engine import EngineStats
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Steering
from trimtab.server.live import SECONDS, Counts, Live
from trimtab.server.visit import Visit, current
from trimtab.steering.bank import Entry

_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
MAX_CORRECTIONS = 64
OTHERS = "others"  # the label's value for corrections beyond that; of paths without a route, and methods without one
NO_CORRECTION = "none"  # the label's value for a request that is not steered
METHODS = {"GET", "HEAD", "POST", "DELETE"}  # that have routes
REFUSED = "refused"  # the reason of a choice that the engine did not take
GONE = 499  # the status of a request whose client left before it had one


class Metrics:
    """All metrics of one app. model: the base's name, a label of every series."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self.model = model
        self.live = Live(model, self._registry)
        self._up = self._gauge("engine_up", "1 while the engine lives and moves, else 0")
        self._running = self._gauge("num_requests_running", "Choices that hold a slot")
        self._waiting = self._gauge("num_requests_waiting", "Choices that wait for a slot")
        self._unread = self._gauge("num_prompts_waiting", "Texts that wait for the tokeniser, or that it reads")
        self._cache = self._gauge("kv_cache_usage_perc", "Share of the slots in use, 0 to 1")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests").labels(model)
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens whose KV was looked for").labels(model)
        self.cached_tokens = self._counter("prefix_cache_hits", "Prompt tokens whose KV was reused").labels(model)
        self.finished = self._counter("request_success", "Choices, by how they ended", "finished_reason")
        self.first = self._histogram("time_to_first_token_seconds", "From arrival", SECONDS).labels(model)
        self.whole = self._histogram("e2e_request_latency_seconds", "From arrival to end", SECONDS).labels(model)
        self.queued = self._histogram("request_queue_time_seconds", "From arrival to slots", SECONDS).labels(model)
        prefill, decode = "From slots to the first token", "From the first token to the last"
        self.prefill = self._histogram("request_prefill_time_seconds", prefill, SECONDS).labels(model)
        self.decode = self._histogram("request_decode_time_seconds", decode, SECONDS).labels(model)
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS).labels(model)
        self.lengths = self._histogram("request_generation_tokens", "Tokens of a choice that has some", _TOKENS).labels(
            model
        )
        self._requests = self._counter("http_requests", "Requests, refused ones too", "path", "method", "status")
        self._info = self._gauge(
            "correction_info", "1 for each correction that is served", "correction", "version", "tier"
        )
        self._seen: set[str] = set()  # corrections that have series of their own

    def count(self, visit: Visit) -> None:
        """An observer of visits."""
        method = visit.method if visit.method in METHODS else OTHERS
        self._requests.labels(self.model, visit.route or OTHERS, method, visit.status or GONE).inc()

    def accept(self, prompts: Sequence[int], n: int = 1) -> None:
        """Prompts of so many tokens are in the engine's hands, for n choices each: every choice looks for its KV."""
        self.prompt_tokens.inc(sum(prompts))
        self._queries.inc(sum(prompts) * n)
        for tokens in prompts:
            self._prompts.observe(tokens)

    def watch(self, steering: Steering) -> "Watch":
        """The series of one choice that starts now."""
        return Watch(self, self.live.counts(self._label(steering.correction), steering.mode))

    def render(self, stats: EngineStats, entries: Sequence[Entry] = (), unread: int = 0) -> bytes:
        """The text that Prometheus reads. entries: what is served now; unread: texts in the tokeniser's queue."""
        self._forget(self._seen - {entry.correction.name for entry in entries})
        self._info.clear()
        for entry in entries[:MAX_CORRECTIONS]:
            found = entry.correction
            self._info.labels(self.model, found.name, entry.version, found.tier).set(1)
        self._up.labels(self.model).set(stats.well)
        self._running.labels(self.model).set(stats.running)
        self._waiting.labels(self.model).set(stats.waiting)
        self._unread.labels(self.model).set(unread)
        self._cache.labels(self.model).set(stats.used / stats.slots)
        return generate_latest(self._registry)

    def _label(self, correction: str | None) -> str:
        if correction is None:
            return NO_CORRECTION
        if len(self._seen) < MAX_CORRECTIONS:
            self._seen.add(correction)
        return correction if correction in self._seen else OTHERS

    def _forget(self, gone: Set[str]) -> None:
        """Their places are others' now. What a request that is under way still adds to their series is told nobody."""
        self._seen -= gone
        for correction in gone:
            self.live.forget(correction)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"trimtab:{name}", text, ["model_name", *labels], registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"trimtab:{name}", text, ["model_name", *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"trimtab:{name}", text, ["model_name", *labels], registry=self._registry, buckets=buckets)


class Watch:
    """One choice on its way, timed from when its request arrived."""

    def __init__(self, metrics: Metrics, counts: Counts) -> None:
        self._metrics, self._live, self._counts = metrics, metrics.live, counts
        visit = current()
        self._start = time.perf_counter() if visit is None else visit.start
        self._before = 0.0  # seconds until the engine had it
        self._tokens = 0
        self._last: float | None = None
        self.first: float | None = None  # seconds to the first token
        self.reason: str | None = None  # why it ended

    def submitted(self) -> None:
        """The engine has it."""
        self._before = time.perf_counter() - self._start

    def token(self, event: Event, now: float) -> None:
        """A token was sampled."""
        if self._last is None:
            metrics = self._metrics
            self.first = now - self._start
            metrics.first.observe(self.first)
            queued = self._before + event.queued
            metrics.queued.observe(queued)
            metrics.prefill.observe(max(0.0, self.first - queued))
            metrics.cached_tokens.inc(event.cached)
        else:
            self._live.between.observe(now - self._last)
        self._last = now
        self._live.tokens += 1
        self._tokens += 1
        if event.receipt is not None:
            self._counts.add(event.receipt)

    def scored(self, event: Event) -> None:
        """It is over: its tokens were given, and none was to be sampled."""
        self._metrics.cached_tokens.inc(event.cached)
        self.end("length")

    def end(self, reason: str) -> None:
        """It is over; only the first call counts."""
        if self.reason is None:
            self.reason = reason
            metrics, now = self._metrics, time.perf_counter()
            metrics.finished.labels(metrics.model, reason).inc()
            if reason == REFUSED:
                return
            metrics.whole.observe(now - self._start)
            if self._tokens:
                metrics.lengths.observe(self._tokens)
            if self._last is not None and self.first is not None:
                metrics.decode.observe(self._last - self._start - self.first)
