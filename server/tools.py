"""The tools of one chat: which may be called, what that makes of its generation, and how its calls are read.

Invariant: where a call must come, or the format has a marker that opens one, the model can write nothing but a call
that fits a tool's schema, and its arguments are told as they come. Elsewhere (an object without a marker) the model is
free, and a call is told once it is complete.

    use = ToolUse.of(body, form, pieces);  use.structure;  reader = use.reader()
"""

from dataclasses import dataclass, replace

from trimtab.server.catalogue import Chosen
from trimtab.server.pieces import Pieces
from trimtab.server.request import TOOL_CALLS, Structure
from trimtab.server.schema import ChatBody
from trimtab.server.slots import NO_ADAPTER
from trimtab.server.stream import TextRules
from trimtab.server.tool_formats import Callee, ToolFormat
from trimtab.server.tool_reader import CallReader


@dataclass(frozen=True)
class ToolUse:
    """The tools that may be called, at least one."""

    form: ToolFormat
    names: frozenset[str]
    tokens: dict[str, int]  # special ones that a call may hold, by name
    structure: Structure | None

    @classmethod
    def of(cls, body: ChatBody, form: ToolFormat, pieces: Pieces) -> "ToolUse | None":
        """None where nothing may be called. Raises InvalidRequest."""
        tools, must = body.callable_tools()
        if not tools:
            return None
        callees = [Callee(tool.function.name, tool.schema_of_arguments, bool(tool.function.strict)) for tool in tools]
        tokens = form.tokens(pieces)
        structure = None
        if must or not form.bare:
            lazy = () if must else form.markers
            grammar = form.grammar(callees, body.parallel_tool_calls is not False, bool(lazy), tokens)
            structure = Structure("grammar", grammar, lazy=lazy)
        return cls(form, frozenset(callee.name for callee in callees), tokens, structure)

    def reader(self) -> CallReader:
        """A new one, for one choice."""
        return CallReader(self.form, self.names, eager=self.structure is not None)

    def show(self, rules: TextRules) -> TextRules:
        """Let the special tokens in a call be text, as the reader must see them."""
        return replace(rules, keep=frozenset(self.tokens.values())) if self.tokens else rules

    def spare(self, chosen: Chosen) -> Chosen:
        """Let no call be steered, as the budget has it by default, though its words for calls are another format's.

        An adapter that is always on acts in calls too: it would be another row if it did not.
        """
        budget = chosen.steering.budget
        if budget.spans != TOOL_CALLS or self.form.spans == TOOL_CALLS or chosen.rule.adapter != NO_ADAPTER:
            return chosen
        return chosen._replace(steering=replace(chosen.steering, budget=replace(budget, spans=self.form.spans)))
