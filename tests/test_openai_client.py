"""The official client against a real server on a loopback port, over a real engine with a tiny random model.

Its ordinary paths are those of official.py.
"""

import queue
from collections.abc import Iterator
from typing import Any, NamedTuple

import openai
import pytest
from openai import OpenAI

from scripted import loopback
from tiny import tiny_base, tiny_correction
from trimtab.server.app import create_app
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.engine import Engine, OnEvents
from trimtab.server.engine.event import Event
from trimtab.steering.bank import Bank

MESSAGES: Any = [{"role": "user", "content": "hi"}]


class Watched(Engine):
    """Keeps what ended, and counts the steps that brought something."""

    steps = 0
    ended: "queue.SimpleQueue[Event]"

    def start(self, on_events: OnEvents) -> None:
        self.ended = queue.SimpleQueue()

        def keep(events: list[Event]) -> None:
            self.steps += any(event.token is not None for event in events)
            for event in events:
                if event.finish is not None:
                    self.ended.put(event)
            on_events(events)

        super().start(keep)


class Served(NamedTuple):
    url: str
    engine: Watched


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    base = tiny_base()
    bank = Bank(base.hidden, base.device)
    bank.add(tiny_correction(base, "bold"))
    engine = Watched(base, bank, EngineConfig(slots=4, max_model_len=256))
    with loopback(create_app(engine, base, bank, api_keys=["secret"]), engine) as url:
        yield Served(url, engine)


@pytest.fixture
def url(served: Served) -> str:
    return served.url


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as opened:
        yield opened


def test_a_stream_is_the_whole_answer_in_pieces(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "bold", "messages": MESSAGES, "max_tokens": 30, "seed": 3, "logprobs": True}
    client.chat.completions.create(**ask | {"max_tokens": 1})  # so that both find the prompt in the cache, to the bit
    whole = client.chat.completions.create(**ask, top_logprobs=2)
    stream = client.chat.completions.create(**ask, top_logprobs=2, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert content == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    streamed = [e for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert streamed == logprobs.content
    assert all(len(entry.top_logprobs) == 2 for entry in streamed)
    joined = bytes(byte for entry in streamed for byte in entry.bytes or [])
    assert joined.decode("utf-8", "replace") == content


def test_seeds_reproduce_and_n_differs(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny-llama", "prompt": "once", "max_tokens": 12, "n": 3}
    first, again = (client.completions.create(**ask, seed=5, extra_body={"ignore_eos": True}) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3


def test_a_stop_string_ends_the_text(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny-llama", "prompt": "once", "max_tokens": 40, "temperature": 0}
    extra = {"ignore_eos": True}
    text = client.completions.create(**ask, extra_body=extra).choices[0].text
    stop = text[10:12]
    stopped = client.completions.create(**ask, stop=stop, extra_body=extra).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")


def test_steering_is_reported_and_strength_zero_is_the_base(client: OpenAI) -> None:
    ask: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 20, "temperature": 0}

    def steered(model: str, **steering: Any) -> Any:
        body = {"ignore_eos": True, "steering": {"report": "tokens"} | steering}
        return client.chat.completions.create(model=model, **ask, extra_body=body).choices[0]

    bold, off, base = steered("bold"), steered("bold", strength=0), steered("tiny-llama")
    assert bold.steering["fired"] > 0
    assert len(bold.steering["tokens"]) == bold.steering["steps"] == 20
    assert sum(receipt["flip"] for receipt in bold.steering["tokens"]) == bold.steering["flips"]
    assert off.message.content == base.message.content
    assert (off.steering["fired"], base.steering["correction"]) == (0, None)


def test_max_tokens_beyond_the_room_is_clamped(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny-llama", prompt=[1] * 250, max_tokens=1000, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (6, "length")


def test_errors_become_the_clients_classes(client: OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="bold", messages=MESSAGES, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="bold", prompt=[1] * 300)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as outside:
        client.completions.create(model="bold", prompt=[10**6])
    assert outside.value.param == "prompt"
    with OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"


def test_leaving_a_stream_frees_its_slot(client: OpenAI, served: Served) -> None:
    """Each would hold one of the 4 slots for 250 steps: all 8 together some 500."""
    engine = served.engine
    while not engine.ended.empty():
        engine.ended.get()
    before = engine.steps
    for _ in range(8):
        extra = {"ignore_eos": True}
        with client.completions.create(
            model="bold", prompt="a", max_tokens=250, stream=True, extra_body=extra
        ) as stream:
            next(iter(stream))
    assert [engine.ended.get(timeout=60).finish for _ in range(8)] == ["abort"] * 8
    assert engine.steps - before < 250
