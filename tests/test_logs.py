"""The log: a line for each request that says what an operator asks for, and never what was said in it."""

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from scripted import ScriptedEngine, event, ids, in_memory, say
from trimtab.server import logs
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request
from trimtab.server.visit import Visit

SECRET = "my secret"
CHAT = {"messages": [{"role": "user", "content": SECRET}]}


class Lines:
    """What a handler with this formatter writes."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.written = io.StringIO()
        self.handler = logging.StreamHandler(self.written)
        self.handler.setFormatter(formatter)

    @property
    def text(self) -> list[str]:
        return self.written.getvalue().splitlines()


@pytest.fixture
def listen() -> Iterator[Any]:
    added: list[logging.Handler] = []

    def start(formatter: logging.Formatter) -> Lines:
        lines = Lines(formatter)
        logs.log.addHandler(lines.handler)
        added.append(lines.handler)
        return lines

    level = logs.log.level
    logs.log.setLevel(logging.INFO)
    yield start
    logs.log.setLevel(level)
    for handler in added:
        logs.log.removeHandler(handler)


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_tells_all_of_a_request_but_what_was_said(listen: Any, stream: bool) -> None:
    lines = listen(logs.JsonFormatter())
    with in_memory(ScriptedEngine(say("an answer")), observers=[logs.RequestLog()]) as ask:
        body = CHAT | {"model": "brief", "stream": stream, "n": 2}
        answer = ask("POST", "/v1/chat/completions", json=body, headers={"X-Request-Id": "r-1"})
        version = ask("GET", "/v1/corrections/brief").json()["version"]
        ask("GET", "/health")
    assert answer.status_code == 200
    line, listed = (json.loads(text) for text in lines.text)
    times = {key: line.pop(key) for key in ("time", "latency", "ttft")}
    assert 0 < times["ttft"] <= times["latency"]
    assert line.pop("answer_id").startswith("chatcmpl-")
    prompt = len(ids(f"<|im_start|>user\n{SECRET}<|im_end|>\n<|im_start|>assistant\n"))
    assert line == {
        "level": "info",
        "logger": "trimtab.requests",
        "message": "POST /v1/chat/completions 200",
        "request_id": "r-1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "client": "127.0.0.1",
        "model": "brief",
        "correction": "brief",
        "version": version,
        "mode": "apply",
        "stream": stream,
        "prompt_tokens": prompt,
        "completion_tokens": 20,
        "cached_tokens": 3,
        "finish": ["stop", "stop"],
        "fired": 20,
        "flips": 20,
    }
    assert listed["message"] == "GET /v1/corrections/brief 200", "probes make no lines"
    assert "secret" not in "".join(lines.text)
    assert "an answer" not in "".join(lines.text)


def test_prompts_are_logged_where_that_was_asked_for(listen: Any) -> None:
    lines = listen(logs.JsonFormatter())
    with in_memory(ScriptedEngine(say("x")), observers=[logs.RequestLog(prompts=True)]) as ask:
        ask("POST", "/v1/chat/completions", json=CHAT)
        ask("POST", "/v1/completions", json={"prompt": [SECRET, "two"]})
    assert [json.loads(text)["prompt"] for text in lines.text] == [CHAT["messages"], [SECRET, "two"]]


def test_a_request_that_fails_has_a_line_too(listen: Any) -> None:
    lines = listen(logs.JsonFormatter())

    def fail(request: Request, index: int) -> list[Event]:
        return [event(request, index, None, finish="error", error="NaN")]

    with in_memory(ScriptedEngine(fail), observers=[logs.RequestLog()], api_keys=["k"]) as ask:
        headers = {"Authorization": "Bearer k"}
        ask("POST", "/v1/completions", json={"prompt": "a"}, headers=headers)
        ask("POST", "/v1/completions", json={"prompt": "a", "stream": True}, headers=headers)
        ask("POST", "/v1/completions", json={"prompt": "a"})
        ask("POST", "/v1/completions", json={"prompt": SECRET, "n": SECRET}, headers=headers)
    whole, streamed, keyless, wrong = (json.loads(text) for text in lines.text)
    assert [line["status"] for line in (whole, streamed, keyless, wrong)] == [500, 200, 401, 400]
    assert [line["finish"] for line in (whole, streamed)] == [["error"], ["error"]]
    assert [line["error"] for line in (whole, streamed)] == ["engine_failure", "engine_failure"]
    assert [line["error"] for line in (keyless, wrong)] == ["invalid_api_key", "invalid_request_error"]
    assert {line.get("key") for line in (whole, wrong)} == {hashlib.sha256(b"k").hexdigest()[:8]}
    assert "key" not in keyless
    assert {line["client"] for line in (whole, keyless)} == {"127.0.0.1"}
    assert "model" not in keyless
    assert "secret" not in "".join(lines.text)


def test_the_text_format_is_one_line_whatever_a_caller_sends(listen: Any) -> None:
    lines = listen(logs.TextFormatter())
    logs.RequestLog()(Visit("r", "GET", "/v1/a", status=404, facts={"model": "a\nb c", "finish": ["stop", "length"]}))
    (line,) = lines.text
    assert line.endswith("INFO GET /v1/a 404 request_id=r latency=0.0 model=a\\nb c finish=stop,length")


@pytest.mark.parametrize("sign", ["\n", "\r", "\x1b[2J", "\x7f", "\x85", "\x9b1m", "\u2028", "\u202e"])
def test_a_path_or_a_prompt_can_forge_no_line(listen: Any, sign: str) -> None:
    lines = listen(logs.TextFormatter())
    forged = f"/v1/x{sign}12:00:00 INFO DELETE /v1/corrections/mine 200"
    with in_memory(ScriptedEngine(say("x")), observers=[logs.RequestLog(prompts=True)]) as ask:
        assert ask("GET", quote(forged)).status_code == 404
        assert ask("POST", "/v1/completions", json={"prompt": forged}).status_code == 200
        assert ask("POST", "/v1/completions", json={"prompt": [forged, "b"]}).status_code == 200
    written = lines.written.getvalue()
    assert len(written.split("\n")) == 4
    assert all(line.isprintable() for line in written.split("\n"))
    assert f"GET /v1/x{sign.encode('unicode_escape').decode()}12:00:00 INFO DELETE" in written


def test_json_lines_hold_letters_as_they_are_and_escapes_for_what_has_no_shape() -> None:
    record = logging.makeLogRecord({"msg": "schön 😀 \u202e\x9b\u2028\x7f\n"})
    line = logs.JsonFormatter().format(record)
    assert "schön 😀" in line
    assert line.isprintable()
    assert json.loads(line)["message"] == record.msg


def test_json_lines_hold_exceptions_and_what_json_cannot_say() -> None:
    formatter = logs.JsonFormatter()
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "it %s", ("failed",), (ValueError, error, None))
    line = formatter.format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == ("error", "x", "it failed")
    assert "two\nlines" in told["exception"]


def test_an_observer_that_breaks_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(visit: Visit) -> None:
        raise ZeroDivisionError

    with in_memory(ScriptedEngine(say("x")), observers=[broken]) as ask:
        assert ask("POST", "/v1/completions", json={"prompt": "a"}).status_code == 200
    assert "could not be noted" in caplog.text
