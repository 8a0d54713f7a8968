"""200 clients whose connections break at random moments leave nothing behind: no slot, no task, no ticket."""

import asyncio
import json
import random
import threading
import time
from collections import Counter
from typing import Any

import httpx

from scripted import loopback
from tiny import tiny_base, tiny_correction
from trimtab.server.app import create_app
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.engine import Engine
from trimtab.steering.bank import Bank

CLIENTS, AT_ONCE = 200, 40
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
SLOTS = 8


def request_of(rng: random.Random) -> bytes:
    """An HTTP request that would take long."""
    path = rng.choice(PATHS)
    body: dict[str, Any] = {"stream": rng.random() < 0.6, "ignore_eos": True, "temperature": 0.8}
    body["model"] = rng.choice([None, "bold", "contrast"])
    prompt = "x" * rng.randint(1, 120)
    if path == "/v1/completions":
        body |= {"prompt": [prompt] * rng.choice([1, 3]), "n": rng.choice([1, 2]), "max_tokens": 200}
    elif path == "/v1/responses":
        body |= {"input": prompt}
    else:
        body |= {"messages": [{"role": "user", "content": prompt}]}
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def cut_off(host: str, port: int, seed: int) -> str:
    """Leave while sending, at once, after a while, or in the middle of an answer. -> which"""
    rng = random.Random(seed)
    reader, writer = await asyncio.open_connection(host, port)
    request = request_of(rng)
    how = rng.choice(["sending", "at once", "waiting", "reading"])
    if how == "sending":
        request = request[: rng.randrange(len(request))]
    writer.write(request)
    await writer.drain()
    if how == "waiting":
        await asyncio.sleep(rng.random() * 0.3)
    if how == "reading":
        with_something = asyncio.wait_for(reader.read(1), 1 + rng.random())
        try:
            await with_something
            await asyncio.sleep(rng.random() * 0.05)
        except TimeoutError:
            how = "waiting"  # a whole answer, or a place in the queue
    writer.transport.abort()
    return how


async def rush(host: str, port: int) -> Counter[str]:
    room = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> str:
        async with room:
            return await cut_off(host, port, seed)

    return Counter(await asyncio.gather(*map(one, range(CLIENTS))))


def test_200_clients_cut_off_at_random_moments() -> None:
    others = set(threading.enumerate())  # that other tests in this process have left
    base = tiny_base()
    bank = Bank(base.hidden, "cpu")
    bank.add(tiny_correction(base, "bold"))
    engine = Engine(base, bank, EngineConfig(slots=SLOTS, max_model_len=256, step_tokens=128))
    app = create_app(engine, base, bank)
    loops: list[asyncio.AbstractEventLoop] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        loops[:] = [asyncio.get_running_loop()]
        await app(scope, receive, send)

    tickets, core = app.state.service.tickets, engine._core

    def left() -> dict[str, int]:
        """What is still held."""
        return {
            "choices": core.running + core.waiting,
            "slots": SLOTS - core.free_slots,
            "requests": len(engine._open),
            "tickets": len(tickets._tickets),
            "tasks": len(asyncio.all_tasks(loops[0])),
        }

    with loopback(watched, engine) as url:  # type: ignore[arg-type]
        host, port = url.removeprefix("http://").split(":")
        assert httpx.get(f"{url}/health").status_code == 200
        wait_until(lambda: left()["tasks"] <= 2)
        before = left()
        how = asyncio.run(rush(host, int(port)))
        assert len(how) == 4, f"not every way was taken: {how}"
        wait_until(lambda: left() == before)
        assert left() == before, "something stayed behind"
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] <= 3
    assert not [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("trimtab")]


def wait_until(true: Any) -> None:
    """Or a minute has passed: what is false then, the caller asserts."""
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
