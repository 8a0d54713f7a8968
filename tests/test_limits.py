"""How much one body may hold. What is longer is refused before it is read: on the event loop, everybody would wait."""

from typing import Any

import pytest
from pydantic import ValidationError

from scripted import ScriptedEngine, in_memory, say
from trimtab.server.schema import ChatBody

CHAT_PATH, RESPONSE_PATH, TOKENS_PATH = "/v1/chat/completions", "/v1/responses", "/tokenize"
HI: dict[str, Any] = {"role": "user", "content": "hi"}


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
