"""What a prompt says of tools and their calls, with templates that know of them and with those that do not."""

import json
from typing import Any

import pytest

from tiny import TEMPLATE, tiny_tokenizer
from trimtab.server.tools.formats import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, ToolFormat, format_of
from trimtab.server.tools.template import ToolTemplate

TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SHOWS = "{{ tools | tojson }}"


def template_of(text: str) -> ToolTemplate:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    return ToolTemplate(tokenizer)


def called(*ids: str) -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": {"i": i}}} for i in ids]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(of: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": of, "content": f"result of {of}"}


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('Write <tool_call>{"name": <name>, "arguments": <object>}</tool_call>', HERMES),
        ("[TOOL_CALLS] [", MISTRAL),
        ("[TOOL_CALLS]name[ARGS]", MISTRAL_NAMED),
        ("<|python_tag|>", LLAMA),
        ('Respond in the format {"name": name, "parameters": dictionary of argument name and its value}.', LLAMA),
        ("<tool_call><function=f><parameter=a>", None),
        ("<tool_call>f<arg_key>", None),
        (TEMPLATE, None),
    ],
)
def test_a_template_tells_its_format(text: str, form: ToolFormat | None) -> None:
    assert format_of(text) == form
    assert template_of(text + SHOWS).format == (form or HERMES)


@pytest.mark.parametrize(
    "text", ["<tool_call>", "<tool_call>{{ raise_exception('no') }}", "[TOOL_CALLS]", "<tool_call>{{ nothing.more }}"]
)
def test_a_template_that_shows_no_tools_is_given_them_in_words(text: str) -> None:
    template = template_of(text)
    assert template.format == HERMES
    messages, extra = template.apply([{"role": "user", "content": "hi"}], [TOOL])
    assert extra == {}
    assert [message["role"] for message in messages] == ["system", "user"]
    assert json.dumps(TOOL["function"]) in messages[0]["content"]


def test_a_template_that_knows_tools_gets_them_as_they_are() -> None:
    chat = [{"role": "user", "content": "hi"}, called("a", "b"), result("a"), result("b")]
    template = template_of("<tool_call>" + SHOWS)
    assert template.apply(chat, [TOOL]) == (chat, {"tools": [TOOL]})
    assert template.apply(chat, []) == (chat, {})


def test_llamas_templates_see_one_call_a_message() -> None:
    chat = [
        {"role": "user", "content": "hi"},
        called("a", "b"),
        result("b"),
        result("x"),
        result("a"),
        called("c"),
        result("c"),
    ]
    messages, _ = template_of("<|python_tag|>" + SHOWS).apply(chat, [TOOL])
    assert messages == [
        chat[0],
        called("a"),
        result("a"),
        called("b"),
        result("b"),
        result("x"),
        called("c"),
        result("c"),
    ]


def test_calls_that_share_an_id_take_their_results_in_turn() -> None:
    """As those do that have none; no result is told twice, and none is left out."""
    calls = called("a", "a")
    results = [result("a") | {"content": text} for text in ("one", "two", "three")]
    messages, _ = template_of("<|python_tag|>" + SHOWS).apply([calls, *results], [TOOL])
    assert messages == [called("a"), results[0], called("a"), results[1], results[2]]


@pytest.mark.parametrize("count", [3, 30_000])
def test_a_turn_of_many_calls_and_results(count: int) -> None:
    """What grows with the square of their number would take minutes."""
    ids = [str(i) for i in range(count)]
    chat = [called(*ids), *map(result, reversed(ids)), {"role": "user", "content": "hi"}]
    apart, _ = template_of("<|python_tag|>" + SHOWS).apply(chat, [TOOL])
    assert [message.get("tool_call_id") for message in apart[1::2]] == ids
    assert len(apart) == 2 * count + 1
    assistant, user, last = template_of(TEMPLATE).apply(chat, [])[0]
    assert (assistant["role"], user["role"], last) == ("assistant", "user", chat[-1])
    assert assistant["content"].count("</tool_call>") == user["content"].count("</tool_response>") == count
    assert user["content"].endswith("<tool_response>\nresult of 0\n</tool_response>")


def test_mistrals_templates_see_ids_of_nine_letters_and_digits() -> None:
    chat = [called("call_0123456789", "abcdef123"), result("call_0123456789"), result("abcdef123")]
    (calls, first, second), _ = template_of("[TOOL_CALLS]" + SHOWS).apply(chat, [TOOL])
    short = calls["tool_calls"][0]["id"]
    assert len(short) == 9
    assert short.isalnum()
    assert [first["tool_call_id"], second["tool_call_id"]] == [short, "abcdef123"]
    assert calls["tool_calls"][1]["id"] == "abcdef123"
    assert chat[0]["tool_calls"][0]["id"] == "call_0123456789"
