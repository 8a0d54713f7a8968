"""OpenTelemetry traces: one span a request, sent to a collector. Needs `pip install '.[otel]'`.

Invariant: nothing of OpenTelemetry is imported unless this is asked for. A span has the caller's as its parent where
its traceparent header names one; its attributes are the semantic conventions' for generative AI, and ours; no text.

    tracer = Tracer(to_collector("http://localhost:4318/v1/traces"));  observers = [tracer];  tracer.close()
"""

from typing import TYPE_CHECKING, Any

from trimtab.server.http_errors import CLIENT_LEFT
from trimtab.server.visit import Visit

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_OPERATIONS = {"chat.completion": "chat", "response": "chat", "text_completion": "text_completion"}
_GEN_AI = {
    "model": "gen_ai.request.model",
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "answer_id": "gen_ai.response.id",
    "finish": "gen_ai.response.finish_reasons",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "ttft": "gen_ai.server.time_to_first_token",
}
_OURS = ("correction", "version", "mode", "fired", "flips")
_FLUSH = 2000  # milliseconds at the end for a collector that may not be there


def to_collector(endpoint: str) -> "SpanProcessor":
    """What sends spans by OTLP over HTTP, some at a time. Raises ModuleNotFoundError where the extra is missing."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_FLUSH / 1000))


class Tracer:
    """An observer of visits."""

    def __init__(self, processor: "SpanProcessor") -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = {"service.name": "trimtab", **OTELResourceDetector().detect().attributes}  # as OTEL_SERVICE_NAME says
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("trimtab")
        self._parents = TraceContextTextMapPropagator()
        self._kind, self._failed = SpanKind.SERVER, Status(StatusCode.ERROR)

    def __call__(self, visit: Visit) -> None:
        if not visit.path.startswith("/v1/"):
            return
        start = int(visit.began * 1e9)
        operation = _OPERATIONS.get(str(visit.facts.get("kind")))
        name = f"{operation} {visit.facts['model']}" if operation else f"{visit.method} {visit.route}".rstrip()
        parent = self._parents.extract(dict(visit.headers))
        span = self._tracer.start_span(name, parent, self._kind, attributes=attributes(visit), start_time=start)
        error = visit.facts.get("error")
        if error is not None:
            span.set_attribute("error.type", str(error))
        broken = visit.status < 400 and error not in (None, CLIENT_LEFT)  # a stream, after its status
        if not 0 < visit.status < 500 or broken or "error" in visit.facts.get("finish", ()):
            span.set_status(self._failed)
        span.end(start + int(visit.seconds * 1e9))

    def close(self) -> None:
        """Send what is left. Blocks."""
        self._provider.force_flush(_FLUSH)
        self._provider.shutdown()


def attributes(visit: Visit) -> dict[str, Any]:
    """What a span says of a request."""
    facts = {key: value for key, value in visit.facts.items() if value is not None}
    found: dict[str, Any] = {
        "http.request.method": visit.method,
        "url.path": visit.path,
        **({"http.route": visit.route} if visit.route else {}),
        "trimtab.request.id": visit.id,
        **({"http.response.status_code": visit.status} if visit.status else {}),
        **{name: facts[key] for key, name in _GEN_AI.items() if key in facts},
        **{f"trimtab.steering.{key}": facts[key] for key in _OURS if key in facts},
    }
    if operation := _OPERATIONS.get(str(facts.get("kind"))):
        found |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "trimtab"}
    return found
