"""Traces: a span a request, under the caller's; nothing is imported unless they are asked for."""

import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from scripted import ScriptedEngine, event, in_memory, say
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request
from trimtab.server.traces import Tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def sent() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def spans(sent: InMemorySpanExporter, engine: ScriptedEngine, *bodies: dict[str, object]) -> list[ReadableSpan]:
    tracer = Tracer(SimpleSpanProcessor(sent))
    with in_memory(engine, observers=[tracer]) as ask:
        for body in bodies:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "r-1"}
            ask("POST", "/v1/completions", json={"prompt": "my secret", **body}, headers=headers)
        ask("GET", "/health")
        ask("GET", "/v1/models")
    tracer.close()
    return list(sent.get_finished_spans())


def test_a_span_tells_the_request_under_its_callers(sent: InMemorySpanExporter) -> None:
    span, other = spans(sent, ScriptedEngine(say("abc")), {"model": "brief", "max_tokens": 9, "temperature": 0.5})
    assert (span.name, span.kind, span.status.status_code) == (
        "text_completion brief",
        SpanKind.SERVER,
        StatusCode.UNSET,
    )
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time > span.start_time
    told = dict(span.attributes or {})
    assert 0 < float(str(told.pop("gen_ai.server.time_to_first_token"))) < 60
    assert str(told.pop("gen_ai.response.id")).startswith("cmpl-")
    assert len(str(told.pop("trimtab.steering.version"))) == 12
    assert told == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "http.route": "/v1/completions",
        "trimtab.request.id": "r-1",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "trimtab",
        "gen_ai.request.model": "brief",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "trimtab.steering.correction": "brief",
        "trimtab.steering.mode": "apply",
        "trimtab.steering.fired": 4,
        "trimtab.steering.flips": 4,
    }
    assert (other.name, other.parent) == ("GET /v1/models", None)


@pytest.mark.parametrize(("given", "name"), [({}, "trimtab"), ({"OTEL_SERVICE_NAME": "ours"}, "ours")])
def test_a_service_has_the_operators_name_and_spans_their_routes_templates(
    sent: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], name: str
) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    tracer = Tracer(SimpleSpanProcessor(sent))
    with in_memory(ScriptedEngine(say("a")), observers=[tracer]) as ask:
        for path in ("/v1/models/nobodys", "/v1/nobodys/path"):
            assert ask("GET", path).status_code == 404
    tracer.close()
    named, lost = sent.get_finished_spans()
    assert (named.name, lost.name) == ("GET /v1/models/{name:path}", "GET")
    assert named.resource.attributes["service.name"] == name


def test_what_failed_is_marked_streaming_or_not(sent: InMemorySpanExporter) -> None:
    def fail(request: Request, index: int) -> list[Event]:
        return [event(request, index, None, finish="error", error="NaN")]

    *failed, other = spans(sent, ScriptedEngine(fail), {}, {"stream": True})
    assert [span.status.status_code for span in failed] == [StatusCode.ERROR] * 2
    assert other.status.status_code is StatusCode.UNSET
    assert failed[0].attributes["error.type"] == "engine_failure"


def test_nothing_of_it_is_imported_unless_asked() -> None:
    """The bare API may be there: libraries of ours import it where it is installed."""
    code = "import sys, trimtab.server.app, trimtab.server.traces as t; print('opentelemetry.sdk' in sys.modules, t)"
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env={"PYTHONPATH": ".dev"})
    assert told.stdout.startswith("False ")
