"""How much one body may hold. What is longer is refused before it is read: on the event loop, everybody would wait."""

from typing import Any

import pytest

from scripted import ScriptedEngine, in_memory, say

CHAT_PATH, RESPONSE_PATH = "/v1/chat/completions", "/v1/responses"
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


CASES: list[tuple[str, dict[str, Any], dict[str, Any], str, int]] = [
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
    subject: dict[str, Any] = {"messages": [HI]} if path == CHAT_PATH else {"input": "hi"}
    with in_memory(Roomy(say("x"))) as ask:
        answer = ask("POST", path, json=subject | taken)
        error = ask("POST", path, json=subject | refused)
    assert answer.status_code == 200, answer.text
    assert error.status_code == 400
    told = error.json()["error"]
    assert told["param"] == field
    assert told["message"].startswith(f"{field}: at most {most} ")
    assert told["message"].endswith(": send fewer")
