"""The end of a server, in processes of their own: what runs is finished or told, and the exit code says so.

Takes half a minute: four servers are started.
"""

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from served import Served, serving
from tiny import tiny_base, tiny_correction, tiny_model, tiny_tokenizer
from trimtab.steering.folder import save

STREAMS = 32
BODY = {"prompt": "once", "ignore_eos": True, "stream": True, "temperature": 0}
PATH = "/v1/completions"


class Told(NamedTuple):
    """What a stream's client has seen."""

    text: str
    finish: str | None
    error: dict[str, Any] | None
    done: bool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    tiny_model().save_pretrained(made / "tiny")
    tiny_tokenizer().save_pretrained(made / "tiny")
    return made


def flags(drain: int, *more: str) -> Sequence[str]:
    return ["tiny", "--max-model-len", "512", "--max-num-seqs", "8", "--drain-timeout", str(drain), *more]


async def stream(client: httpx.AsyncClient, tokens: int, began: asyncio.Event | None = None) -> Told:
    text, finish, error, done = "", None, None, False
    async with client.stream("POST", PATH, json=BODY | {"max_tokens": tokens}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                error = chunk.get("error", error)
                for choice in chunk.get("choices", ()):
                    text, finish = text + choice["text"], choice["finish_reason"] or finish
                if began is not None:
                    began.set()
    return Told(text, finish, error, done)


async def end_under_streams(served: Served, tokens: int) -> tuple[list[Told], httpx.Response, httpx.Response]:
    """SIGTERM while 32 clients stream. -> what they saw; /ready, and a new request, from then on."""
    limits = httpx.Limits(max_connections=STREAMS + 2)
    async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:
        began = asyncio.Event()
        streams = [asyncio.create_task(stream(client, tokens, began)) for _ in range(STREAMS)]
        while True:  # until all are in the engine's hands
            asked = (await client.get("/metrics")).text
            (prompts,) = (x for x in asked.splitlines() if x.startswith("trimtab:prompt_tokens_total"))
            if float(prompts.split()[-1]) == STREAMS * len("once"):
                break
            await asyncio.sleep(0.01)
        await began.wait()
        served.process.send_signal(signal.SIGTERM)
        while (ready := await client.get("/ready")).status_code == 200:
            await asyncio.sleep(0.01)
        refused = await client.post(PATH, json=BODY)
        return list(await asyncio.gather(*streams)), ready, refused


def test_within_the_time_every_stream_is_finished(folder: Path) -> None:
    with serving(flags(120, "--log-format", "json"), folder) as served:
        told, ready, refused = asyncio.run(end_under_streams(served, tokens=40))
        assert served.process.wait(60) == 0
        assert served.process.stdout is not None
        lines = [json.loads(line) for line in served.process.stdout]
    asked = [line for line in lines if line["logger"] == "trimtab.requests"]
    assert [line["status"] for line in asked].count(200) == STREAMS
    assert [line["status"] for line in asked].count(503) == 1
    assert {(answer.finish, answer.error, answer.done) for answer in told} == {("length", None, True)}
    assert len({answer.text for answer in told}) == 1, "greedy answers to one prompt"
    assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")


def test_what_the_time_does_not_suffice_for_is_told_so(folder: Path) -> None:
    with serving(flags(1), folder) as served:
        told, _, _ = asyncio.run(end_under_streams(served, tokens=480))
        assert served.process.wait(60) == 0
    assert all(answer.done for answer in told)
    ended = {answer.finish or (answer.error or {}).get("code") for answer in told}
    assert ended <= {"length", "engine_stopped"}
    assert "engine_stopped" in ended


def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    async def main(served: Served) -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
            began = asyncio.Event()
            going = asyncio.create_task(stream(client, 480, began))
            await began.wait()
            served.process.send_signal(signal.SIGTERM)
            while (await client.get("/ready")).status_code == 200:
                await asyncio.sleep(0.01)
            served.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(served.process.wait, 60) == 128 + signal.SIGTERM
            with pytest.raises(httpx.TransportError):
                await going

    with serving(flags(600), folder, code=128 + signal.SIGTERM) as served:
        asyncio.run(main(served))


def test_a_change_that_never_ends_holds_nobody_up(folder: Path) -> None:
    """What is read may hang, as a hub may that sends a byte a minute."""
    for name in ("hangs", "good"):
        (folder / "root" / name).mkdir(parents=True)
    os.mkfifo(folder / "root" / "hangs" / "correction.json")
    save(tiny_correction(tiny_base(), "good"), folder / "root" / "good")
    more = ("--dtype", "float32", "--admin-key", "boss", "--corrections-root", "root")
    with serving(flags(1, *more), folder) as served:
        ask = {"url": f"{served.url}/v1/corrections", "headers": {"Authorization": "Bearer boss"}}
        for _ in range(8):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(**ask, json={"path": "hangs"}, timeout=0.3)
        assert httpx.post(**ask, json={"path": "good"}, timeout=60).status_code == 201
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0


def test_a_server_whose_engine_dies_tells_its_callers_and_ends_with_a_failure(folder: Path) -> None:
    dies = "from trimtab.server.engine.core import Core; Core.step = lambda self: 1 // 0; "
    program = ["-c", dies + "from trimtab.cli import main; main()"]
    with serving(flags(600), folder, code=1, program=program) as served:
        assert "trimtab:engine_up{" in httpx.get(f"{served.url}/metrics").text
        told = httpx.post(served.url + PATH, json=BODY | {"stream": False}, timeout=60)
        assert told.status_code == 500
        assert served.process.wait(30) == 1
        assert served.process.stdout is not None
        log = served.process.stdout.read()
    assert "ZeroDivisionError" in log
    assert "the engine has died: the server ends" in log
