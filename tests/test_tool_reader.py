"""Calls in a text: what is one, what is none, and that it does not matter how the text is cut."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.server.tools.formats import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, ToolFormat
from trimtab.server.tools.reader import CallReader

FORMATS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "named": MISTRAL_NAMED}
NAMES = {"f", "get_weather", "größe"}
ARGUMENTS = '{"a": "} </tool_call> [TOOL_CALLS] <tool_call>{\\"x\\"", "b": {"c": [1.50, "😀\\\\"]}, "d":null}'


def read(
    form: ToolFormat, pieces: Sequence[str], eager: bool = False, names: Any = NAMES
) -> tuple[str, list[tuple[str, str]]]:
    """-> the content, and (name, arguments) of each call. What a stream of pieces must keep to is asserted."""
    reader, content, calls, ids = CallReader(form, names, eager), "", list[tuple[str, str]](), set[str]()
    for i, text in enumerate(pieces):
        said = reader.push(text, ended=i == len(pieces) - 1)
        content += said.content
        for piece in said.calls:
            if piece.id is not None:
                assert (piece.number, piece.arguments, piece.id[:5]) == (len(calls), "", "call_")
                assert piece.name is not None
                ids.add(piece.id)
                calls.append((piece.name, ""))
            else:
                assert (piece.number, piece.name) == (len(calls) - 1, None)
                assert piece.arguments
                calls[-1] = calls[-1][0], calls[-1][1] + piece.arguments
    assert reader.calls == len(calls) == len(ids)
    return content, calls


def both(form: ToolFormat, text: str) -> tuple[str, list[tuple[str, str]]]:
    """Read whole and letter by letter, waiting and eager: all alike."""
    whole = read(form, [text])
    assert read(form, [*text, ""]) == whole
    assert read(form, [text], eager=True) == read(form, [*text, ""], eager=True) == whole
    return whole


def body(name: str = "f", arguments: str = ARGUMENTS, key: str = "arguments") -> str:
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {arguments}}}'


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (HERMES, "Sure 😀.\n<tool_call>\n{}\n</tool_call>", "Sure 😀.", 1),
        (HERMES, "<tool_call>{}</tool_call>\n<tool_call>\n{}</tool_call>\n", "", 2),
        (HERMES, "<tool_call>\n{}", "", 1),
        (HERMES, "<tool_call>{}<tool_call>{}", "", 2),
        (HERMES, "\n\n<tool_call>{}</tool_call>\n\nDone.", "\n\nDone.", 1),
        (LLAMA, "{}", "", 1),
        (LLAMA, "\n{}; {}", "", 2),
        (LLAMA, "<|python_tag|>{};{}\n{}", "", 3),
        (LLAMA, "Look: <|python_tag|>{}", "Look:", 1),
        (MISTRAL, "[TOOL_CALLS] [{}, {}]", "", 2),
        (MISTRAL, "Sure.\n[TOOL_CALLS][{}]", "Sure.", 1),
        (MISTRAL, "[TOOL_CALLS]{}", "", 1),
    ],
)
def test_calls(form: ToolFormat, text: str, content: str, calls: int) -> None:
    for key in ("arguments", "parameters"):
        written = text.replace("{}", body(key=key))
        assert both(form, written) == (content, [("f", ARGUMENTS)] * calls)


def test_calls_whose_name_is_in_the_lead() -> None:
    text = f"Sure.\n[TOOL_CALLS]f[ARGS]{ARGUMENTS}[TOOL_CALLS]get_weather[CALL_ID]abc123XYZ[ARGS]{{}}"
    assert both(MISTRAL_NAMED, text) == ("Sure.", [("f", ARGUMENTS), ("get_weather", "{}")])
    assert both(MISTRAL_NAMED, "[TOOL_CALLS]f{}") == ("", [("f", "{}")])


@pytest.mark.parametrize(
    ("object_", "arguments"),
    [
        ('{"arguments": {"x": 1}, "name": "f"}', '{"x": 1}'),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', '{"x": 1}'),
        ('{ "name" :"f" ,\n"arguments" :  { "x" : 1e400 } , "id": "7" }', '{ "x" : 1e400 }'),
        ('{"type": "function", "name": "f", "parameters": {}}', "{}"),
        ('{"name": "\\u0066", "arguments": {}}', "{}"),
    ],
)
def test_other_ways_to_write_a_call(object_: str, arguments: str) -> None:
    assert both(HERMES, f"<tool_call>{object_}</tool_call>") == ("", [("f", arguments)])
    assert both(LLAMA, object_) == ("", [("f", arguments)])


NO_CALLS = [
    "<tool_call>",
    "<tool_call>\n",
    "a < b, <tool, <tool_cal",
    "<tool_call> soon </tool_call>",
    '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>',
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "soon"}</tool_call>',
    "<tool_call>{'name': 'f'}</tool_call>",
    '<tool_call>{"city": "Oslo"}</tool_call>',
    "<tool_call>{}</tool_call>",
    '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 3000,
    '<tool_call>{"name": "f", "id": ' + "[" * 200_000 + "]" * 200_000 + "}",
    " \n ",
    "",
]


@pytest.mark.parametrize("text", NO_CALLS, ids=range(len(NO_CALLS)))
def test_what_is_no_call_is_content(text: str) -> None:
    assert read(HERMES, [text]) == (text, [])
    letters = [*text, ""] if len(text) < 10_000 else [text[:99], text[99:], ""]
    assert read(HERMES, letters) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": 42, "name": "f"}',
        'Look: {"name": "f", "parameters": {}}',
        '{"name": "Bob", "id": 3}',
        "<|python_tag|>print(1)",
    ],
)
def test_json_that_is_no_call_is_content(text: str) -> None:
    assert both(LLAMA, text) == (text, [])


def test_other_json_does_not_wait_for_its_end() -> None:
    reader = CallReader(LLAMA, NAMES, eager=False)
    assert reader.push('{"answer": [1, 2', ended=False).content == '{"answer": [1, 2'


@pytest.mark.parametrize("eager", [False, True])
def test_of_calls_that_may_not_be_several_the_first_is_told(eager: bool) -> None:
    text = f"{body(key='parameters')}; {body('get_weather', '{}', 'parameters')}; {body()}"
    for pieces in ([text], [*text]):
        reader = CallReader(LLAMA, NAMES, eager, several=False)
        said = [reader.push(piece, ended=False) for piece in pieces] + [reader.push("", ended=True)]
        assert "".join(one.content for one in said) == ""
        told = [piece for one in said for piece in one.calls]
        assert {(piece.number, piece.name) for piece in told} == {(0, "f"), (0, None)}
        assert "".join(piece.arguments for piece in told) == ARGUMENTS
        assert reader.complete


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("form", [LLAMA, HERMES], ids=["llama", "hermes"])
def test_nor_is_what_was_cut_off_of_a_further_call(form: ToolFormat, eager: bool) -> None:
    first, further = ("{}", "; {}") if form is LLAMA else ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>")
    key = "parameters" if form is LLAMA else "arguments"
    start, rest = first.format(body(key=key)), further.format(body("get_weather", "{}", key))
    for cut in range(1, len(rest)):
        reader = CallReader(form, NAMES, eager, several=False)
        said = [reader.push(start, ended=False), reader.push(rest[:cut], ended=True)]
        told = [piece for one in said for piece in one.calls]
        assert {piece.number for piece in told} == {0}
        content = "".join(one.content for one in said).strip("; ")
        assert "<tool_call>".startswith(content)
        assert reader.complete


def test_but_what_breaks_off_and_is_no_call_is_content() -> None:
    for form, text in ((LLAMA, '; {"name": "Paris", "people": 2'), (HERMES, 'So: <tool_call>{"name": "nosuch", "argu')):
        first = body(key="parameters") if form is LLAMA else f"<tool_call>{body()}</tool_call>"
        reader = CallReader(form, NAMES, eager=False, several=False)
        reader.push(first, ended=False)
        assert reader.push(text, ended=True).content.endswith(text.lstrip("; "))


def test_one_bad_call_spoils_no_other() -> None:
    bad = "<tool_call>{bad}</tool_call>"
    assert both(HERMES, f"{bad}\n<tool_call>{body()}</tool_call>") == (bad, [("f", ARGUMENTS)])
    assert both(HERMES, f"<tool_call>oh\n<tool_call>{body()}</tool_call>") == ("<tool_call>oh", [("f", ARGUMENTS)])


def test_an_eager_reader_tells_arguments_as_they_come() -> None:
    reader = CallReader(HERMES, NAMES, eager=True)
    assert reader.push('<tool_call>\n{"name": "f", "arguments": ', ended=False) == ("", ())
    opened, first = reader.push('{"a": "', ended=False).calls
    assert (opened.name, opened.arguments, first.arguments) == ("f", "", '{"a": "')
    (piece,) = reader.push("xy", ended=False).calls
    assert (piece.number, piece.id, piece.arguments) == (0, None, "xy")
    assert not reader.complete
    (piece,) = reader.push('"}}</tool_', ended=False).calls
    assert piece.arguments == '"}'
    assert reader.complete
    assert reader.push("", ended=True) == ("", ())


@pytest.mark.parametrize(
    ("form", "eager", "text", "inside"),
    [
        (HERMES, True, "It is ", False),
        (HERMES, True, '<tool_call>\n{"na', True),
        (HERMES, True, '<tool_call>\n{"name": "f", "arguments": {}}', True),
        (HERMES, True, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n', False),
        (LLAMA, False, '{"name": "Bob", "arguments": {', False),
        (LLAMA, False, '{"name": "f", "arguments": {"a', True),
        (LLAMA, True, '{"name": "f", "arguments": {"a', True),
        (LLAMA, False, '{"name": "f", "arguments": {}}', False),
        (LLAMA, False, '{"a": "', False),
        (MISTRAL, True, '[TOOL_CALLS] [{"name": "f", "arguments": {"a', True),
        (MISTRAL, True, '[TOOL_CALLS] [{"name": "f", "arguments": {}}', False),
    ],
)
def test_what_comes_next_is_a_calls_or_text(form: ToolFormat, eager: bool, text: str, inside: bool) -> None:
    reader = CallReader(form, {"f"}, eager)
    reader.push(text, ended=False)
    assert reader.inside == inside


def test_a_call_that_is_cut_off() -> None:
    cut = '<tool_call>{"name": "f", "arguments": {"a": 1'
    assert read(HERMES, [cut], eager=False) == (cut, [])
    assert read(HERMES, [*cut, ""], eager=True) == ("", [("f", '{"a": 1')])


WORDS = [
    "<tool_call>",
    "</tool_call>",
    "\n",
    " ",
    "{",
    "}",
    "x",
    "😀",
    '"',
    ";",
    ",",
    "[TOOL_CALLS]",
    " [",
    "]",
    "[ARGS]",
]
WORDS += ["f", "<|python_tag|>", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {"a": "']


@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.sampled_from(WORDS), max_size=12),
    st.booleans(),
    st.lists(st.integers(0, 200), max_size=10),
)
def test_it_does_not_matter_how_a_text_is_cut(form: str, words: list[str], eager: bool, cuts: list[int]) -> None:
    text = "".join(words)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[a:b] for a, b in itertools.pairwise(edges)] + [""]
    whole = read(FORMATS[form], [text], eager)
    assert read(FORMATS[form], parts, eager) == read(FORMATS[form], [*text, ""], eager) == whole
    content, calls = whole
    if not calls:
        assert content == text
    if not eager:
        for _, arguments in calls:
            assert isinstance(json.loads(arguments), dict)
            assert arguments in text or arguments == "{}"
