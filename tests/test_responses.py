"""/v1/responses: what its bodies ask for, what its events say, and that openai's client reads them."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types.responses import Response

from scripted import TOKENIZER, ScriptedEngine, event, ids, in_memory, loopback, say, scripted_app
from trimtab.errors import EngineFailure, Overloaded
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request
from trimtab.server.responses.body import ResponseBody
from trimtab.server.responses.events import Writer

PATH = "/v1/responses"
TEXT = "Hello 😀 wörld!"


class Roomy(ScriptedEngine):
    """Tools take a long prompt."""

    max_len = 4000


def respond(script: Any = None, **body: Any) -> httpx.Response:
    engine = Roomy if "tools" in body else ScriptedEngine
    with in_memory(engine(script or say(TEXT))) as ask:
        return ask("POST", PATH, json={"input": "hi"} | body)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream: each is named as its type says, and they are numbered."""
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.split("\n\n")[:-1]:
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    assert [told["sequence_number"] for told in found] == list(range(len(found)))
    return found


def prompt_of(**body: Any) -> str:
    engine = Roomy(say("x"))
    with in_memory(engine) as ask:
        response = ask("POST", PATH, json=body)
    assert response.status_code == 200, response.text
    return str(TOKENIZER.decode(engine.requests[0].prompt, skip_special_tokens=True))


def ids_aside(response: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two answers to one question."""
    output = [{**item, "id": ""} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "completed_at": None, "output": output}


# Whole answers


def test_a_response_is_complete_as_openais_types_have_it() -> None:
    answer = respond(metadata={"a": "b"}, instructions="be brief", store=True, user="u").json()
    read = Response.model_validate(answer)
    assert read.output_text == TEXT
    assert (answer["status"], answer["incomplete_details"], answer["error"]) == ("completed", None, None)
    assert (answer["id"][:5], answer["output"][0]["id"][:4]) == ("resp_", "msg_")
    assert (answer["metadata"], answer["instructions"], answer["store"]) == ({"a": "b"}, "be brief", False)
    assert answer["steering"]["mode"] == "off"
    prompt = len(ids("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))
    sampled = len(TEXT.encode()) + 1
    assert answer["usage"] == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": sampled,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + sampled,
    }


def test_an_answer_that_is_cut_is_incomplete() -> None:
    answer = respond(say("abc", end="length"), max_output_tokens=3).json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (answer["output"][0]["status"], answer["output"][0]["content"][0]["text"]) == ("incomplete", "abc")
    assert (answer["max_output_tokens"], answer["completed_at"]) == (3, None)


def test_an_answer_without_text_is_an_empty_message() -> None:
    answer = respond(say("")).json()
    assert Response.model_validate(answer).output_text == ""
    assert len(answer["output"]) == 1


def test_sampling_reaches_the_engine() -> None:
    engine = ScriptedEngine(say("x"))
    body = {"input": "hi", "max_output_tokens": 9, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "seed": 7}
    with in_memory(engine) as ask:
        answer = ask("POST", PATH, json=body | {"stop": "z"}).json()
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (9, 0.5, 0.25)
    assert (sampling.top_k, sampling.seed) == (3, 7)
    assert (answer["temperature"], answer["top_p"]) == (0.5, 0.25)


# What is read


def test_items_become_messages() -> None:
    items = [
        {"role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "zzz"},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "two", "annotations": []},
                {"type": "refusal", "refusal": "no"},
            ],
        },
        {"role": "user", "content": "three"},
    ]
    assert prompt_of(input=items, instructions="I") == (
        "system\nI\nsystem\nD\nuser\none\nassistant\ntwo\nno\nuser\nthree\nassistant\n"
    )


def test_calls_and_their_outputs_become_messages() -> None:
    items = [
        {"role": "user", "content": "weather?"},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": '{"a":1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
    ]
    user, assistant, first, second = (
        message.model_dump() for message in ResponseBody.model_validate({"input": items}).chat().messages
    )
    assert user["content"] == "weather?"
    assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in assistant["tool_calls"]] == [
        ("c1", "f", "{}"),
        ("c2", "g", '{"a":1}'),
    ]
    assert (first["role"], first["tool_call_id"], first["content"]) == ("tool", "c1", "sun")
    assert (second["role"], second["tool_call_id"], second["content"]) == ("tool", "c2", "rain")


def test_a_json_schema_stands_where_a_chat_has_it() -> None:
    text = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}}
    tool = {"type": "function", "name": "f", "parameters": {}, "strict": True}
    choice = {"type": "function", "name": "f"}
    asked = ResponseBody.model_validate({"input": "x", "text": text, "tools": [tool], "tool_choice": choice}).chat()
    chat = asked.model_dump(by_alias=True)
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert chat["response_format"]["type"] == "json_schema"
    assert {key: chat["response_format"]["json_schema"][key] for key in schema} == schema
    assert chat["tools"][0]["function"]["name"] == "f"
    assert chat["tool_choice"]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": ["x"]}, "input[0]"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"truncation": "disabled", "moderation": {"model": "m"}}, "moderation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]}, "tools[0].parameters.type"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice"),
        ({"temperature": 101}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {}}}, "text.format.type"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"steering": {"correction": "brief", "strength": 1000}}, "steering.strength"),
        ({"input": "x" * 300}, "input"),
        ({"input": "\ud800"}, None),
    ],
)
def test_a_bad_body_is_a_400_that_names_the_field(body: dict[str, Any], param: str | None) -> None:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        content = json.dumps({"input": "hi"} | body).encode()
        response = ask("POST", PATH, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert param is None or response.json()["error"]["param"] == param


def test_what_fills_the_context_is_told_by_the_field_that_was_written() -> None:
    message = respond(input="x" * 300).json()["error"]["message"]
    assert " in the input, " in message
    assert "reduce the length of the input or completion" in message


def test_the_tools_that_are_allowed_are_told_in_openais_words() -> None:
    tools = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in "fgh"]
    allowed = [{"type": "function", "name": name} for name in "fh"]
    choice = {"type": "allowed_tools", "mode": "required", "tools": allowed}
    asked = ResponseBody.model_validate({"input": "x", "tools": tools, "tool_choice": choice})
    chosen, must = asked.chat().callable_tools()
    assert ([tool.function.name for tool in chosen], must) == (["f", "h"], True)


def test_what_needs_a_stored_response_says_why() -> None:
    assert "stateless" in respond(previous_response_id="resp_1").json()["error"]["message"]


def test_steering_goes_in_and_out() -> None:
    engine = ScriptedEngine(say("ab"))
    with in_memory(engine) as ask:
        body = {"input": "x", "model": "brief", "steering": {"strength": 2, "report": "tokens"}}
        answer = ask("POST", PATH, json=body).json()
        silent = ask("POST", PATH, json=body | {"steering": {"report": "none"}}).json()
    assert (engine.requests[0].steering.correction, engine.requests[0].steering.strength) == ("brief", 2)
    assert (answer["steering"]["fired"], len(answer["steering"]["tokens"])) == (3, 3)
    assert "steering" not in silent


# Streams


def test_events_come_in_openais_order() -> None:
    kinds = [told["type"].removeprefix("response.") for told in events_of(respond(say("ab"), stream=True))]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


@pytest.mark.parametrize("stop", [None, "ö", "lo 😀"])
@pytest.mark.parametrize("end", ["stop", "length"])
def test_a_stream_adds_up_to_the_whole_answer(stop: Any, end: str) -> None:
    include = ["message.output_text.logprobs"]
    body = {"stop": stop, "include": include, "top_logprobs": 2, "steering": {"report": "tokens"}}
    whole = respond(say(TEXT, end), **body).json()
    events = events_of(respond(say(TEXT, end), stream=True, **body))
    assert ids_aside(events[-1]["response"]) == ids_aside(whole)
    deltas = [told for told in events if told["type"] == "response.output_text.delta"]
    (part,) = whole["output"][0]["content"]
    assert "".join(delta["delta"] for delta in deltas) == part["text"]
    assert [entry for delta in deltas for entry in delta["logprobs"]] == part["logprobs"]
    assert bytes(b for entry in part["logprobs"] for b in entry["bytes"]).decode() == part["text"]
    receipts = [receipt for delta in deltas for receipt in delta.get("steering", {}).get("tokens", [])]
    assert receipts == whole["steering"]["tokens"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []


def failing(request: Request, index: int) -> list[Event]:
    return [event(request, index, ids("a")[0]), event(request, index, None, finish="error", error="NaN in the logits")]


def test_a_failure_in_the_middle_is_an_event_of_its_own() -> None:
    *_, last = events_of(respond(failing, stream=True))
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "NaN in the logits"}
    assert (last["response"]["status"], last["response"]["output"][0]["status"]) == ("failed", "incomplete")
    Response.model_validate(last["response"])
    assert respond(failing).status_code == 500


def test_what_leaves_no_token_is_no_fault_of_the_server() -> None:
    def stuck(request: Request, index: int) -> list[Event]:
        end = event(request, index, None, finish="error", error="no token is left", refused=True)
        return [event(request, index, ids("a")[0]), end]

    *_, last = events_of(respond(stuck, stream=True))
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "invalid_prompt", "message": "no token is left"}
    Response.model_validate(last["response"])
    assert respond(stuck).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("refusal", "status"), [(Overloaded("full"), 503), (EngineFailure("not running"), 500)])
def test_a_refusal_has_its_status(refusal: Exception, status: int, stream: bool) -> None:
    with in_memory(ScriptedEngine(say("x"), refusal)) as ask:
        assert ask("POST", PATH, json={"input": "hi", "stream": stream}).status_code == status


def test_calls_are_items_of_their_own() -> None:
    """The chunks of a chat that calls two tools after some text."""
    writer = Writer({"id": "resp_1"})

    def call(index: int, arguments: str, **first: Any) -> dict[str, Any]:
        name = {"name": first.pop("name")} if first else {}
        return {"index": index, **first, "function": {"arguments": arguments} | name}

    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"content": "Let me see"},
        {"tool_calls": [call(0, "", id="c0", name="f")]},
        {"tool_calls": [call(0, '{"a":')]},
        {"tool_calls": [call(0, "1}"), call(1, "{}", id="c1", name="g")]},
    ]
    events = writer.begin()
    for delta in deltas:
        events += writer.take({"delta": delta, "finish_reason": None})
    writer.take({"delta": {}, "finish_reason": "tool_calls"})
    usage = {
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    events += writer.end(usage)
    kinds = [told["type"].removeprefix("response.") for told in events]
    assert kinds[2:] == [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert [(c["call_id"], c["name"], c["arguments"]) for c in output[1:]] == [
        ("c0", "f", '{"a":1}'),
        ("c1", "g", "{}"),
    ]
    assert {item["status"] for item in output} == {"completed"}


CALLS = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_calls_a_function(stream: bool) -> None:
    body = {"tools": [FUNCTION], "stream": stream, "include": ["message.output_text.logprobs"]}
    told = respond(say(f"Hm. {CALLS}"), **body)
    answer = events_of(told)[-1]["response"] if stream else told.json()
    message, call = answer["output"]
    assert message["content"][0]["text"].strip() == "Hm."
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "f", {"a": 1})
    assert answer["status"] == "completed"
    assert [item.type for item in Response.model_validate(answer).output] == ["message", "function_call"]


@pytest.mark.parametrize("text", ["Done.", "<b>Done", "<tool_cal Done", "\n\nDone é"])
def test_what_ends_a_call_is_not_told_of_the_text_after_it(text: str) -> None:
    told = respond(say(f"{CALLS}{text}"), tools=[FUNCTION], include=["message.output_text.logprobs"])
    _, message = told.json()["output"]
    (part,) = message["content"]
    assert part["text"].encode() == bytes(byte for token in part["logprobs"] for byte in token["bytes"])
    assert part["text"].strip() == text.strip()


def test_logprobs_are_told_in_a_chats_words_too() -> None:
    (message,) = respond(say("x"), logprobs=True).json()["output"]
    assert [token["token"] for token in message["content"][0]["logprobs"]] == ["x"]


def test_a_call_and_its_output_are_told_to_the_model() -> None:
    items = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
    ]
    assert "rain" in prompt_of(input=items, tools=[FUNCTION])


def test_text_formats_reach_the_engine() -> None:
    engine = ScriptedEngine(say("{}"))
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    with in_memory(engine) as ask:
        answer = ask("POST", PATH, json={"input": "hi", "text": {"format": schema}})
    assert answer.status_code == 200, answer.text
    structure = engine.requests[0].structure
    assert structure is not None
    assert (structure.kind, json.loads(structure.text)) == ("json_schema", {"type": "object"})
    assert answer.json()["text"]["format"] == schema


# openai's client


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    engine = ScriptedEngine(say(TEXT))
    with (
        loopback(scripted_app(engine), engine) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened,
    ):
        yield opened


def test_openais_client_reads_an_answer(client: OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="hi")
    assert answer.output_text == TEXT
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(TEXT.encode()) + 1


def test_openais_client_reads_a_stream(client: OpenAI) -> None:
    text, status = "", ""
    for told in client.responses.create(model="tiny", input="hi", stream=True):
        if told.type == "response.output_text.delta":
            text += told.delta
        if told.type == "response.completed":
            status = str(told.response.status)
    assert (text, status) == (TEXT, "completed")


def test_openais_helper_follows_a_stream(client: OpenAI) -> None:
    with client.responses.stream(model="tiny", input="hi", extra_body={"steering": {"report": "tokens"}}) as stream:
        kinds = {told.type for told in stream}
        final = stream.get_final_response()
    assert {"response.output_text.delta", "response.completed"} <= kinds
    assert final.output_text == TEXT


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "value"), [("metadata", {"a": "\ud800"}), ("reasoning", {"effort": "\ud800"}), ("instructions", "\ud800")]
)
def test_what_could_not_be_repeated_is_refused(
    field: str, value: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", "{{ messages[-1].content }}")  # which does not read them all
    content = json.dumps({"input": "hi", field: value, "stream": stream})  # escaped
    with in_memory(ScriptedEngine(say(TEXT))) as ask:
        answer = ask("POST", PATH, content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_a_bug_before_the_first_event_is_an_event_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(writer: Writer) -> list[Any]:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(Writer, "begin", broken)
    (last,) = events_of(respond(stream=True))
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"].startswith("internal error")
