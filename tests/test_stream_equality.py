"""A stream's pieces, joined, are the whole answer byte for byte: emoji, CJK, and stop strings that straddle tokens.

TRIMTAB_STREAMS sets how many prompts the embedded model gets; the others get 200 always.
"""

import asyncio
import json
import os
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from scripted import ScriptedEngine, in_memory, loopback, say
from tiny import tiny_base, tiny_correction
from trimtab.server.app import create_app
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.engine import Engine
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request
from trimtab.server.model.base import load_base
from trimtab.steering.bank import Bank

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
WORDS = (
    "river ",
    "née ",
    "漢字",
    "かな",
    "한글 ",
    "😀",
    "👩‍👩‍👧",
    "🇯🇵",
    "e\u0301",
    "\n",
    "Ω ",
    "12 ",
    "𝔘",
    "\u200d",
    "– ",
)


@pytest.mark.parametrize("path", PATHS)
def test_what_ends_a_line_for_some_readers_ends_no_event(path: str) -> None:
    with in_memory(ScriptedEngine(say("a\u2028b\u2029c\x85d"))) as ask:
        told = ask("POST", path, json=body_for(path, "hi", 9, stream=True))
    lines = [line.removeprefix("data: ") for line in told.text.splitlines() if line.startswith("data: {")]
    found = "".join(json.dumps(json.loads(line), ensure_ascii=False) for line in lines)
    assert set("\u2028\u2029\x85") <= set(found)


def some_text(rng: random.Random, most: int = 12) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def a_part(rng: random.Random, text: str) -> str:
    """Some characters from the middle of a text: its tokens begin and end elsewhere."""
    start = rng.randrange(len(text))
    return text[start : start + rng.randint(1, 5)]


def body_for(path: str, prompt: str, tokens: int, **fields: Any) -> dict[str, Any]:
    if path == "/v1/completions":
        return {"prompt": prompt, "max_tokens": tokens, **fields}
    if path == "/v1/responses":
        return {"input": prompt, "max_output_tokens": tokens, **fields}
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, **fields}


def whole_text(path: str, answer: dict[str, Any]) -> str:
    if path == "/v1/responses":
        return "".join(part["text"] for item in answer["output"] for part in item["content"])
    (choice,) = answer["choices"]
    return str(choice["text"] if path == "/v1/completions" else choice["message"]["content"])


def joined(path: str, stream: str) -> str:
    """The pieces of a stream, which must have ended well."""
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    if path == "/v1/responses":
        events = [json.loads(line) for line in lines]
        assert events[-1]["type"] in ("response.completed", "response.incomplete"), events[-1]
        return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert lines[-1] == "[DONE]"
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    return "".join(c["text"] if path == "/v1/completions" else c["delta"].get("content") or "" for c in choices)


def test_200_texts_that_split_characters_at_every_byte() -> None:
    """A model that says these texts, a byte a token: three of four tokens of an emoji are no character at all."""
    rng = random.Random(0)
    texts = [some_text(rng) for _ in range(200)]
    stops = [a_part(rng, text) if i % 4 else None for i, text in enumerate(texts)]

    def parrot(request: Request, index: int) -> list[Event]:
        seed = request.sampling.seed
        assert seed is not None
        return list(say(texts[seed])(request, index))

    stopped = 0
    with in_memory(ScriptedEngine(parrot)) as ask:
        for i, (text, stop) in enumerate(zip(texts, stops, strict=True)):
            path = PATHS[i % 3]
            body = body_for(path, "x", 100, seed=i, stop=stop)
            whole = whole_text(path, ask("POST", path, json=body).json())
            assert joined(path, ask("POST", path, json=body | {"stream": True}).text) == whole
            assert whole == (text if stop is None else text[: text.index(stop)])
            stopped += stop is not None
    assert stopped == 150


class Server(NamedTuple):
    url: str
    prompts: int
    tokens: int


@pytest.fixture(scope="module", params=["tiny", pytest.param("demo", marks=pytest.mark.model)])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    tiny = request.param == "tiny"
    base = tiny_base() if tiny else load_base("demo", dtype="float32", device="cpu")
    bank = Bank(base.hidden, "cpu")
    bank.add(tiny_correction(base, "bold"))
    engine = Engine(base, bank, EngineConfig(slots=16, max_model_len=256))
    with loopback(create_app(engine, base, bank), engine) as url:
        yield Server(url, 200 if tiny else int(os.environ.get("TRIMTAB_STREAMS", "9")), 10 if tiny else 16)


def test_random_prompts_through_the_engine(server: Server) -> None:
    rng = random.Random(1)
    prompts = [some_text(rng, 3) * 2 for _ in range(server.prompts)]
    limits = httpx.Limits(max_connections=16)

    async def compare(client: httpx.AsyncClient, i: int, stop_rng: random.Random) -> tuple[str, bool]:
        path = PATHS[i % 3]
        fields = {"temperature": 0.7, "seed": i, "model": "bold" if i % 2 else None}
        free = body_for(path, prompts[i], server.tokens, **fields)
        text = whole_text(path, (await client.post(path, json=free)).json())
        stop = a_part(stop_rng, text) if text and i % 4 else None
        body = free | {"stop": stop}
        whole = whole_text(path, (await client.post(path, json=body)).json())
        streamed = joined(path, (await client.post(path, json=body | {"stream": True})).text)
        assert streamed.encode() == whole.encode(), f"prompt {i}, stop {stop!r}"
        assert whole == (text if stop is None else text[: text.index(stop)]), f"prompt {i}, stop {stop!r}"
        return text, stop is not None

    async def main() -> list[tuple[str, bool]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
            return list(await asyncio.gather(*(compare(client, i, random.Random(i)) for i in range(server.prompts))))

    results = asyncio.run(main())
    assert sum(stopped for _, stopped in results) > server.prompts // 2
    assert any(not text.isascii() for text, _ in results)
