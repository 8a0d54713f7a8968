"""The tools of one chat: which may be called, what that makes of its generation, and how its calls are read.

Invariant: where a call must come, or the format has a marker that opens one, the model can write nothing but a call
that fits a tool's schema, and its arguments are told as they come. Where a call is an object without a marker, an
answer may be such an object too: the model is free, and a call is told once it is complete. But a tool that is strict
is worth more than that answer: a text that begins as an object is a call then.

    use = ToolUse.of(body, form, pieces);  await generation.constrain(use.structure);  reader = use.reader()
"""

import json
from dataclasses import dataclass, replace

from trimtab.errors import InvalidRequest
from trimtab.server.catalogue import Chosen
from trimtab.server.engine.json_schema import read_schema
from trimtab.server.engine.pieces import Pieces
from trimtab.server.engine.request import TOOL_CALLS, Structure
from trimtab.server.engine.slots import NO_ADAPTER
from trimtab.server.engine.structure import WHITESPACE
from trimtab.server.schema import ChatBody
from trimtab.server.stream import TextRules
from trimtab.server.tools.body import NamedTool, Tool
from trimtab.server.tools.formats import Callee, ToolFormat
from trimtab.server.tools.reader import CallReader


@dataclass(frozen=True)
class ToolUse:
    """The tools that may be called, at least one."""

    form: ToolFormat
    callees: tuple[Callee, ...]
    must: bool  # one has to be called
    several: bool  # more than one call may come
    tokens: dict[str, int]  # special ones that a call may hold, by name
    answer: str | None  # the JSON schema of an answer that is no call

    @classmethod
    def of(cls, body: ChatBody, form: ToolFormat, pieces: Pieces) -> "ToolUse | None":
        """None where nothing may be called. Raises InvalidRequest."""
        tools, must = body.callable_tools()
        if not tools:
            return None
        places = {tool.function.name: i for i, tool in enumerate(body.tools or [])}  # no two have one name
        callees = tuple(_callee(tool, f"tools[{places[tool.function.name]}].function") for tool in tools)
        named = isinstance(body.tool_choice, NamedTool)  # whoever names one means one call of it
        several = not named if body.parallel_tool_calls is None else body.parallel_tool_calls
        return cls(form, callees, must, several, form.tokens(pieces), None if must else _answer(body))

    @property
    def structure(self) -> Structure | None:
        """What the text must be."""
        if self.must or self.answer is not None:
            calls = self.form.grammar(self.callees, self.several, False, self.tokens, self.answer)
            return Structure("grammar", calls)
        if not self._held:
            return None
        calls = self.form.grammar(self.callees, self.several, True, self.tokens)
        return Structure("grammar", calls, lazy=self.form.markers, braced=self.form.bare)

    @property
    def schemas(self) -> list[tuple[Structure, str]]:
        """Each tool's alone, and the field that holds it: to tell which of them cannot be followed."""
        return [(Structure("json_schema", json.dumps(callee.constraint())), callee.field) for callee in self.callees]

    @property
    def _held(self) -> bool:
        """Whether what begins as a call can only be one that fits."""
        free = self.form.bare and not any(callee.strict for callee in self.callees)
        return self.must or self.answer is not None or not free

    def relaxed(self) -> "ToolUse | None":
        """With any object for arguments, except for strict tools; None where that is no change, or a call must come.

        For schemas that no grammar can follow: tools of which they come are as good as others' that are not called.
        """
        plain = tuple(callee if callee.strict else replace(callee, parameters={}) for callee in self.callees)
        return None if self.must or plain == self.callees else replace(self, callees=plain)

    def reader(self) -> CallReader:
        """A new one, for one choice."""
        names = {callee.name for callee in self.callees}
        return CallReader(self.form, names, eager=self._held, several=self.several)

    def show(self, rules: TextRules) -> TextRules:
        """Let the special tokens in a call be text, as the reader must see them. Where nothing but calls may come, no
        stop string counts: it would only break them."""
        stop = () if self.must else rules.stop
        return replace(rules, keep=frozenset(self.tokens.values()), stop=stop)

    def spare(self, chosen: Chosen) -> Chosen:
        """Let no call be steered, as the budget has it by default, though its words for calls are another format's.

        An adapter that is always on acts in calls too: it would be another row if it did not.
        """
        budget = chosen.steering.budget
        if budget.spans != TOOL_CALLS or self.form.spans == TOOL_CALLS or chosen.rule.adapter != NO_ADAPTER:
            return chosen
        return chosen._replace(steering=replace(chosen.steering, budget=replace(budget, spans=self.form.spans)))


def _callee(tool: Tool, at: str) -> Callee:
    """A tool for the grammar. Raises InvalidRequest where it is strict and its schema cannot be kept."""
    strict, field = bool(tool.function.strict), f"{at}.parameters"
    try:
        schema = read_schema(json.dumps(tool.schema_of_arguments), lenient=not strict)
    except ValueError as error:
        raise InvalidRequest(f"{field}, of a strict tool: {error}", field) from error
    return Callee(tool.function.name, schema, strict, field)


def _answer(body: ChatBody) -> str | None:
    """The JSON schema that the body has for its answer, if it has one; what is none is refused as it is alone."""
    asked = body.structure()
    if asked is None:
        return None
    structure, field = asked
    if structure.kind not in ("json_schema", "json_object"):
        message = f"{field} and tools that may be called do not go together: send tool_choice none, or leave one out"
        raise InvalidRequest(message, field)
    schema = json.loads(structure.text or '{"type": "object"}')
    own = schema if isinstance(schema, dict) else {}
    return json.dumps({"x-guidance": {"whitespace_pattern": WHITESPACE}, **own})
