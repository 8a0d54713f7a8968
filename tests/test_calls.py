"""What each method of both clients sends, and what it makes of the answer: over a mock transport."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from mocked import CHAT, RECEIPT, TOTALS, Both, Server, piece, sse
from trimtab.clients import BadAnswer, Client, Steering, StreamFailed
from trimtab.errors import InvalidRequest

ADMIN = {"api_key": "user", "admin_key": "root"}


def ok(body: Any) -> Server:
    return Server(httpx.Response(200, json=body))


# models and corrections

CORRECTION = {
    "id": "brief", "object": "correction", "parent": "demo", "tier": "head", "version": "0a1b2c", "rank": 4,
    "strength": 1.5, "gate": {"kind": "entropy", "tau": 0.5, "ceiling": None, "calibration": [[0.1, 2.0]]},
    "slots": 1, "provenance": {"made": "by hand"}, "report": None,
}  # fmt: skip


def test_one_model(both: Both) -> None:
    server = ok({"id": "org/demo", "max_model_len": 200})
    model = both.call(server, "model", "org/demo")
    assert (model.id, model.parent, model.max_model_len) == ("org/demo", None, 200)
    assert server.requests[0].url.raw_path == b"/v1/models/org%2Fdemo"


@pytest.mark.parametrize("name", ["", ".", "..", None])
def test_a_name_that_no_path_can_hold_is_refused(both: Both, name: Any) -> None:
    for method in ("model", "correction", "delete_correction"):
        with pytest.raises(InvalidRequest, match="not the name"):
            both.call(Server(), method, name)


def test_corrections_are_listed_and_read(both: Both) -> None:
    server = Server(httpx.Response(200, json={"data": [CORRECTION]}), httpx.Response(200, json=CORRECTION))
    (listed,) = both.call(server, "corrections", settings=ADMIN)
    one = both.call(server, "correction", "a/../b", settings=ADMIN)
    assert listed == one
    assert (one.version, one.strength, one.gate.tau, one.gate.calibration) == ("0a1b2c", 1.5, 0.5, [(0.1, 2.0)])
    assert one.rank == 4  # a field this version does not know
    assert [request.url.raw_path for request in server.requests] == [b"/v1/corrections", b"/v1/corrections/a%2F..%2Fb"]
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer user"}


@pytest.mark.parametrize(
    ("settings", "key"), [(ADMIN, "Bearer root"), ({"api_key": "only"}, "Bearer only"), ({}, None)]
)
def test_changing_corrections_takes_the_admin_key(both: Both, settings: dict[str, str], key: str | None) -> None:
    server = ok(CORRECTION)
    assert both.call(server, "add_correction", "brief", "/models/brief", settings=settings).id == "brief"
    assert (server.requests[0].method, server.requests[0].url.path) == ("POST", "/v1/corrections")
    assert server.body == {"name": "brief", "path": "/models/brief"}
    assert server.requests[0].headers.get("authorization") == key
    gone = ok({"id": "brief", "object": "correction", "deleted": True})
    assert both.call(gone, "delete_correction", "brief", settings=settings) is True
    assert (gone.requests[0].method, gone.requests[0].url.path) == ("DELETE", "/v1/corrections/brief")
    assert gone.requests[0].headers.get("authorization") == key


@pytest.mark.parametrize(
    "names",
    [
        ("correction.json", "correction.safetensors"),
        ("correction.json", "adapter_config.json", "adapter_model.safetensors"),
        ("adapter_config.json", "adapter_model.safetensors"),
        ("correction.json",),
    ],
)
def test_a_folder_is_uploaded_whole_at_every_attempt(
    both: Both, naps: list[float], tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "report.md").write_text("not sent")
    for name in names[:-1]:
        (folder / name).write_bytes(b"{}")
    (folder / names[-1]).write_bytes(bytes(range(256)))
    server = Server(503, httpx.Response(201, json=CORRECTION))
    assert both.call(server, "upload_correction", folder, settings=ADMIN).version == "0a1b2c"
    assert len(naps) == 1
    for request in server.requests:
        assert request.headers["content-type"].startswith("multipart/form-data")
        form = request.content
        assert b'name="name"\r\n\r\nmine\r\n' in form
        for name in map(str.encode, names):
            assert b'name="%s"; filename="%s"' % (name, name) in form
        assert bytes(range(256)) in form
        assert b"not sent" not in form
    again = Server(httpx.Response(200, json=CORRECTION))
    both.call(again, "upload_correction", str(folder), "other")
    assert b"\r\n\r\nother\r\n" in again.requests[0].content


def test_a_folder_without_a_correction_says_what_it_lacks(both: Both, tmp_path: Path) -> None:
    (tmp_path / "correction.safetensors").write_text("{}")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InvalidRequest, match=r"correction\.safetensors") as caught:
            both.call(Server(), "upload_correction", folder)
        assert caught.value.field == "folder"


def test_an_empty_name_is_not_taken_for_none(both: Both, tmp_path: Path) -> None:
    for name in ("correction.json", "correction.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(InvalidRequest, match="name is empty") as caught:
        both.call(Server(), "upload_correction", tmp_path, "")
    assert caught.value.field == "name"


# scores and tokens


def test_a_completion_is_scored(both: Both) -> None:
    answer = {
        "id": "score-1", "object": "steering.score", "model": "demo", "prompt_tokens": 3, "completion_tokens": 2,
        "steering": TOTALS, "tokens": [{**RECEIPT, "logprob": -0.25}, {**RECEIPT, "logprob": -0.5}],
    }  # fmt: skip
    server = ok(answer)
    score = both.call(server, "score", "The", " sky", model="demo", steering=Steering("brief", mode="shadow"))
    assert server.requests[0].url.path == "/v1/steering/score"
    assert server.body == {
        "model": "demo", "prompt": "The", "completion": " sky", "steering": {"correction": "brief", "mode": "shadow"},
    }  # fmt: skip
    assert (score.logprob, score.completion_tokens, score.steering.version) == (-0.75, 2, "0a1b2c")
    assert score.tokens[0].base_logprob == RECEIPT["base_logprob"]
    chat = ok(answer)
    both.call(chat, "score_chat", "Why?", [7, 8])
    assert chat.body == {"messages": [{"role": "user", "content": "Why?"}], "completion": [7, 8]}


@pytest.mark.parametrize(("base", "root"), [("http://h:1", "http://h:1"), ("http://h:1/api/v1/", "http://h:1/api")])
def test_tokens_are_asked_for_beside_v1(both: Both, base: str, root: str) -> None:
    server = ok({"tokens": [1, 2], "count": 2, "max_model_len": 200})
    settings = {"base_url": base}
    tokens = both.call(server, "tokenize", "hi", model="demo", add_special_tokens=False, settings=settings)
    assert (tokens.tokens, tokens.count) == ([1, 2], 2)
    assert str(server.requests[0].url) == f"{root}/tokenize"
    assert server.body == {"prompt": "hi", "model": "demo", "add_special_tokens": False}
    chat = ok({"tokens": [1, 2], "count": 2})
    both.call(chat, "tokenize", [{"role": "user", "content": "hi"}])
    assert chat.body == {"messages": [{"role": "user", "content": "hi"}]}
    back = ok({"prompt": "hi"})
    assert both.call(back, "detokenize", (1, 2), settings=settings) == "hi"
    assert str(back.requests[0].url) == f"{root}/detokenize"
    assert back.body == {"tokens": [1, 2]}


# structure and tools


class City(BaseModel):
    name: str
    size: int = 0


class Trip(BaseModel):
    stops: list[City]


CLOSED = {"additionalProperties": False, "type": "object"}


def test_a_class_stands_for_its_schema(both: Both) -> None:
    choice = {"message": {"content": '{"stops": [{"name": "Ulm", "size": 1}]}'}}
    server = ok({"choices": [choice]})
    answer = both.call(server, "chat", "Where?", response_format=Trip)
    sent = server.body["response_format"]
    assert (sent["type"], sent["json_schema"]["name"], sent["json_schema"]["strict"]) == ("json_schema", "Trip", True)
    schema = sent["json_schema"]["schema"]
    assert schema.items() >= {**CLOSED, "required": ["stops"]}.items()
    assert schema["$defs"]["City"].items() >= {**CLOSED, "required": ["name", "size"]}.items()
    assert answer.parse(Trip) == Trip(stops=[City(name="Ulm", size=1)])
    assert answer.parse(dict)["stops"][0]["size"] == 1
    with pytest.raises(BadAnswer, match="no City"):
        answer.parse(City)
    plain = ok(CHAT)
    both.call(plain, "chat", "Where?", response_format={"type": "json_object"})
    assert plain.body["response_format"] == {"type": "json_object"}


def test_what_nothing_can_be_parsed_as_is_named(both: Both) -> None:
    answer = both.call(ok(CHAT), "chat", "Where?")
    with pytest.raises(BadAnswer, match=r"no int \| None"):
        answer.parse(int | None)
    for kind in (type("Thing", (), {}), 5):
        with pytest.raises(
            InvalidRequest, match=r"no JSON can be read as .*(Thing|5): give a pydantic class"
        ) as caught:
            answer.parse(kind)
        assert caught.value.field == "kind"


@pytest.mark.parametrize("kind", [int, type("Thing", (), {})])
def test_a_class_without_a_schema_is_named(both: Both, kind: type) -> None:
    with pytest.raises(InvalidRequest, match=kind.__name__) as caught:
        both.call(Server(), "chat", "Where?", response_format=kind)
    assert caught.value.field == "response_format"


def call(index: int, **fields: Any) -> dict[str, Any]:
    return {"index": index, **fields}


def test_tool_calls_are_read_and_their_pieces_put_together(both: Both) -> None:
    function = {"name": "visit", "arguments": '{"name": "Ulm"}'}
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": function}]}
    server = ok({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    answer = both.call(server, "chat", "Where?", tools=[{"type": "function"}], tool_choice="required")
    assert server.body["tools"] == [{"type": "function"}]
    assert server.body["tool_choice"] == "required"
    assert answer.text == ""
    assert answer.tool_calls[0].parse(City) == City(name="Ulm")
    deltas = [
        call(0, id="c1", type="function", function={"name": "visit", "arguments": ""}),
        call(0, function={"arguments": '{"name": '}),
        call(1, id="c2", type="function", function={"name": "leave", "arguments": "{}"}),
        call(0, function={"arguments": '"Ulm"}'}),
    ]
    events = [{"choices": [{"index": 0, "delta": {"tool_calls": [delta]}}]} for delta in deltas]
    other = {"choices": [{"index": 1, "delta": {"tool_calls": [deltas[0]]}}]}
    _, stream = both.stream(Server(httpx.Response(200, content=sse(*events, other, b"[DONE]"))), "Where?")
    first, second = stream.tool_calls
    assert (first.id, first.type, first.function.name, first.parse(dict)) == (
        "c1", "function", "visit", {"name": "Ulm"},
    )  # fmt: skip
    assert (second.index, second.id, second.function.arguments) == (1, "c2", "{}")


def test_an_answer_goes_on_in_the_next_question(both: Both) -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "visit", "arguments": '{"name": "Ulm"}'}}
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [called]}
    server = Server(*(httpx.Response(200, json={"choices": [{"message": message}]}) for _ in range(3)))
    answer = both.call(server, "chat", "Where?")
    told = {"role": "tool", "tool_call_id": "c1", "content": "far"}
    both.call(server, "chat", [answer.choices[0].message, told])
    assert server.body["messages"] == [{"role": "assistant", "tool_calls": [called]}, told]
    both.call(server, "chat", ({"role": "assistant", "tool_calls": answer.tool_calls}, told))
    assert server.body["messages"] == [{"role": "assistant", "tool_calls": [called]}, told]


# responses

MESSAGE = {
    "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
    "content": [{"type": "output_text", "text": "The sky", "annotations": []}],
}  # fmt: skip
CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "visit", "arguments": '{"name": "Ulm"}'}
RESPONSE = {
    "id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "demo", "error": None,
    "output": [{"type": "reasoning", "summary": []}, MESSAGE, CALL], "steering": TOTALS,
    "usage": {
        "input_tokens": 5, "output_tokens": 2, "total_tokens": 7, "input_tokens_details": {"cached_tokens": 3},
        "output_tokens_details": {"reasoning_tokens": 0},
    },
}  # fmt: skip


def test_a_response(both: Both) -> None:
    server = ok(RESPONSE)
    answer = both.call(server, "respond", "Why?", steering="brief", instructions="Be brief.", max_output_tokens=9)
    assert server.requests[0].url.path == "/v1/responses"
    assert server.body == {
        "input": "Why?", "steering": {"correction": "brief"}, "instructions": "Be brief.", "max_output_tokens": 9,
    }  # fmt: skip
    assert (answer.text, answer.status, answer.usage.input_tokens_details.cached_tokens) == ("The sky", "completed", 3)
    assert answer.tool_calls[0].parse(City) == City(name="Ulm")
    assert answer.steering.flips == 1
    items = [{"role": "user", "content": "Why?"}, {"type": "function_call_output", "call_id": "c1", "output": "5"}]
    structured = ok(RESPONSE)
    both.call(structured, "respond", items, text=City)
    assert structured.body["input"] == items
    assert structured.body["text"]["format"].items() >= {"type": "json_schema", "name": "City", "strict": True}.items()
    further = ok(RESPONSE)
    both.call(further, "respond", [*items, *answer.output])
    assert further.body["input"] == [*items, *RESPONSE["output"]]  # type: ignore[misc]


def event(kind: str, number: int, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "sequence_number": number, **fields}


def text_event(number: int, text: str, **fields: Any) -> dict[str, Any]:
    return event("response.output_text.delta", number, delta=text, item_id="msg_1", **fields)


def test_a_response_streams_until_its_last_event(both: Both) -> None:
    events = sse(
        event("response.created", 0, response={**RESPONSE, "status": "in_progress", "output": []}),
        text_event(1, "The", steering={"tokens": [RECEIPT]}),
        text_event(2, " sky"),
        event("response.function_call_arguments.delta", 3, delta='{"name"', item_id="fc_1"),
        event("response.output_text.done", 4, text="The sky"),
        event("response.completed", 5, response=RESPONSE),
    )
    server = Server(httpx.Response(200, content=events))
    chunks, stream = both.stream(server, "Why?", method="stream_respond")
    assert server.body == {"stream": True, "input": "Why?"}
    assert [chunk.text for chunk in chunks] == ["", "The", " sky", "", "", ""]
    assert (stream.text, stream.finish_reason, stream.usage.prompt_tokens) == ("The sky", "completed", 5)
    assert stream.response.text == "The sky"
    assert (len(stream.receipts), stream.steering.steps) == (1, 2)
    assert stream.tool_calls[0].parse(dict) == {"name": "Ulm"}


def test_the_end_of_a_response_tells_what_no_delta_did(both: Both) -> None:
    """The receipts of tokens that close a call, say, and how much was cached."""
    usage = {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7, "input_tokens_details": {"cached_tokens": 3}}
    whole = {**RESPONSE, "usage": usage, "steering": {**TOTALS, "tokens": [RECEIPT, {**RECEIPT, "entropy": 0.5}]}}
    events = sse(text_event(1, "The", steering={"tokens": [RECEIPT]}), event("response.completed", 2, response=whole))
    _, stream = both.stream(Server(httpx.Response(200, content=events)), "Why?", method="stream_respond")
    assert [receipt.entropy for receipt in stream.receipts] == [RECEIPT["entropy"], 0.5]
    assert stream.usage.prompt_tokens_details.cached_tokens == 3


@pytest.mark.parametrize(
    ("last", "message", "code"),
    [
        (
            event("response.failed", 2, response={**RESPONSE, "error": {"code": "x", "message": "engine died"}}),
            "died",
            "x",
        ),
        (event("error", 2, code="x", message="engine died", param=None), "died", "x"),
        ({"error": {"message": "engine died"}}, "died", None),
        (event("response.output_text.done", 2), "incomplete", None),
    ],
)
def test_a_response_that_fails_is_raised(both: Both, last: dict[str, Any], message: str, code: str | None) -> None:
    with pytest.raises(StreamFailed, match=message) as caught:
        both.stream(
            Server(httpx.Response(200, content=sse(text_event(1, "The"), last))), "Why?", method="stream_respond"
        )
    assert (caught.value.code, caught.value.type) == (code, None)


# settings


def test_what_is_left_out_comes_from_the_environment(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_BASE_URL", "http://h:1")
    monkeypatch.setenv("TRIMTAB_API_KEY", " key, other")  # as a server may have them
    monkeypatch.setenv("TRIMTAB_ADMIN_KEY", "root,other")
    server = Server(*(httpx.Response(200, json={"data": []}) for _ in range(3)))
    both.call(server, "models")
    both.call(server, "models", settings={"base_url": "http://given:2", "api_key": "given"})
    assert [str(request.url) for request in server.requests] == ["http://h:1/v1/models", "http://given:2/v1/models"]
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer key", "Bearer given"]
    gone = ok({"deleted": True})
    both.call(gone, "delete_correction", "brief")
    assert gone.requests[0].headers["authorization"] == "Bearer root"
    monkeypatch.setenv("TRIMTAB_BASE_URL", " ")
    both.call(server, "models")
    assert str(server.requests[-1].url) == "http://127.0.0.1:8000/v1/models"


@pytest.mark.parametrize(("key", "sent"), [("", None), (" \n", None), (" k1 ", "Bearer k1"), ("k1\n", "Bearer k1")])
def test_a_key_goes_out_without_what_surrounds_it(
    both: Both, key: str, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one is none, though the environment has one: as a header it could not be sent at all."""
    monkeypatch.setenv("TRIMTAB_API_KEY", "other")
    server = Server(httpx.Response(200, json={"data": []}))
    both.call(server, "models", settings={"api_key": key})
    assert server.requests[0].headers.get("authorization") == sent


def test_options_hold_for_a_copy_alone() -> None:
    server = Server(503, 503, *(httpx.Response(200, json=CHAT) for _ in range(2)))
    with Client(timeout=60, max_retries=0, transport=httpx.MockTransport(server)) as client:
        quick = client.with_options(timeout=2, max_retries=1)
        with pytest.raises(Exception, match="no"):
            client.chat("Why?")
        assert quick.chat("Why?").text == "The sky"
        assert client.with_options(max_retries=1).chat("Why?").text == "The sky"
    timeouts = [request.extensions["timeout"] for request in server.requests]
    assert [told["read"] for told in timeouts] == [60, 2, 2, 60]
    assert [told["connect"] for told in timeouts] == [5, 2, 2, 5]


def test_a_stream_may_ask_for_more_usage(both: Both) -> None:
    """What `extra` says goes before what a stream asks for by itself."""
    server = Server(httpx.Response(200, content=sse(piece("The"), b"[DONE]")))
    options = {"include_usage": True, "continuous_usage_stats": True}
    both.stream(server, "Why?", extra={"stream_options": options})
    assert server.body["stream_options"] == options
    assert server.body["stream"] is True
