"""Many clients at once over real sockets: who stays gets what they would get alone, who leaves costs nothing.

Runs on a tiny model always, and on the embedded model in float32 where its weights are installed.
"""

import asyncio
import gc
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from scripted import loopback
from tiny import tiny_base, tiny_correction, tiny_lora
from trimtab.server.app import create_app
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.engine import Engine
from trimtab.server.model.base import Base, load_base
from trimtab.steering.bank import Bank
from trimtab.steering.gate import Gate

CLIENTS = 64
CONFIG = EngineConfig(slots=16, step_tokens=128, max_model_len=256, max_queue=256)
WORDS = ("river", "lamp", "piano", "winter", "bridge", "market", "dragon")
STEERINGS: list[dict[str, Any]] = [
    {},
    {"correction": "c0", "tau": 1.0},
    {"correction": "gated", "budget": {"max_share": 0.5}},
    {"correction": "c1", "tau": 2.0, "mode": "shadow"},
    {"correction": "always"},
    {"correction": "contrast", "tau": 1.0, "negative_prompt": "Say nothing."},
    {"corrections": {"c0": 0.5, "c1": 1.0}, "gate": "margin", "tau": -0.5},
]


class Server(NamedTuple):
    url: str
    engine: Engine
    core: Core


@pytest.fixture(scope="module", params=["tiny", pytest.param("demo", marks=pytest.mark.model)])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    base: Base = tiny_base() if request.param == "tiny" else load_base("demo", dtype="float32", device="cpu")
    bank = Bank(base.hidden, "cpu")
    for i, scale in enumerate((1.0, 0.3)):
        correction = tiny_correction(base, f"c{i}", seed=i)
        correction.B.mul_(scale)
        bank.add(correction)
    size = 0.3 if request.param == "tiny" else 0.03
    bank.add(tiny_lora(base, "gated", size=size))
    bank.add(tiny_lora(base, "always", seed=1, gate=Gate("always"), size=size))
    engine = Engine(base, bank, CONFIG)
    with loopback(create_app(engine, base, bank), engine) as url:
        yield Server(url, engine, engine._core)


def body(i: int) -> dict[str, Any]:
    """Client i's request: every tier, mixed sampling, every other one greedy."""
    word = WORDS[i % len(WORDS)]
    greedy = {"temperature": 0}
    sampled = {
        "temperature": 0.9,
        "top_p": 0.9,
        "seed": i,
        "presence_penalty": 0.3,
        "logprobs": True,
        "top_logprobs": 3,
    }
    steering = STEERINGS[i // 3 % len(STEERINGS)]
    return {
        "model": "",
        "messages": [{"role": "user", "content": f"Write one sentence, number {i}, about a {word}."}],
        "max_tokens": 60 if leaves(i) else 12 + i % 7,
        "min_tokens": 3,
        "stream": True,
        "steering": {**steering, "report": "tokens"},
        **(greedy if i % 2 == 0 else sampled),
    }


def leaves(i: int) -> bool:
    return i % 3 == 2


async def ask(client: httpx.AsyncClient, model: str, i: int) -> str | None:
    """The streamed text; None for a client that leaves after its first tokens."""
    text, chunks = "", 0
    async with client.stream("POST", "/v1/chat/completions", json={**body(i), "model": model}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            chunks += 1
            text += chunk["choices"][0]["delta"].get("content") or ""
            if leaves(i) and chunks == 3:
                return None
    return text


async def rush(server: Server) -> list[str | None]:
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        return list(await asyncio.gather(*(ask(client, model, i) for i in range(CLIENTS))))


async def one_by_one(server: Server, clients: list[int]) -> list[str | None]:
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        return [await ask(client, model, i) for i in clients]


async def settle(server: Server) -> None:
    """Wait until the aborts of those who left have been applied."""
    for _ in range(600):
        if not server.core.busy and not server.engine._open:
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"still running: {server.engine.stats()}")


def live_tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


def test_64_streams_a_third_leaving_the_rest_as_if_alone(server: Server) -> None:
    staying = [i for i in range(CLIENTS) if not leaves(i)]
    first = asyncio.run(rush(server))
    asyncio.run(settle(server))
    before = live_tensors()
    second = asyncio.run(rush(server))
    asyncio.run(settle(server))
    assert live_tensors() <= before, "a rush leaves tensors behind"
    assert server.core.free_slots == CONFIG.slots
    assert not server.core.running + server.core.waiting
    assert [first[i] for i in staying] == [second[i] for i in staying]
    greedy = [i for i in staying if i % 2 == 0]
    assert [first[i] for i in greedy] == asyncio.run(one_by_one(server, greedy))
    assert all(first[i] for i in staying)
