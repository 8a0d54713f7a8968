"""The typed events of a response, made from the chunks of a chat's only choice, and the response they add up to.

Invariant: `response` is what the events told: a whole answer is the last event's response, so a stream and a whole
answer are equal by construction. Every item that was added is done before the response ends, in order.

    writer = Writer(head);  writer.begin();  writer.take(chunk);  writer.end(usage)  ->  lists of events
"""

import secrets
import time
from collections.abc import Iterable
from typing import Any

from trimtab.server.telling import dumps

Event = dict[str, Any]


def encode(events: Iterable[Event]) -> bytes:
    """Server-sent events, with their names."""
    return "".join(f"event: {event['type']}\ndata: {dumps(event)}\n\n" for event in events).encode()


class Writer:
    """One response. head: its fields that the request settles."""

    def __init__(self, head: dict[str, Any]) -> None:
        self.response = head | {"status": "in_progress", "output": [], "usage": None}
        self._sequence = 0
        self._item: dict[str, Any] | None = None  # that is open: the last of the output
        self._call = -1  # the open function call's index among the chat's
        self._finish: str | None = None
        self._steering: dict[str, Any] | None = None
        self._receipts: list[Any] = []
        self._untold: list[Any] = []  # receipts that wait for the next delta
        self._logprobs: list[Any] = []  # those too

    def begin(self) -> list[Event]:
        return [
            self._event("response.created", response=self._now()),
            self._event("response.in_progress", response=self._now()),
        ]

    def take(self, chunk: dict[str, Any]) -> list[Event]:
        """The events of one chunk of a chat's choice."""
        steering = dict(chunk.get("steering") or {})
        receipts = steering.pop("tokens", [])
        self._receipts += receipts
        self._untold += receipts
        self._steering = steering or self._steering
        self._logprobs += (chunk.get("logprobs") or {}).get("content") or []
        self._finish = chunk["finish_reason"] or self._finish
        events: list[Event] = []
        if chunk["delta"].get("content"):
            events += self._text(chunk["delta"]["content"])
        for call in chunk["delta"].get("tool_calls") or []:
            events += self._arguments(call)
        return events

    def end(self, usage: dict[str, Any]) -> list[Event]:
        """The last events: the choice has ended."""
        cut = self._finish == "length"
        status = "incomplete" if cut else "completed"
        events = []
        telling = self._item is not None and self._item["type"] == "message" and (self._untold or self._logprobs)
        if telling or not self.response["output"]:
            events += self._text("")  # what was held back is told, and an answer without text is a message too
        events += self._close(status)
        details = {"reason": "max_output_tokens"} if cut else None
        self.response |= {"status": status, "incomplete_details": details, "usage": _usage(usage)}
        if not cut:
            self.response["completed_at"] = int(time.time())
        return [*events, self._event(f"response.{status}", response=self._now())]

    def fail(self, message: str, refused: bool) -> list[Event]:
        """The last event where the engine failed, or what was asked left no token. What was open stays incomplete."""
        if self._item is not None:
            self._item["status"] = "incomplete"
        code = "invalid_prompt" if refused else "server_error"  # the nearest of OpenAI's codes
        self.response |= {"status": "failed", "error": {"code": code, "message": message}}
        return [self._event("response.failed", response=self._now())]

    def _text(self, text: str) -> list[Event]:
        events = []
        if self._item is None or self._item["type"] != "message":
            if self._item is not None:
                self._logprobs = _last(self._logprobs, text)
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            message: dict[str, Any] = {
                "type": "message",
                "id": _new("msg"),
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
            events = self._open(message)
            events.append(self._part_event("response.content_part.added", part=part | {"logprobs": []}))
            message["content"].append(part)
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        part["logprobs"] += self._logprobs
        delta = self._part_event("response.output_text.delta", delta=text, logprobs=self._logprobs)
        self._logprobs = []
        return [*events, delta | self._told()]

    def _arguments(self, call: dict[str, Any]) -> list[Event]:
        """A part of a function call; with another index, a new one."""
        events, function = [], call.get("function") or {}
        self._logprobs = []  # a call has no place for them
        if self._item is None or self._item["type"] != "function_call" or call["index"] != self._call:
            self._call = call["index"]
            item = {"type": "function_call", "id": _new("fc"), "call_id": call["id"], "name": function["name"]}
            events = self._open(item | {"arguments": "", "status": "in_progress"})
        assert self._item is not None
        arguments = function.get("arguments") or ""
        if arguments:
            self._item["arguments"] += arguments
            delta = self._item_event("response.function_call_arguments.delta", delta=arguments)
            events.append(delta | self._told())
        return events

    def _open(self, item: dict[str, Any]) -> list[Event]:
        events = self._close("completed")
        self._item = item
        self.response["output"].append(item)
        added = item | ({"content": []} if item["type"] == "message" else {})
        return [*events, self._event("response.output_item.added", output_index=self._place, item=added)]

    def _close(self, status: str) -> list[Event]:
        """The open item is done."""
        item = self._item
        if item is None:
            return []
        if item["type"] == "message":
            part = item["content"][0]
            events = [
                self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"]),
                self._part_event("response.content_part.done", part=part),
            ]
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._item_event("response.function_call_arguments.done", **done)]
        item["status"] = status
        events.append(self._event("response.output_item.done", output_index=self._place, item=item))
        self._item = None
        return events

    @property
    def _place(self) -> int:
        """Of the open item in the output."""
        return len(self.response["output"]) - 1

    def _told(self) -> dict[str, Any]:
        """The receipts of a delta."""
        receipts, self._untold = self._untold, []
        return {"steering": {"tokens": receipts}} if receipts else {}

    def _now(self) -> dict[str, Any]:
        """The response as it stands."""
        now = self.response | {"output": list(self.response["output"])}
        if self._steering is None and not self._receipts:
            return now
        told = {"tokens": self._receipts} if self._receipts else {}
        return now | {"steering": (self._steering or {}) | told}

    def _part_event(self, kind: str, **fields: Any) -> Event:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> Event:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=self._place, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event


def _last(logprobs: list[Any], text: str) -> list[Any]:
    """Those of the tokens that write this text and what comes with it: the others ended the call before it.

    A text may come in pieces, all of whose tokens are here: so it begins at the last of them that can begin it."""
    written = [bytes(token["bytes"]) for token in logprobs]
    for first in range(len(written) - 1, -1, -1):
        if b"".join(written[first:]).startswith(text.encode()):
            return logprobs[first:]
    return []


def _new(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _usage(chat: dict[str, Any]) -> dict[str, Any]:
    """A chat's usage in this endpoint's words."""
    cached = chat["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": chat["total_tokens"],
    }
