"""How tools and their calls reach a model: by its own chat template, or, where that has no words for them, by ours.

Invariant: nothing that a chat says of tools is left out of the prompt. A template whose way to write calls is not
known here counts as one without: what its model would write could not be read.

    template = ToolTemplate(tokenizer);  messages, extra = template.apply(messages, tools)
"""

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trimtab.server.tools.formats import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, format_of

Message = Mapping[str, Any]

_PROBE = "probe_of_the_template"
_INTRODUCTION = """\
You can call functions, one or several, when that helps to answer. These are their signatures, as JSON:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as a JSON object between <tool_call> tags, and nothing after it:
<tool_call>
{{"name": <function's name>, "arguments": <object of arguments>}}
</tool_call>
What it returned comes back to you between <tool_response> tags."""


class ToolTemplate:
    """Of one tokenizer. `format` is how its model is told to write calls."""

    def __init__(self, tokenizer: Any) -> None:
        found = format_of(str(getattr(tokenizer, "chat_template", None) or ""))
        self._native = found is not None and _shows_tools(tokenizer.apply_chat_template)
        self.format = found if found is not None and self._native else HERMES

    def apply(self, messages: Sequence[Message], tools: Sequence[Message]) -> tuple[list[Message], dict[str, Any]]:
        """-> the messages to render, and what else the template is to be given."""
        if not self._native:
            return _in_words(messages, tools), {}
        if self.format in (MISTRAL, MISTRAL_NAMED):
            messages = [_with_short_ids(message) for message in messages]
        if self.format is LLAMA:
            messages = list(_one_by_one(messages))
        return list(messages), {"tools": list(tools)} if tools else {}


def _shows_tools(render: Callable[..., Any]) -> bool:
    """Whether a tool's name is in what the template makes of it."""
    function = {"name": _PROBE, "description": "A probe.", "parameters": {"type": "object", "properties": {}}}
    messages = [{"role": "user", "content": "hi"}]
    try:
        return _PROBE in str(render(messages, tools=[{"type": "function", "function": function}], tokenize=False))
    except Exception:  # templates speak through errors of any kind
        return False


def _in_words(messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
    """The chat as one of system, user and assistant, in Hermes' format. Without tools or calls it stays as it is."""
    written: list[Message] = []
    for is_result, turn in itertools.groupby(messages, _is_result):
        if is_result:  # results of one turn are one message
            results = [f"<tool_response>\n{message['content']}\n</tool_response>" for message in turn]
            written.append({"role": "user", "content": "\n".join(results)})
        else:
            written += map(_with_calls_in_words, turn)
    if not tools:
        return written
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(tools=lines)
    if written[0]["role"] == "system":
        return [{**written[0], "content": f"{written[0]['content']}\n\n{introduction}"}, *written[1:]]
    return [{"role": "system", "content": introduction}, *written]


def _is_result(message: Message) -> bool:
    return bool(message["role"] == "tool")


def _with_calls_in_words(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [_write_call(call["function"]) for call in message["tool_calls"]]
    text = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {"role": message["role"], "content": text}


def _write_call(function: Message) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _one_by_one(messages: Sequence[Message]) -> Iterator[Message]:
    """Llama's templates refuse several calls in one message: each call, then what it returned.

    Calls that share an id, or have none, take their results in turn. What no call takes comes after the last of them.
    """
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            yield message
            continue
        results: dict[str | None, deque[Message]] = {}  # by the call's id
        while rest and _is_result(rest[0]):
            result = rest.popleft()
            results.setdefault(result.get("tool_call_id"), deque()).append(result)
        for call in calls:
            yield {**message, "tool_calls": [call]}
            if found := results.get(call.get("id")):
                yield found.popleft()
        yield from itertools.chain.from_iterable(results.values())


def _with_short_ids(message: Message) -> Message:
    """Mistral's templates insist on ids of nine letters and digits."""
    changed: dict[str, Any] = {}
    if message.get("tool_call_id"):
        changed["tool_call_id"] = _short(message["tool_call_id"])
    if message.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": _short(call.get("id", ""))} for call in message["tool_calls"]]
    return {**message, **changed}


def _short(name: str) -> str:
    if len(name) == 9 and name.isalnum():
        return name
    return hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:9]
