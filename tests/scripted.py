"""An engine that plays scripts instead of a model, and the two ways to talk to an app: in memory and over a socket.

engine = ScriptedEngine(lambda request, index: events_of("hello"))
with in_memory(engine) as ask: response = ask("POST", "/v1/completions", json={...})
with loopback(create_app(engine, ...), engine) as url: ...
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol

import httpx
import torch
import uvicorn
from fastapi import FastAPI

from tiny import VOCAB, tiny_tokenizer
from trimtab.server.app import create_app
from trimtab.server.drain import DrainingServer
from trimtab.server.engine.engine import EngineStats
from trimtab.server.engine.event import Event, Receipt
from trimtab.server.engine.request import Request, Structure
from trimtab.steering.adapter import Adapter, LoraLayer
from trimtab.steering.bank import Bank
from trimtab.steering.correction import BaseIdentity, ContrastCorrection, HeadCorrection, LoraCorrection
from trimtab.steering.gate import Gate

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
RECEIPT = Receipt(1.5, True, True, 65, 66, -2.0, -1.0, -0.5, -0.25, 1.5, 0.125, 1.25)

Script = Callable[[Request, int], Sequence[Event]]


def ids(text: str) -> list[int]:
    """One token a byte."""
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def event(request: Request, index: int, token: int | None, **fields: Any) -> Event:
    """An event with plausible numbers: the token itself and its neighbours are the alternatives."""
    top = (
        tuple(((token + k) % 256, -1.0 - k) for k in range(request.sampling.alternatives)) if token is not None else ()
    )
    values = {"logprob": -1.0, "top": top, "receipt": RECEIPT if token is not None else None, "finish": None} | fields
    return Event(request.id, index, token, **values)


def say(text: str, end: str = "stop") -> Script:
    """Every choice says the text, a byte a step; then end-of-text, or with "length" no more."""

    def script(request: Request, index: int) -> list[Event]:
        tokens = ids(text) + ([EOS] if end == "stop" else [])
        last = len(tokens) - 1
        return [
            event(request, index, token, finish=end if i == last else None, cached=3 if i == 0 else 0)
            for i, token in enumerate(tokens)
        ]

    return script


class AnyGrammar:
    """Of an engine that follows none: anything can be compiled, and nothing is kept."""

    def get(self, structure: Structure) -> None: ...

    def compile(self, structure: Structure, field: str) -> None: ...


class ScriptedEngine:
    """Plays a script for each choice, a step each, as soon as a request is submitted."""

    max_len = 200
    capacity = 64
    queue_tokens: int | None = None

    def __init__(self, script: Script, refusal: Exception | None = None) -> None:
        self.script, self.refusal = script, refusal
        self.requests: list[Request] = []
        self.aborted: list[tuple[str, int | None]] = []
        self.alive, self.beat = False, 0.0
        self.grammars = AnyGrammar()
        self.after_abort = threading.Event()

    def start(self, on_events: Callable[[list[Event]], None]) -> None:
        self.on_events, self.alive = on_events, True

    def submit(self, request: Request) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        choices = [list(self.script(request, index)) for index in range(request.n)]
        for step in range(max(map(len, choices), default=0)):
            self.on_events([events[step] for events in choices if step < len(events)])

    def close(self) -> None:
        """As the real one: whatever is open is aborted."""
        self.alive = False
        self.on_events([event(request, k, None, finish="abort") for request in self.requests for k in range(request.n)])

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append((request_id, index))
        self.after_abort.set()

    def stats(self) -> EngineStats:
        return EngineStats(2, 1, 3, 8, self.alive, time.monotonic() - self.beat)


def scripted_bank() -> Bank:
    """Two heads, a LoRA and the built-in contrast, of a base of eight numbers."""
    bank = Bank(8, "cpu")
    for name in ("brief", "polite"):
        gate = Gate(tau=0.75, calibration=((0.125, 2.0), (0.375, 1.0)) if name == "polite" else ())
        head = HeadCorrection(
            name=name, base=BASE.identity, gate=gate, strength=1.25, rank=4, top_k=10, hidden_scale=1.0, row_scale=1.0,
            A=torch.zeros(4, 8), B=torch.zeros(8, 4), b=torch.zeros(8),
        )  # fmt: skip
        bank.add(head)
    layers = {"model.layers.0.mlp.up_proj": LoraLayer(torch.zeros(2, 8), torch.zeros(16, 2), 2.0)}
    bank.add(LoraCorrection(name="tuned", base=BASE.identity, adapter=Adapter(layers, {})))
    bank.add(ContrastCorrection(name="contrast"))
    return bank


BASE: Any = SimpleNamespace(
    name="tiny", vocab=VOCAB, tokenizer=TOKENIZER, identity=BaseIdentity("tiny", "0123456789abcdef", "t", "c")
)


def scripted_app(engine: ScriptedEngine, **options: Any) -> FastAPI:
    engine_: Any = engine
    return create_app(engine_, BASE, scripted_bank(), **options)


class Ask(Protocol):
    def __call__(self, method: str, path: str, **request: Any) -> httpx.Response: ...


@contextmanager
def in_memory(engine: ScriptedEngine, **options: Any) -> Iterator[Ask]:
    """Requests to the app without a socket; each waits for the whole response."""
    app = scripted_app(engine, **options)
    with asyncio.Runner() as runner:
        lifespan = app.router.lifespan_context(app)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://trimtab")
        runner.run(lifespan.__aenter__())
        try:
            yield lambda method, path, **request: runner.run(client.request(method, path, **request))
        finally:
            runner.run(client.aclose())
            runner.run(lifespan.__aexit__(None, None, None))


@contextmanager
def loopback(app: FastAPI, engine: Any, drain: float = 5) -> Iterator[str]:
    """The app behind a real socket. -> its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = DrainingServer(uvicorn.Config(app, log_level="warning"), engine, drain)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
