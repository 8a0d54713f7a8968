"""How models write the calls of tools: one ToolFormat for each way that is known here.

Invariant: a format says the same in each of its parts: what a reader finds, what a grammar makes a model write, and
the spans in which nothing is steered. A call is a JSON object somewhere after a marker.

    HERMES         text <tool_call>{"name": "f", "arguments": {}}</tool_call>
    LLAMA          {"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}
    MISTRAL        text [TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]
    MISTRAL_NAMED  text [TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from trimtab.server.engine.pieces import Pieces

# As json.dumps writes, and so the chat templates that a model has learnt from.
_LAYOUT: dict[str, JsonValue] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class ToolFormat:
    """What is read: a marker, a lead, the object, perhaps a tail. What is made to be written: the last five."""

    markers: tuple[str, ...]  # by their names where they are special tokens
    lead: re.Pattern[str]  # between marker and object. It matches every beginning of what it matches
    tail: str
    spans: tuple[tuple[str, str], ...]  # as in request.Budget
    signs: tuple[str, ...]  # a chat template that has one of them is for a model that writes so,
    unlike: tuple[str, ...] = ()  # but for these, which tell of other formats with the same marker
    key: str = "arguments"
    bare: bool = False  # at the start of a text, and after another call, a call needs no marker
    closed: bool = False  # the tail comes after each call, and does not merely part them
    listed: bool = False  # a comma after a call announces another
    named: bool = False  # the name stands in the lead, and the object is the arguments alone
    opening: str = ""
    first: str = ""  # between the opening and a call
    end: str = ""  # of each call
    between: str = ""
    closing: str = ""

    def grammar(
        self,
        tools: Sequence["Callee"],
        several: bool,
        opened: bool,
        tokens: Mapping[str, int],
        answer: str | None = None,
    ) -> str:
        """A Lark grammar of calls of these tools, one or more. opened: the opening is out already.

        tokens: the special ones among the names that this format uses; answer: a JSON schema of what else may be said.
        """
        text = _Literals(tokens)
        more = f"({text(self.between)} call)*" if several else ""
        rules = [
            "start: calls" if answer is None else f"start: calls | answer\nanswer: %json {_no_gbnf(answer)}",
            _rule("calls", "" if opened else text(self.opening), text(self.first), "call", more, text(self.closing)),
            _rule("call", " | ".join(f"call_{i}" for i in range(len(tools)))),
        ]
        for i, tool in enumerate(tools):
            name = json.dumps(tool.name, ensure_ascii=False)
            before, after = (f"{tool.name}[ARGS]", "") if self.named else (f'{{"name": {name}, "{self.key}": ', "}")
            rules.append(_rule(f"call_{i}", text(before), f"arguments_{i}", text(after + self.end)))
            rules.append(_rule(f"arguments_{i}", "%json", _no_gbnf(json.dumps(tool.constraint()))))
        return "\n".join(rules)

    def tokens(self, pieces: Pieces) -> dict[str, int]:
        """The special tokens that a call may hold, by name: a reader must see them, and a grammar name them."""
        return pieces.special_ids((*self.markers, self.tail, *_WITHIN))


@dataclass(frozen=True)
class Callee:
    """A tool as a grammar knows it."""

    name: str
    parameters: Mapping[str, JsonValue]  # as read_schema lets it through
    strict: bool
    field: str  # of the parameters, as callers write it

    def constraint(self) -> dict[str, JsonValue]:
        """The schema as llguidance reads it. What it does not know in one that is not strict, it leaves out."""
        return {**self.parameters, "type": "object", "x-guidance": {**_LAYOUT, "lenient": not self.strict}}


def _no_gbnf(text: str) -> str:
    """The same JSON without the sign by which llguidance knows the other kind of grammar."""
    return text.replace("::=", "\\u003a:=")


def _rule(name: str, *parts: str) -> str:
    return f"{name}: {' '.join(part for part in parts if part)}"


class _Literals:
    """Texts in Lark: special tokens by their ids, the rest in quotes."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self._split = re.compile("(" + "|".join(map(re.escape, tokens)) + ")") if tokens else None

    def __call__(self, text: str) -> str:
        parts = self._split.split(text) if self._split else [text]
        written = (f"<[{self._tokens[p]}]>" if p in self._tokens else json.dumps(p) for p in parts if p)
        return " ".join(written)


HERMES = ToolFormat(
    markers=("<tool_call>",),
    lead=re.compile(r"\s*"),
    tail="</tool_call>",
    closed=True,
    spans=(("<tool_call>", "</tool_call>"),),
    signs=("<tool_call>",),
    unlike=("<function=", "<arg_key>"),
    opening="<tool_call>",
    first="\n",
    end="\n</tool_call>",
    between="\n<tool_call>\n",
)
LLAMA = ToolFormat(
    markers=("<|python_tag|>",),
    lead=re.compile(r"\s*"),
    tail=";",
    spans=(("<|python_tag|>", "<|eot_id|>"), ('{"name": "', "<|eot_id|>")),  # up to the end
    signs=("<|python_tag|>", '"parameters": dictionary of argument name and its value'),
    key="parameters",
    bare=True,
    between="; ",
)
MISTRAL = ToolFormat(
    markers=("[TOOL_CALLS]",),
    lead=re.compile(r"\s*\[?\s*"),
    tail="]",
    spans=(("[TOOL_CALLS]", "</s>"),),
    signs=("[TOOL_CALLS]",),
    listed=True,
    opening="[TOOL_CALLS]",
    first=" [",
    between=", ",
    closing="]",
)
MISTRAL_NAMED = ToolFormat(
    markers=("[TOOL_CALLS]",),
    lead=re.compile(r"\s*(?P<name>[\w.\-]*)\s*(?:\[[\w\[\]]*)?\s*"),
    tail="",
    spans=(("[TOOL_CALLS]", "</s>"),),
    signs=("[ARGS]",),
    named=True,
    opening="[TOOL_CALLS]",
    between="[TOOL_CALLS]",
)
FORMATS = (HERMES, MISTRAL_NAMED, MISTRAL, LLAMA)  # in the order in which their signs are looked for
_WITHIN = ("[ARGS]", "[CALL_ID]")


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches, if it is known here."""

    def has(signs: tuple[str, ...]) -> bool:
        return any(sign in template for sign in signs)

    return next((found for found in FORMATS if has(found.signs) and not has(found.unlike)), None)
