"""A fleet under Ray Serve, for real: two replicas here, one of them killed; corrections change under load."""

import asyncio
import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tiny import tiny_base, tiny_correction, tiny_model, tiny_tokenizer
from trimtab.steering.folder import save, version_of

ray = pytest.importorskip("ray", reason="the fleet's tests need ray: pip install '.[fleet]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

ROOT = Path(__file__).resolve().parent.parent
LONG: dict[str, Any] = {"prompt": "On and on", "max_tokens": 120, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a correction in two versions."""
    made = tmp_path_factory.mktemp("fleet")
    tiny_model().save_pretrained(made / "tiny")
    tiny_tokenizer().save_pretrained(made / "tiny")
    base = tiny_base()
    for seed, name in enumerate(("first", "second")):
        save(tiny_correction(base, name, seed), made / name)
    return made


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    from ray import serve

    port = find_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deploy(folder, "first")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def find_port() -> int:
    """A free one, of those that the system gives to nobody by itself: Ray opens hundreds before it listens on ours."""
    for port in random.sample(range(20_000, 32_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def deploy(folder: Path, which: str, version: str | None = None) -> None:
    """As `serve deploy deploy/fleet.yaml` does, after an edit."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((ROOT / "deploy/fleet.yaml").read_text())
    (application,) = config["applications"]
    # one text whoever shares the step: true of float32; auto is bfloat16 on a CPU that multiplies it in hardware
    application["args"] = {"model": str(folder / "tiny"), "dtype": "float32"}
    application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT / ".dev"), "OMP_NUM_THREADS": "1"}}
    (deployment,) = application["deployments"]
    deployment["autoscaling_config"] |= {"max_replicas": 2}
    deployment["user_config"] = {"corrections": {"mine": {"source": str(folder / which), "version": version}}}
    del config["proxy_location"], config["http_options"]  # as this cluster was started
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
    for _ in range(600):
        if serve.status().applications["trimtab"].status == "RUNNING":
            return
        time.sleep(0.5)
    raise AssertionError(f"the fleet does not run: {serve.status()}")


def replicas() -> list[int]:
    """The process ids of the living ones, which are this test's descendants."""
    return sorted(
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "ServeReplica" in " ".join(_command(process)) and process.status() != psutil.STATUS_ZOMBIE
    )


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


async def stream(client: httpx.AsyncClient, session: str) -> str:
    """A steered stream's text. Raises httpx.HTTPError where it is not whole."""
    body = LONG | {"model": "mine", "stream": True}
    text, done = "", False
    async with client.stream("POST", "/v1/completions", json=body, headers={"x-session-id": session}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise httpx.ReadError(chunk["error"]["message"])
                text += "".join(choice["text"] for choice in chunk["choices"])
    if not done:
        raise httpx.ReadError("the stream ended early")
    return text


async def retried(client: httpx.AsyncClient, session: str) -> tuple[str, int]:
    """As a client with retries. -> the text, and how many attempts it took."""
    for attempt in range(1, 60):
        try:
            return await stream(client, session), attempt
        except httpx.HTTPError:
            await asyncio.sleep(0.5)
    raise AssertionError("no attempt came through")


def test_a_replica_tells_what_it_serves(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As `trimtab serve` prints it; without Ray."""
    from trimtab.server.fleet import Replica, Replicated

    caplog.set_level("INFO", "trimtab.server")
    replica = Replica(Replicated(model=str(folder / "tiny"), max_num_seqs=3, max_queue=50, max_model_len=64))
    asyncio.run(replica.reconfigure({"corrections": {}}))
    assert "slots        3 of 64 tokens" in caplog.text


def test_a_replica_logs_its_requests_and_keeps_a_keys_limit(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `trimtab serve` does; without Ray."""
    from fastapi.testclient import TestClient

    from trimtab.errors import InvalidRequest
    from trimtab.server.fleet import Replica, Replicated

    caplog.set_level("INFO", "trimtab")
    monkeypatch.delenv("TRIMTAB_API_KEY", raising=False)
    given: dict[str, Any] = {"model": str(folder / "tiny"), "max_model_len": 64, "max_requests_per_key": 1}
    with pytest.raises(InvalidRequest, match="set TRIMTAB_API_KEY"):
        Replica(Replicated(**given))
    monkeypatch.setenv("TRIMTAB_API_KEY", "k")
    replica = Replica(Replicated(**given, generation_config="auto", allowed_origins=["http://here"]))
    assert "keys         1 for /v1; none for changes" in caplog.text
    with TestClient(replica.__serve_build_asgi_app__()) as client:
        headers = {"Authorization": "Bearer k", "Origin": "http://here"}
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=headers)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "http://here")
    assert "POST /v1/completions 200" in caplog.messages


def test_a_config_that_does_not_fit_is_refused_whole(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where what does not fit comes after what does. Without Ray."""
    from trimtab.server.fleet import Replica, Replicated

    save(tiny_correction(tiny_base(seed=1), "foreign"), tmp_path / "foreign")
    replica = Replica(Replicated(model=str(folder / "tiny"), served_model_name="us", max_model_len=64))
    engine = replica._engine
    engine.start(lambda events: None)

    def configure(**sources: Path) -> list[str]:
        corrections = {name: {"source": str(source)} for name, source in sources.items()}
        asyncio.run(replica.reconfigure({"corrections": corrections}))
        return [f"{entry.correction.name} {entry.version}" for entry in replica._bank.entries]

    before = configure(mine=folder / "first")
    assert len(before) == 2, "and the contrast"
    assert configure(mine=folder / "second", other=tmp_path / "foreign") == before
    assert "other weights" in caplog.text
    assert configure(mine=folder / "second", us=folder / "second") == before
    assert "the model itself is called us" in caplog.text
    assert configure(mine=folder / "second") != before
    engine.close()


def test_a_killed_replica_costs_its_streams_a_retry_and_comes_back(url: str) -> None:
    async def watch() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            (expected, _) = await retried(client, "warm")
            before = replicas()
            assert len(before) == 2
            going = [asyncio.create_task(retried(client, f"session {k}")) for k in range(16)]
            await asyncio.sleep(1)
            os.kill(before[0], signal.SIGKILL)
            fresh = [await retried(client, f"new {k}") for k in range(4)]  # while one is missing
            answers = await asyncio.gather(*going)
            assert {text for text, _ in answers} | {text for text, _ in fresh} == {expected}
            for _ in range(120):
                now = replicas()
                if len(now) == 2 and before[0] not in now:
                    return
                await asyncio.sleep(0.5)
            raise AssertionError("the replica did not come back")

    asyncio.run(watch())


def test_a_swap_under_load_fails_nobody_and_each_answer_names_its_version(url: str, folder: Path) -> None:
    from trimtab.steering.folder import load

    versions = [version_of(load(folder / which)) for which in ("first", "second")]
    seen: list[tuple[str, str]] = []

    async def ask(client: httpx.AsyncClient, session: str, until: asyncio.Event) -> None:
        while not until.is_set():
            answer = await client.post(
                "/v1/completions", json=LONG | {"model": "mine", "max_tokens": 24}, headers={"x-session-id": session}
            )
            answer.raise_for_status()
            (choice,) = answer.json()["choices"]
            seen.append((choice["steering"]["version"], choice["text"]))

    async def swap() -> None:
        until = asyncio.Event()
        before = replicas()
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            asking = [asyncio.create_task(ask(client, f"session {k}", until)) for k in range(8)]
            await asyncio.sleep(1)
            for which, version in (("second", versions[1]), ("first", versions[0]), ("second", None)):
                await asyncio.to_thread(deploy, folder, which, version)
                await asyncio.sleep(1)
            until.set()
            await asyncio.gather(*asking)
        assert replicas() == before  # the same processes: nothing was loaded again

    asyncio.run(swap())
    texts = {version: {text for name, text in seen if name == version} for version in versions}
    assert set(versions) == {version for version, _ in seen}
    assert [len(found) for found in texts.values()] == [1, 1]  # greedy: each version says one thing
    assert texts[versions[0]] != texts[versions[1]]
    assert Counter(version for version, _ in seen)[versions[1]] > 1


def test_a_version_that_is_not_there_leaves_the_replicas_as_they_are(url: str, folder: Path) -> None:
    before = httpx.get(f"{url}/v1/corrections").json()
    deploy(folder, "first", "0123456789ab")
    after = [httpx.get(f"{url}/v1/corrections", headers={"x-session-id": str(k)}).json() for k in range(8)]
    assert all(found == before for found in after)


def test_one_session_meets_one_replica(url: str) -> None:
    """Its first request is computed, the others reuse. By random routes, seven of eight sessions would miss again."""
    asked, missed = 16, 0
    for session in map(str, range(asked)):
        body, headers = {"prompt": f"{session}, " * 32, "max_tokens": 1}, {"x-session-id": session}
        for _ in range(4):
            told = httpx.post(f"{url}/v1/completions", json=body, headers=headers).json()
            missed += told["usage"]["prompt_tokens_details"]["cached_tokens"] < 32
    assert asked <= missed <= asked + 4  # a replica that does not answer at once is passed over
