"""OpenAI's own client for Python along its ordinary paths: a script for any version of it, without pytest and torch.

TRIMTAB_BASE_URL=... TRIMTAB_API_KEY=... python official.py  ->  {"version": "3.57.0", "chats": "ok", ...}
"""

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

SETTINGS: Any = {"base_url": os.environ["TRIMTAB_BASE_URL"], "api_key": os.environ.get("TRIMTAB_API_KEY", "none")}
MESSAGES: Any = [{"role": "user", "content": "Is it raining in Ulm?"}]
SCHEMA = {
    "type": "object",
    "properties": {"rain": {"type": "boolean"}, "sky": {"enum": ["grey", "blue"]}},
    "required": ["rain", "sky"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "look", "description": "Look up.", "parameters": SCHEMA}}

client = OpenAI(**SETTINGS, max_retries=0)
model = os.environ.get("TRIMTAB_MODEL") or client.models.list().data[0].id
SEEDED = {"seed": 1}
chat: Any = {"model": model, "messages": MESSAGES, "max_tokens": 12, "seed": 1}


def models() -> None:
    listed = [entry.id for entry in client.models.list()]
    assert model in listed
    found = client.models.retrieve(listed[-1])
    assert (found.id, found.owned_by) == (listed[-1], "trimtab")


def chats() -> None:
    answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert choice.finish_reason in ("stop", "length")
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content or [])
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= chat["max_tokens"]
    assert answer.usage.prompt_tokens_details is not None


def stream() -> None:
    whole = client.chat.completions.create(**chat)
    chunks = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def stream_helper() -> None:
    """The client's own accumulator, which agents build on. It raises for an answer that max_tokens cut."""
    text = client.chat.completions.create(**chat).choices[0].message.content or ""
    stop = next(character for character in text if character.isascii())
    with client.chat.completions.stream(**chat, stop=stop) as opened:
        for _ in opened:
            pass
        assert opened.get_final_completion().choices[0].message.role == "assistant"


def asynchronous() -> None:
    async def main() -> str:
        async with AsyncOpenAI(**SETTINGS) as other:
            opened = await other.chat.completions.create(**chat, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in opened])

    assert asyncio.run(main()) == client.chat.completions.create(**chat).choices[0].message.content


def completions() -> None:
    ask: Any = {"model": model, "prompt": ["It rains", "It snows"], "max_tokens": 8, "seed": 1}
    answer = client.completions.create(**ask, n=2, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].logprobs is not None
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**ask, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in answer.choices}


def errors() -> None:
    code = None
    try:
        client.chat.completions.create(**chat | {"model": "no-such-model"})
    except openai.NotFoundError as error:
        code = error.code
    assert code == "model_not_found"


def json_schema() -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(**chat | {"max_tokens": 400}, response_format=wanted)
    told = json.loads(answer.choices[0].message.content or "")
    assert set(told) == {"rain", "sky"}
    assert told["sky"] in ("grey", "blue")


def tools() -> None:
    """Required, then the call's answer goes back."""
    ask = chat | {"max_tokens": 600}
    answer = client.chat.completions.create(**ask, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    call: Any = (choice.message.tool_calls or [])[0]
    assert call.function.name == "look"
    assert set(json.loads(call.function.arguments)) == {"rain", "sky"}
    back: Any = [*MESSAGES, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "It pours."}]
    assert client.chat.completions.create(**ask | {"messages": back}, tools=[TOOL], tool_choice="none").choices


def tools_auto() -> None:
    """The model may call or not; either way the answer is one of the two."""
    choice = client.chat.completions.create(**chat, tools=[TOOL]).choices[0]
    assert (choice.finish_reason == "tool_calls") == bool(choice.message.tool_calls)


def tools_stream() -> None:
    ask = chat | {"max_tokens": 600, "parallel_tool_calls": False}
    named: Any = {"type": "function", "function": {"name": "look"}}
    whole = client.chat.completions.create(**ask, tools=[TOOL], tool_choice=named)
    name, arguments, ids = "", "", set()
    for chunk in client.chat.completions.create(**ask, tools=[TOOL], tool_choice=named, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or []:
            assert piece.index == 0
            ids |= {piece.id} - {None}
            name += (piece.function and piece.function.name) or ""
            arguments += (piece.function and piece.function.arguments) or ""
    call: Any = (whole.choices[0].message.tool_calls or [])[0]
    assert (name, arguments, len(ids)) == (call.function.name, call.function.arguments, 1)


def responses() -> None:
    answer = client.responses.create(
        model=model, input="Is it raining?", instructions="Be brief.", max_output_tokens=16
    )
    assert answer.status in ("completed", "incomplete")
    assert answer.usage is not None
    assert answer.usage.output_tokens > 0
    assert isinstance(answer.output_text, str)


def responses_stream() -> None:
    with client.responses.stream(model=model, input="Is it raining?", max_output_tokens=16) as opened:
        kinds = [event.type for event in opened]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    text = ""
    for event in client.responses.create(model=model, input="Is it raining?", max_output_tokens=16, stream=True):
        text += event.delta if event.type == "response.output_text.delta" else ""
        whole = event.response.output_text if event.type in ("response.completed", "response.incomplete") else None
    assert whole == text


def responses_json_schema() -> None:
    wanted: Any = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}
    answer = client.responses.create(
        model=model, input="Is it raining?", max_output_tokens=400, text=wanted, extra_body=SEEDED
    )
    assert set(json.loads(answer.output_text)) == {"rain", "sky"}


def responses_tools() -> None:
    tool: Any = {"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}
    answer = client.responses.create(
        model=model,
        input="Is it raining?",
        max_output_tokens=600,
        tools=[tool],
        tool_choice="required",
        extra_body=SEEDED,
    )
    call: Any = next(item for item in answer.output if item.type == "function_call")
    assert set(json.loads(call.arguments)) == {"rain", "sky"}


PATHS: list[Callable[[], None]] = [
    models, chats, stream, stream_helper, asynchronous, completions, errors, json_schema, tools, tools_auto,
    tools_stream, responses, responses_stream, responses_json_schema, responses_tools,
]  # fmt: skip


def told(path: Callable[[], None]) -> str:
    try:
        path()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "ok"


if __name__ == "__main__":
    print(json.dumps({"version": openai.__version__} | {path.__name__: told(path) for path in PATHS}))
