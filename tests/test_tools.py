"""Tools in chats: what clients see of calls, streamed or not, and what the engine is asked."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from scripted import BASE, EOS, AnyGrammar, Script, ScriptedEngine, event, ids, in_memory, loopback, say, scripted_bank
from tiny import TEMPLATE, tiny_base, tiny_correction, tiny_tokenizer
from trimtab.clients import Client
from trimtab.server import tickets
from trimtab.server.app import create_app
from trimtab.server.compiling import Compiler
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.engine import Engine as RealEngine
from trimtab.server.engine.pieces import Pieces
from trimtab.server.engine.request import Budget, Request, Structure
from trimtab.server.engine.structure import Grammars
from trimtab.server.schema import ChatBody
from trimtab.server.tools.calls import ToolUse
from trimtab.server.tools.formats import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, ToolFormat
from trimtab.steering.bank import Bank

CHAT_PATH = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
NOW = {"name": "now", "description": "The time."}
CLOCK: Any = {"type": "function", "function": NOW}
TOOLS = [WEATHER, CLOCK]
CITY = '{"city": "Tromsø 😀 } </tool_call> <tool_call>{\\"a\\": {}"}'


def call(name: str = "get_weather", arguments: str = CITY) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TWO = f"Let me see 😀.\n{call()}\n{call('now', '{}')}"


class Engine(ScriptedEngine):
    max_len = 4000


def ask(script: Script | str, **body: Any) -> tuple[httpx.Response, Engine]:
    engine = Engine(say(script) if isinstance(script, str) else script)
    with in_memory(engine) as post:
        return post("POST", CHAT_PATH, json={"messages": MESSAGES, "tools": TOOLS} | body), engine


def choice_of(script: Script | str, **body: Any) -> dict[str, Any]:
    response, _ = ask(script, **body)
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def chunks_of(script: Script | str, **body: Any) -> list[dict[str, Any]]:
    response, _ = ask(script, stream=True, **body)
    lines = response.text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [choice for line in lines[:-1] for choice in json.loads(line.removeprefix("data: "))["choices"]]


def calls_in(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]


def request_of(**body: Any) -> Request:
    response, engine = ask("x", **body)
    assert response.status_code == 200, response.text
    return engine.requests[0]


def prompt_of(**body: Any) -> str:
    return str(tiny_tokenizer().decode(request_of(**body).prompt))


# Answers


def test_an_answer_with_calls() -> None:
    choice = choice_of(TWO)
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "Let me see 😀."
    assert calls_in(message) == [("get_weather", CITY), ("now", "{}")]
    first, second = message["tool_calls"]
    assert first["type"] == "function"
    assert first["id"].startswith("call_")
    assert first["id"] != second["id"]


def test_a_call_alone_has_no_content() -> None:
    assert choice_of(call())["message"]["content"] is None


def test_an_answer_without_calls_is_as_ever() -> None:
    choice = choice_of("Hello 😀!")
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {"role": "assistant", "content": "Hello 😀!", "refusal": None}


@pytest.mark.parametrize(
    "text", ['<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', "<tool_call>oh", "a <tool"]
)
def test_what_is_no_call_is_content(text: str) -> None:
    for answer in (choice_of(text), choice_of(text, tool_choice="none")):
        assert answer["finish_reason"] == "stop"
        assert answer["message"]["content"] == text
        assert "tool_calls" not in answer["message"]
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks_of(text)) == text


def test_where_nothing_may_be_called_a_call_is_text() -> None:
    for body in ({"tool_choice": "none"}, {"tools": []}, {"tools": None}):
        assert choice_of(call(), **body)["message"]["content"] == call()


def test_a_stream_is_made_of_one_opening_and_pieces_of_arguments() -> None:
    chunks = chunks_of(TWO)
    assert chunks[0]["delta"] == {"role": "assistant", "content": None}
    content = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
    assert content == "Let me see 😀."
    deltas = [chunk["delta"]["tool_calls"] for chunk in chunks if "tool_calls" in chunk["delta"]]
    assert all(len(delta) == 1 for delta in deltas)
    for index, (name, arguments) in enumerate([("get_weather", CITY), ("now", "{}")]):
        opening, *pieces = [delta for (delta,) in deltas if delta["index"] == index]
        assert opening | {"id": ""} == {
            "index": index,
            "id": "",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        assert all(set(piece) == {"index", "function"} for piece in pieces)
        assert "".join(piece["function"]["arguments"] for piece in pieces) == arguments
        assert len(pieces) > 1, "arguments come as they are written"
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == ["tool_calls"]


def test_logprobs_are_of_all_that_was_written() -> None:
    choice = choice_of(TWO, logprobs=True, top_logprobs=2)
    entries = choice["logprobs"]["content"]
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == TWO
    chunks = chunks_of(TWO, logprobs=True, top_logprobs=2)
    assert [e for c in chunks if c["logprobs"] for e in c["logprobs"]["content"]] == entries
    assert not any(chunk["delta"].get("content") == "" for chunk in chunks)


def test_choices_do_not_share_their_calls() -> None:
    response, _ = ask(lambda request, k: say([TWO, "Hello", call("now", "{}")][k])(request, k), n=3)
    answer = response.json()
    assert [c["finish_reason"] for c in answer["choices"]] == ["tool_calls", "stop", "tool_calls"]
    assert [calls_in(c["message"]) for c in answer["choices"]] == [
        [("get_weather", CITY), ("now", "{}")],
        [],
        [("now", "{}")],
    ]
    assert answer["usage"]["completion_tokens"] == sum(len(ids(t)) + 1 for t in (TWO, "Hello", call("now", "{}")))


def test_a_call_that_is_cut_off() -> None:
    cut = call()[:60]
    choice = choice_of(say(cut, end="length"))
    assert choice["finish_reason"] == "length"
    assert calls_in(choice["message"]) == [("get_weather", cut[cut.index('{"city') :])]


@pytest.mark.parametrize("stop", ["Troms", "\n", "call>", ["city", "</tool_call>"], "}}"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_counts_in_text_and_not_in_calls(stop: Any, streamed: bool) -> None:
    def read(script: str, **body: Any) -> tuple[str, list[tuple[str, str]], str]:
        if not streamed:
            choice = choice_of(script, stop=stop, **body)
            return choice["message"]["content"] or "", calls_in(choice["message"]), choice["finish_reason"]
        chunks = chunks_of(script, stop=stop, **body)
        pieces = [p for chunk in chunks for p in chunk["delta"].get("tool_calls", [])]
        whole = [
            (piece["function"]["name"], "".join(p["function"]["arguments"] for p in pieces if p["index"] == i))
            for i, piece in enumerate(p for p in pieces if "id" in p)
        ]
        text = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
        return text, whole, chunks[-1]["finish_reason"]

    assert read(call(), tool_choice="required") == ("", [("get_weather", CITY)], "tool_calls")
    if stop != "call>":  # the marker itself may be text
        assert read(call()) == ("", [("get_weather", CITY)], "tool_calls")
    first = stop if isinstance(stop, str) else stop[0]
    assert read(f"Let me see{first} and more") == ("Let me see", [], "stop")


# What the engine is asked


def test_a_model_without_words_for_tools_is_told_of_them() -> None:
    prompt = prompt_of()
    assert prompt.startswith("<|im_start|>system\n")
    assert json.dumps(WEATHER["function"]) in prompt
    assert '"name": "now"' in prompt
    assert prompt_of(messages=[{"role": "system", "content": "Be brief."}, *MESSAGES]).startswith(
        "<|im_start|>system\nBe brief.\n\nYou can call"
    )
    for body in ({"tool_choice": "none"}, {"tools": []}):
        assert prompt_of(**body) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_calls_of_a_chat_reach_the_prompt() -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Åre"}'}}
    messages = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [called, {**called, "id": "call_2"}],
            "function_call": None,
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "colder"}]},
    ]
    written = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Åre"}}\n</tool_call>'
    assert prompt_of(messages=messages, tools=None) == (
        "<|im_start|>user\nhi<|im_end|>\n"
        f"<|im_start|>assistant\n{written}\n{written}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\ncold\n</tool_response>\n<tool_response>\ncolder\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def grammar_of(**body: Any) -> tuple[str, tuple[str, ...]]:
    structure = request_of(**body).structure
    assert structure is not None
    assert structure.kind == "grammar"
    return structure.text, structure.lazy


def test_a_grammar_holds_from_where_a_call_begins() -> None:
    grammar, lazy = grammar_of()
    assert lazy == ("<tool_call>",)
    assert '\\"get_weather\\"' in grammar
    assert '\\"now\\"' in grammar
    assert "call*" in grammar.replace(")", "")
    assert request_of(tools=None).structure is None
    assert request_of(tool_choice="none").structure is None


def test_a_call_that_must_come_is_all_there_is() -> None:
    grammar, lazy = grammar_of(tool_choice="required")
    assert lazy == ()
    assert 'calls: "<tool_call>" "\\n" call (' in grammar
    named, lazy = grammar_of(tool_choice={"type": "function", "function": {"name": "now"}})
    assert lazy == ()
    assert '\\"now\\"' in named
    assert "get_weather" not in named
    assert ")*" not in named  # one call
    assert ")*" in grammar
    assert ")*" not in grammar_of(tool_choice="required", parallel_tool_calls=False)[0]


def test_only_some_tools_may_be_allowed() -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    body: Any = {"tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}
    grammar, lazy = grammar_of(**body)
    assert ("get_weather" in grammar, lazy) == (False, ())
    assert "get_weather" in prompt_of(**body)
    assert choice_of(call(), **body)["message"]["content"] == call()


def test_nothing_is_steered_in_calls_whatever_their_format() -> None:
    """Hermes' spans are the default."""
    for template, spans in ((None, Budget().spans), ("{{ tools }}[TOOL_CALLS]", MISTRAL.spans)):
        engine = Engine(say("x"))
        with served(template, engine) as client:
            client.chat.completions.create(model="brief", messages=MESSAGES, tools=TOOLS)
            own: Any = {"steering": {"budget": {"spans": [["a", "b"]]}}}
            client.chat.completions.create(model="brief", messages=MESSAGES, tools=TOOLS, extra_body=own)
            client.chat.completions.create(model="brief", messages=MESSAGES)
        assert [request.steering.budget.spans for request in engine.requests] == [
            spans,
            (("a", "b"),),
            Budget().spans,
        ]


# Other formats


@contextmanager
def served(template: str | None, engine: Engine, special: tuple[str, ...] = ()) -> Iterator[OpenAI]:
    """A client of a model with this template and these special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    tokenizer.chat_template = template or tokenizer.chat_template
    base: Any = SimpleNamespace(name="tiny", vocab=BASE.vocab, tokenizer=tokenizer, identity=BASE.identity)
    app = create_app(engine, base, scripted_bank())  # type: ignore[arg-type]
    with loopback(app, engine) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def script_of(text: str, special: tuple[str, ...]) -> Script:
    """Says the text, special tokens where their names are."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})

    def script(request: Request, index: int) -> list[Any]:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return [event(request, index, token) for token in tokens] + [event(request, index, EOS, finish="stop")]

    return script


PARTS = [("get_weather", CITY), ("now", "{}")]


def objects(key: str) -> list[str]:
    return [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in PARTS]


OF_FORMATS = [
    (HERMES, (), f"{call()}\n{call('now', '{}')}"),
    (HERMES, ("<tool_call>", "</tool_call>"), f"{call()}\n{call('now', '{}')}"),
    (MISTRAL, ("[TOOL_CALLS]",), f"[TOOL_CALLS] [{', '.join(objects('arguments'))}]"),
    (MISTRAL_NAMED, ("[TOOL_CALLS]", "[ARGS]"), "".join(f"[TOOL_CALLS]{name}[ARGS]{args}" for name, args in PARTS)),
    (LLAMA, ("<|python_tag|>",), f"<|python_tag|>{'; '.join(objects('parameters'))}"),
    (LLAMA, (), "; ".join(objects("parameters"))),
]


@pytest.mark.parametrize(("form", "special", "text"), OF_FORMATS, ids=range(len(OF_FORMATS)))
def test_every_format_reads_alike(form: ToolFormat, special: tuple[str, ...], text: str) -> None:
    engine = Engine(script_of(text, special))
    with served("{{ tools }}" + form.signs[0], engine, special) as client:
        for choice in ("auto", "required"):
            asked: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice}
            whole = client.chat.completions.create(**asked).choices[0]
            with client.chat.completions.stream(**asked) as stream:
                streamed = stream.get_final_completion().choices[0]
            for answer in (whole, streamed):
                assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
                calls = answer.message.tool_calls or []
                assert [(c.function.name, c.function.arguments) for c in calls] == PARTS  # type: ignore[union-attr]


@pytest.mark.parametrize("must", [True, False])
@pytest.mark.parametrize(("form", "special", "text"), OF_FORMATS, ids=range(len(OF_FORMATS)))
def test_a_grammar_allows_what_a_reader_reads(
    form: ToolFormat, special: tuple[str, ...], text: str, must: bool
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    body = ChatBody.model_validate(
        {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required" if must else "auto"}
    )
    use = ToolUse.of(body, form, Pieces(tokenizer))
    assert use is not None
    if form is LLAMA:
        text = text.removeprefix("<|python_tag|>")
        if not must:
            assert use.structure is None
            return
    assert use.structure is not None
    text = text.replace(CITY, '{"city": "Tromsø 😀 }"}')  # within a string no token is special
    grammars = Grammars(tokenizer, len(tokenizer), [EOS])
    words = np.zeros(-(-len(tokenizer) // 32), dtype=np.int32)
    for lead in ("",) if must else ("", "Well {, <tool "):
        matcher = grammars.compile(use.structure).start()
        for token in tokenizer.encode(lead + text, add_special_tokens=False):
            matcher.fill(words)
            assert words[token // 32] >> token % 32 & 1, (lead + text, tokenizer.decode([token]))
            matcher.take(token)
        assert matcher.may_end
        matcher.fill(words)
        assert not words[ord("x") // 32] >> ord("x") % 32 & 1, "after a call there is no text"


def test_without_a_marker_too_one_call_is_one_and_a_strict_tool_is_called_as_its_schema_has_it() -> None:
    text = "; ".join(objects("parameters"))
    engine = Engine(script_of(text, ()))
    with served("{{ tools }}" + LLAMA.signs[0], engine) as client:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "parallel_tool_calls": False}
        whole = client.chat.completions.create(**asked, tools=TOOLS).choices[0]
        assert whole.finish_reason == "tool_calls"
        assert [c.function.name for c in whole.message.tool_calls or []] == ["get_weather"]  # type: ignore[union-attr]
        strict: Any = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
        client.chat.completions.create(**asked, tools=[strict, CLOCK])
    free, held = (request.structure for request in engine.requests)
    assert free is None
    assert held is not None
    tokenizer = tiny_tokenizer()
    words = np.zeros(-(-len(tokenizer) // 32), dtype=np.int32)

    def taken(text: str) -> str:
        """As much of it as the structure lets through."""
        matcher = Grammars(tokenizer, len(tokenizer), [EOS]).compile(held).start()
        for n, token in enumerate(ids(text)):
            matcher.fill(words)
            if not words[token // 32] >> token % 32 & 1:
                return text[:n]
            matcher.take(token)
        return text

    assert taken('{"name": "get_weather", "parameters": {"city": 5}}').endswith('"city": ')
    assert taken('\n{"name": "nobody"') == '\n{"name": "no'  # as `now` begins
    assert taken("<|python_tag|>print(1)") == "<|python_tag|>"
    for text in ('A {"city": 5}, {"name": 1}', '{"name": "now", "parameters": {}}'):
        assert taken(text) == text


def test_a_tool_or_an_answer_in_json() -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"], "additionalProperties": False}
    formatted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    structure = request_of(response_format=formatted).structure
    assert structure is not None
    assert structure.lazy == ()
    tokenizer = tiny_tokenizer()
    for text in ('{"n": 1}', call(), call() + "\n" + call("now", "{}")):
        matcher = Grammars(tokenizer, len(tokenizer), [EOS]).compile(structure).start()
        words = np.zeros(-(-len(tokenizer) // 32), dtype=np.int32)
        for token in ids(text):
            matcher.fill(words)
            assert words[token // 32] >> token % 32 & 1
            matcher.take(token)
        assert matcher.may_end
    assert choice_of('{"n": 1}', response_format=formatted)["message"]["content"] == '{"n": 1}'
    response, _ = ask("x", structured_outputs={"regex": "a"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "structured_outputs.regex")
    assert request_of(structured_outputs={"regex": "a"}, tool_choice="none").structure == Structure("regex", "a")
    assert (
        request_of(response_format=formatted, tool_choice="required").structure
        == request_of(tool_choice="required").structure
    )


# The official client's helpers


class Place(BaseModel):
    """Tell the weather."""

    city: str


def test_the_official_helpers_parse_calls() -> None:
    tool = openai.pydantic_function_tool(Place, name="get_weather")
    engine = Engine(say(TWO))
    with served(None, engine) as client:
        asked: Any = {
            "model": "tiny",
            "messages": MESSAGES,
            "tools": [tool, CLOCK | {"function": NOW | {"strict": True}}],
        }
        parsed = client.chat.completions.parse(**asked).choices[0].message
        with client.chat.completions.stream(**asked) as stream:
            events = list(stream)
            final = stream.get_final_completion().choices[0].message
    city = json.loads(CITY)["city"]
    for message in (parsed, final):
        assert message.content == "Let me see 😀."
        assert [c.function.parsed_arguments for c in message.tool_calls or []] == [Place(city=city), {}]
    done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert [(e.index, e.name, e.arguments) for e in done] == [(0, "get_weather", CITY), (1, "now", "{}")]
    growing = [e.arguments_delta for e in events if e.type == "tool_calls.function.arguments.delta" and e.index == 0]
    assert "".join(growing) == CITY


def test_our_own_answers_go_on_in_the_next_question() -> None:
    engine = Engine(say(TWO))
    with served(None, engine) as official, Client(str(official.base_url), api_key="k") as client:
        message = client.chat("hi", tools=TOOLS).choices[0].message
        with client.stream_chat("hi", tools=TOOLS) as stream:
            assert "".join(chunk.text for chunk in stream) == message.content
        streamed = {"role": "assistant", "content": stream.text, "tool_calls": stream.tool_calls}
        output = client.respond("hi", tools=[{"type": "function", **tool["function"]} for tool in TOOLS]).output
        results = [{"role": "tool", "tool_call_id": call.id, "content": "cold"} for call in message.tool_calls or []]
        told = [{"type": "function_call_output", "call_id": c.call_id, "output": "cold"} for c in output if c.call_id]
        for said in (message, streamed):
            client.chat([*MESSAGES, said, *results])
        client.respond([*MESSAGES, *output, *told])
    prompts = [tiny_tokenizer().decode(request.prompt) for request in engine.requests[-3:]]
    assert "Let me see 😀." in prompts[0]
    assert "get_weather" in prompts[0]
    assert "<tool_response>\ncold" in prompts[0]
    assert len(set(prompts)) == 1


# What is refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
         "tools[0].function.parameters.type"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]},
         "messages[0].function_call"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": {"a": 1}}]}, "messages[0].tool_call_id"),
    ],
)  # fmt: skip
def test_what_is_refused_names_its_field(body: dict[str, Any], param: str) -> None:
    response, _ = ask("x", **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_strict_schema_that_would_be_refused_alone_is_refused_of_a_tool() -> None:
    """Free names may come twice, so that they cannot be counted; a tool that is not strict is held to the rest."""
    counted = {"patternProperties": {"^a$": {"enum": [1]}}, "additionalProperties": False, "minProperties": 2}
    function = {"name": "f", "parameters": {"type": "object", "properties": {"b": counted}}}

    def asked(strict: bool | None, **body: Any) -> httpx.Response:
        tool = {"type": "function", "function": {**function, "strict": strict}}
        return ask("x", tools=[CLOCK, tool], **body)[0]

    named = {"type": "function", "function": {"name": "f"}}
    for choice in ("auto", "required", named):
        error = asked(True, tool_choice=choice).json()["error"]
        assert error["param"] == "tools[1].function.parameters"
        assert "minProperties cannot be kept" in error["message"]
        assert asked(False, tool_choice=choice).status_code == 200
    assert asked(True, tool_choice="none").status_code == 200
    grammar, _ = grammar_of(tools=[{"type": "function", "function": function}])
    assert "^a$" in grammar
    assert "minProperties" not in grammar


def test_tools_that_take_too_long_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar that cannot be followed is made plainer; one that is never finished would take place after place."""
    tried: list[str] = []

    def compile(grammars: Grammars, structure: Structure, field: str) -> None:
        tried.append(field)
        threading.Event().wait()

    monkeypatch.setattr(AnyGrammar, "compile", compile)
    monkeypatch.setattr(tickets, "Compiler", partial(Compiler, seconds=0.1))
    response, _ = ask("x", tool_choice="required")
    assert response.status_code == 400
    assert "takes more than 0.1 s to compile" in response.json()["error"]["message"]
    assert tried == [response.json()["error"]["param"]]


# With a real engine and a random model: only the grammar makes it write what it writes

BOOK: Any = {
    "type": "function",
    "function": {
        "name": "book",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "class": {"enum": ["first", "second"]},
                "seats": {"type": "array", "items": {"enum": [1, 22]}, "minItems": 1, "maxItems": 2},
                "flat": {"type": "boolean"},
            },
            "required": ["class", "seats", "flat"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def real() -> Iterator[OpenAI]:
    base = tiny_base(max_position_embeddings=1024)
    base.tokenizer.chat_template = "{{ tools[0]['function']['name'] }}<tool_call>" + TEMPLATE
    bank = Bank(base.hidden, base.device)
    bank.add(tiny_correction(base, "bold"))
    engine = RealEngine(base, bank, EngineConfig(slots=4, max_model_len=512))
    app = create_app(engine, base, bank)
    with loopback(app, engine) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def check_booking(arguments: str) -> None:
    found = json.loads(arguments)
    assert set(found) == {"class", "seats", "flat"}
    assert found["class"] in ("first", "second")
    assert isinstance(found["flat"], bool)
    assert 1 <= len(found["seats"]) <= 2
    assert all(seat in (1, 22) for seat in found["seats"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_a_random_model_calls_what_it_must(real: OpenAI, choice: Any) -> None:
    tools = [BOOK] if isinstance(choice, str) else [BOOK, WEATHER]
    asked: Any = {"model": "tiny-llama", "messages": MESSAGES, "tools": tools, "tool_choice": choice}
    answer = real.chat.completions.create(**asked, seed=1, parallel_tool_calls=False).choices[0]
    with real.chat.completions.stream(**asked, seed=1, parallel_tool_calls=False) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    (call,) = answer.message.tool_calls or []
    (again,) = streamed.message.tool_calls or []
    assert call.type == again.type == "function"
    assert (call.function.name, call.function.arguments) == (again.function.name, again.function.arguments)
    check_booking(call.function.arguments)


def test_nothing_is_steered_within_a_call(real: OpenAI) -> None:
    answer = real.chat.completions.create(
        model="bold", messages=MESSAGES, tools=[BOOK], tool_choice="required", seed=1, 
        extra_body={"steering": {"report": "tokens", "gate": "always"}},
    )  # fmt: skip
    choice: Any = answer.choices[0]
    assert choice.steering["steps"] > 50
    assert choice.steering["fired"] == 0


def test_a_schema_that_no_grammar_follows(real: OpenAI) -> None:
    """One that is strict, or must be called, is refused; else its arguments are any object."""
    odd: Any = {"type": "object", "properties": {"a": {"type": "string", "format": "made-up"}}, "required": ["a"]}
    broken: Any = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]}
    nameless: Any = {"type": "object", "properties": {"a": {"required": [{}], "minProperties": 3}}}

    def ask(parameters: Any, **body: Any) -> Any:
        strict = body.pop("strict", False)
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}
        return real.chat.completions.create(model="tiny-llama", messages=MESSAGES, tools=[tool], max_tokens=5, **body)

    ask(odd)
    ask(odd, tool_choice="required")
    ask(broken)
    ask(nameless)
    for parameters, body in [
        (odd, {"strict": True}),
        (broken, {"strict": True}),
        (broken, {"tool_choice": "required"}),
        (nameless, {"strict": True}),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(parameters, **body)
        assert caught.value.param == "tools[0].function.parameters"
        assert "lark" not in str(caught.value)
    f, g = ({"type": "function", "function": {"name": name, "parameters": broken}} for name in "fg")
    g["function"]["strict"] = True
    with pytest.raises(openai.BadRequestError, match="Pointer '/nowhere' does not exist") as caught:
        real.chat.completions.create(model="tiny-llama", messages=MESSAGES, tools=[f, g])
    assert caught.value.param == "tools[1].function.parameters"


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#/nowhere"}, "response_format cannot be followed: Pointer '/nowhere' does not exist"),
        ({"type": "object", "minProperties": 2}, "response_format: minProperties cannot be kept"),
        (False, "response_format cannot be followed: Unsatisfiable"),
    ],
)
def test_a_format_that_is_refused_alone_is_refused_alike_beside_tools(real: OpenAI, schema: Any, reason: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked: Any = {"model": "tiny-llama", "messages": MESSAGES, "response_format": form, "max_tokens": 5}
    with pytest.raises(openai.BadRequestError) as caught:
        real.chat.completions.create(**asked, tools=TOOLS)
    assert caught.value.param == "response_format"
    assert reason in str(caught.value)
    real.chat.completions.create(**asked, tools=TOOLS, tool_choice="required")  # which leaves no room for an answer
