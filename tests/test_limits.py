"""How much one body may hold. What is longer is refused before it is read: on the event loop, everybody would wait."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from scripted import ScriptedEngine, in_memory, say
from trimtab.server.many import MAX_NESTED
from trimtab.server.schema import ChatBody, CompletionBody

CHAT_PATH, RESPONSE_PATH, TOKENS_PATH = "/v1/chat/completions", "/v1/responses", "/tokenize"
HI: dict[str, Any] = {"role": "user", "content": "hi"}
MANY_KEYS = {f"key{i}": 1 for i in range(1000)}


class Roomy(ScriptedEngine):
    """Tools take a long prompt, and many messages one that is longer."""

    max_len = 300_000


def tools(count: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"f{i}"}} for i in range(count)]


def functions(count: int) -> list[dict[str, Any]]:
    """The same in the words of /v1/responses."""
    return [{"type": "function", "name": f"f{i}"} for i in range(count)]


def allowed(count: int) -> dict[str, Any]:
    named = [{"type": "function", "function": {"name": "f0"}}] * count
    return {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": named}}


def biases(count: int) -> dict[str, float]:
    return {str(token): 0.5 for token in range(count)}


def metadata(count: int) -> dict[str, str]:
    return {f"key{i}": "value" for i in range(count)}


def spans(count: int) -> dict[str, Any]:
    return {"correction": "polite", "budget": {"spans": [["<a>", "</a>"]] * count}}


def said(parts: int) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "hi"}] * parts}


def called(calls: int) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * calls}


CALL: dict[str, Any] = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def output(parts: int) -> dict[str, Any]:
    told = [{"type": "input_text", "text": "hi"}] * parts
    return {"type": "function_call_output", "call_id": "c", "output": told}


CASES: list[tuple[str, dict[str, Any], dict[str, Any], str, int]] = [
    (CHAT_PATH, {"messages": [HI] * 4096}, {"messages": [HI] * 4097}, "messages", 4096),
    (CHAT_PATH, {"messages": [said(256)]}, {"messages": [said(257)]}, "messages[0].content", 256),
    (CHAT_PATH, {"messages": [HI, called(128)]}, {"messages": [HI, called(129)]}, "messages[1].tool_calls", 128),
    (
        CHAT_PATH,
        {"messages": [said(256), called(128)] * 21},
        {"messages": [said(256), called(128)] * 22},
        "messages",
        8192,
    ),
    (RESPONSE_PATH, {"input": [HI] * 4096}, {"input": [HI] * 4097}, "input", 4096),
    (RESPONSE_PATH, {"input": [said(256)]}, {"input": [said(257)]}, "input[0].content", 256),
    (RESPONSE_PATH, {"input": [output(256)]}, {"input": [output(257)]}, "input[0].output", 256),
    (RESPONSE_PATH, {"input": [output(256)] * 32}, {"input": [*[output(256)] * 32, said(1)]}, "input", 8192),
    (RESPONSE_PATH, {"input": [CALL] * 128}, {"input": [CALL] * 129}, "input", 128),
    (TOKENS_PATH, {"messages": [HI] * 4096}, {"messages": [HI] * 4097}, "messages", 4096),
    (CHAT_PATH, {"tools": tools(128)}, {"tools": tools(129)}, "tools", 128),
    (
        CHAT_PATH,
        {"tools": tools(1), "tool_choice": allowed(128)},
        {"tools": tools(1), "tool_choice": allowed(129)},
        "tool_choice",
        128,
    ),
    (RESPONSE_PATH, {"tools": functions(128)}, {"tools": functions(129)}, "tools", 128),
    (CHAT_PATH, {"logit_bias": biases(1024)}, {"logit_bias": biases(1025)}, "logit_bias", 1024),
    (RESPONSE_PATH, {"logit_bias": biases(1024)}, {"logit_bias": biases(1025)}, "logit_bias", 1024),
    (RESPONSE_PATH, {"metadata": metadata(16)}, {"metadata": metadata(17)}, "metadata", 16),
    (CHAT_PATH, {"steering": spans(64)}, {"steering": spans(65)}, "steering.budget.spans", 64),
]


@pytest.mark.parametrize(("path", "taken", "refused", "field", "most"), CASES)
def test_a_list_is_taken_up_to_its_limit(
    path: str, taken: dict[str, Any], refused: dict[str, Any], field: str, most: int
) -> None:
    subject: dict[str, Any] = {"input": "hi"} if path == RESPONSE_PATH else {"messages": [HI]}
    with in_memory(Roomy(say("x"))) as ask:
        answer = ask("POST", path, json=subject | taken)
        error = ask("POST", path, json=subject | refused)
    assert answer.status_code == 200, answer.text
    assert error.status_code == 400
    told = error.json()["error"]
    assert told["param"] == field
    assert told["message"].startswith(f"{field}: at most {most} ")
    assert told["message"].endswith(": send fewer")


def test_what_is_refused_for_its_length_is_not_read() -> None:
    """Two hundred thousand calls take seconds to read."""
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate({"messages": [{"role": "assistant", "tool_calls": [{}] * 200_000}]})
    assert [found["type"] for found in caught.value.errors()] == ["too_many"], "none of them names a function"


def test_more_corrections_than_act_together_are_counted_before_they_are_read() -> None:
    with in_memory(Roomy(say("x"))) as ask:
        steering = {"corrections": {f"c{i}": 1.0 for i in range(9)}}
        error = ask("POST", CHAT_PATH, json={"messages": [HI], "steering": steering}).json()["error"]
    assert error["param"] == "steering.corrections"
    assert "at most 8 entries are taken, not 9" in error["message"]


def test_a_batch_of_prompts_is_counted_before_it_is_known_what_they_are() -> None:
    for prompts in ([[1]] * 16385, ["a"] * 16385, [None] * 16385):
        with pytest.raises(ValidationError) as caught:
            CompletionBody.model_validate({"prompt": prompts})
        assert [found["type"] for found in caught.value.errors()] == ["too_many"]
    assert len(CompletionBody.model_validate({"prompt": [1] * 20000}).prompt) == 20000, "ids are one prompt"
    assert CompletionBody.model_validate({"prompt": []}).prompt == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT_PATH, {"messages": [{**HI, "seen": [[]] * MAX_NESTED}]}),
        (CHAT_PATH, {"messages": [HI], "chat_template_kwargs": {f"key{i}": 1 for i in range(MAX_NESTED)}}),
        (RESPONSE_PATH, {"input": "hi", "tools": [{**functions(1)[0], "parameters": {"x": [{}] * MAX_NESTED}}]}),
        (TOKENS_PATH, {"messages": [{**HI, "seen": [[[]] * 300] * (MAX_NESTED // 300)}]}),
    ],
)
def test_a_body_holds_so_much_wherever_it_stands(path: str, body: dict[str, Any]) -> None:
    """A chat template is handed what a message holds, and walks it: millions of lists take seconds."""
    with in_memory(Roomy(say("x"))) as ask:
        error = ask("POST", path, json=body)
    assert error.status_code == 400
    assert f"at most {MAX_NESTED} lists, objects and keys" in error.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("steering", {"steering": MANY_KEYS}),
        ("steering.budget", {"steering": {"budget": MANY_KEYS}}),
        ("structured_outputs", {"structured_outputs": {"json": {}, **MANY_KEYS}}),
        ("stream_options", {"stream": True, "stream_options": MANY_KEYS}),
    ],
)
def test_of_keys_that_nobody_knows_the_first_is_told(field: str, body: dict[str, Any]) -> None:
    """pydantic has a finding for each of them."""
    with pytest.raises(ValidationError) as raised:
        ChatBody.model_validate_json(json.dumps({"messages": [HI], **body}))
    assert [error["loc"] for error in raised.value.errors()] == [(*field.split("."), "key0")]
    with in_memory(Roomy(say("x"))) as ask:
        error = ask("POST", CHAT_PATH, json={"messages": [HI], **body}).json()["error"]
    assert error["param"] == f"{field}.key0"


def test_ids_are_as_many_as_they_are() -> None:
    """They are no lists; of those that are to be read back as text there is a limit."""
    assert len(CompletionBody.model_validate({"prompt": [1] * 2 * MAX_NESTED}).prompt) == 2 * MAX_NESTED
    with in_memory(Roomy(say("x"))) as ask:
        error = ask("POST", "/detokenize", json={"tokens": [1] * (2**20 + 1)}).json()["error"]
    assert (error["param"], error["message"]) == (
        "tokens",
        "tokens: at most 1048576 entries are taken, not 1048577: send fewer",
    )


def test_what_a_tool_is_called_with_costs_no_walk_through_it() -> None:
    """pydantic's own type for JSON looks at each value: of a body's seven hundred thousand, for seconds."""
    deep = {"a": {str(i): i for i in range(1000)}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": deep}}]}
    (message,) = ChatBody.model_validate({"messages": [call]}).messages
    assert message.for_template()["tool_calls"][0]["function"]["arguments"] == deep
