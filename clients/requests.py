"""What is sent to the server: the one request builder, shared by both clients.

Invariant: what the caller did not set, or set to None, is not sent; `extra` goes as it is, null included. Here is
checked only what no request can say; values are checked by the server.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from pydantic import BaseModel
from pydantic.errors import PydanticUserError

from trimtab.clients.options import Budget, Extra, Messages, Options, Prompt, ResponseOptions, Steer, Steering, Text
from trimtab.errors import InvalidRequest

# What a correction's folder may hold that the server reads: its own, or a PEFT adapter's.
CORRECTION_FILES = (
    ("correction.json", "correction.safetensors"),
    ("correction.json", "adapter_config.json", "adapter_model.safetensors"),
    ("adapter_config.json", "adapter_model.safetensors"),
    ("correction.json",),  # a contrast; the server refuses what lacks a file
)


class Call(NamedTuple):
    """One HTTP request, relative to the base URL."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    body: dict[str, Any] | None = None
    files: dict[str, bytes] | None = None  # instead of a body: a form's parts
    admin: bool = False  # sent with the admin key, where there is one
    root: bool = False  # relative to the server instead: /tokenize and kin stand beside /v1


def list_models() -> Call:
    return Call("GET", "/models")


def get_model(name: str) -> Call:
    return Call("GET", f"/models/{_segment(name, 'model')}")


def chat(messages: Messages, model: str | None, steering: Steer, options: Options, *, stream: bool) -> Call:
    """A chat request. messages: a string, or OpenAI's list of {role, content}."""
    subject = {"messages": _list_messages(messages)}
    body = _body(subject, model, steering, _known(options, Options))
    return Call("POST", "/chat/completions", _streamed(stream, usage=True) | body)


def complete(prompt: Prompt, model: str | None, steering: Steer, options: Options, *, stream: bool) -> Call:
    """A completion request. prompt: text or token ids, or a batch of either."""
    body = _body({"prompt": prompt}, model, steering, _known(options, Options))
    return Call("POST", "/completions", _streamed(stream, usage=True) | body)


def respond(asked: Messages, model: str | None, steering: Steer, options: ResponseOptions, *, stream: bool) -> Call:
    """A request to /v1/responses. asked: a string, or OpenAI's list of input items."""
    subject = {"input": asked if isinstance(asked, str) else _list_messages(asked, "input")}
    body = _body(subject, model, steering, _known(options, ResponseOptions))
    return Call("POST", "/responses", _streamed(stream) | body)


def score(prompt: Text, completion: Text, model: str | None, steering: Steer, extra: Extra) -> Call:
    """Teacher-forced: a receipt for each token of the completion."""
    subject = {"prompt": prompt, "completion": completion}
    return Call("POST", "/steering/score", _body(subject, model, steering, _set(extra=extra)))


def score_chat(messages: Messages, completion: Text, model: str | None, steering: Steer, extra: Extra) -> Call:
    """The same after a chat."""
    subject = {"messages": _list_messages(messages), "completion": completion}
    return Call("POST", "/steering/score", _body(subject, model, steering, _set(extra=extra)))


def tokenize(text: Messages, model: str | None, special: bool | None, extra: Extra) -> Call:
    """vLLM's shape. text: a string as it is, or messages, which the chat template renders."""
    subject = {"prompt": text} if isinstance(text, str) else {"messages": _list_messages(text)}
    options = _set(add_special_tokens=special, extra=extra)
    return Call("POST", "/tokenize", _body(subject, model, None, options), root=True)


def detokenize(tokens: Sequence[int], model: str | None) -> Call:
    return Call("POST", "/detokenize", _body({"tokens": list(tokens)}, model, None, {}), root=True)


def list_corrections() -> Call:
    return Call("GET", "/corrections")


def get_correction(name: str) -> Call:
    return Call("GET", f"/corrections/{_segment(name, 'correction')}")


def add_correction(name: str, path: str) -> Call:
    """path: a folder on the server's machine, or a model hub's id."""
    return Call("POST", "/corrections", _body({"name": name, "path": path}, None, None, {}), admin=True)


def upload_correction(folder: str | Path, name: str | None) -> Call:
    """The files of a folder on this machine. name: the folder's own, unless given."""
    folder = Path(folder).resolve()
    name = folder.name if name is None else name
    if not name:
        raise InvalidRequest("name is empty: give the correction one, or None for its folder's", "name")
    for names in CORRECTION_FILES:
        try:
            files = {file: (folder / file).read_bytes() for file in names}
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InvalidRequest(f"{folder} cannot be read: {error}", "folder") from error
        return Call("POST", "/corrections", {"name": name}, files, admin=True)
    wanted = ", nor ".join(" and ".join(names) for names in CORRECTION_FILES)
    raise InvalidRequest(f"{folder} holds no correction: neither {wanted}", "folder")


def delete_correction(name: str) -> Call:
    return Call("DELETE", f"/corrections/{_segment(name, 'correction')}", admin=True)


def _segment(name: str, field: str) -> str:
    """A name as one part of a path."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        raise InvalidRequest(f"{name!r} is not the name of a {field}", field)
    return quote(name, safe="")


def _list_messages(messages: Messages, field: str = "messages") -> list[Mapping[str, Any] | BaseModel]:
    listed = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if not isinstance(listed, Sequence) or not all(isinstance(message, Mapping | BaseModel) for message in listed):
        raise InvalidRequest(f"{field} must be a string, or a list of {{role, content}}", field)
    return list(listed)


def _streamed(stream: bool, usage: bool = False) -> dict[str, Any]:
    """usage: the endpoint tells it at a stream's end when asked to."""
    return {} if not stream else {"stream": True} | ({"stream_options": {"include_usage": True}} if usage else {})


_ELSEWHERE = {
    "timeout": "use client.with_options(timeout=...)",
    "stream": "use stream_chat, stream_complete or stream_respond",
}


def _known(options: Options | ResponseOptions, kind: type) -> Options | ResponseOptions:
    """The options, all of which are known: a server would ignore a misspelled one, and answer without it."""
    known = list(kind.__annotations__)
    for name in options:
        if name in _ELSEWHERE:
            raise InvalidRequest(f"{name} is no option here: {_ELSEWHERE[name]}", name)
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f": did you mean {near[0]}?" if near else ":"
            raise InvalidRequest(
                f"{name} is no option here{meant} further keys of the body go into extra={{...}}", name
            )
    return options


def _body(
    subject: Mapping[str, Any],
    model: str | None,
    steering: Steer,
    options: Options | ResponseOptions | Mapping[str, Any],
) -> dict[str, Any]:
    rest = _set(**dict(options))
    extra = rest.pop("extra", {})
    if not isinstance(extra, Mapping):
        raise InvalidRequest(f"extra must be a mapping of further body keys, not {type(extra).__name__}", "extra")
    if "stream" in extra:
        raise InvalidRequest(f"stream cannot go into extra: {_ELSEWHERE['stream']}", "stream")
    for key, wrap in (("response_format", _chat_format), ("text", _response_format)):
        if isinstance(rest.get(key), type):
            rest[key] = wrap(_schema(rest[key], key))
    body = {**({} if model is None else {"model": model}), **subject, **rest}
    if steering is not None:
        body["steering"] = _steering(steering)
    body |= extra
    return {key: _sendable(key, value) for key, value in body.items()}


def _sendable(key: str, value: Any) -> Any:
    """A value of the body, without pydantic models. Raises InvalidRequest for what JSON cannot say."""
    try:
        plain = _plain(value)
        json.dumps({key: plain}, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{key} cannot be sent as JSON: {error}", str(key)) from error
    return plain


def _plain(value: Any) -> Any:
    """Pydantic models as JSON has them, at any depth: a conversation goes on with what an answer held."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _steering(steering: Steer) -> dict[str, Any]:
    chosen = Steering(correction=steering) if isinstance(steering, str) else steering
    if not isinstance(chosen, Steering) or not isinstance(chosen.budget, Budget | None):
        raise InvalidRequest("steering must be a correction's name or a Steering, its budget a Budget", "steering")
    told = _set(**vars(chosen))
    return told if chosen.budget is None else told | {"budget": _set(**vars(chosen.budget))}


def _schema(kind: Any, field: str) -> dict[str, Any]:
    """A pydantic class as a named JSON schema."""
    try:
        if not issubclass(kind, BaseModel):
            raise TypeError("it is no pydantic model")
        return {"name": kind.__name__, "schema": _closed(kind.model_json_schema()), "strict": True}
    except (TypeError, PydanticUserError) as error:
        raise InvalidRequest(f"{field}: no JSON schema can be made of {kind.__name__}: {error}", field) from error


def _closed(schema: Any) -> Any:
    """The schema with every object's keys required and no others allowed, as OpenAI's strict mode asks."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed |= {"additionalProperties": False, "required": list(closed["properties"])}
    return closed


def _chat_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema}


def _response_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"format": {"type": "json_schema", **schema}}


def _set(**fields: Any) -> dict[str, Any]:
    """What was set."""
    return {key: value for key, value in fields.items() if value is not None}
