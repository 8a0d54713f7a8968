"""Corrections at run time over HTTP: who may, from where, what is refused, and a change under load."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from scripted import ScriptedEngine, in_memory, loopback, say, scripted_app
from tiny import tiny_base, tiny_correction, tiny_lora
from trimtab.errors import InvalidRequest, NotFound
from trimtab.server import corrections, front_door, sources
from trimtab.server.app import create_app
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.engine import Engine
from trimtab.server.engine.request import Request, SamplingParams, Steering
from trimtab.server.service import Service
from trimtab.steering.adapter import adapter_files
from trimtab.steering.bank import Bank
from trimtab.steering.correction import Correction
from trimtab.steering.folder import load, save, version_of

BASE = tiny_base()
CONFIG = EngineConfig(slots=8, max_model_len=128)
ADMIN = {"Authorization": "Bearer boss"}
PROMPT = list(range(60, 90))
TOKENS = 12


class Server(NamedTuple):
    url: str
    folder: Path  # the root: head-0, head-1, lora-0, lora-1, foreign
    service: Service

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", timeout=120, **{"headers": ADMIN, **more})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("root")
    for seed in (0, 1):
        save(tiny_correction(BASE, "head", seed=seed), folder / f"head-{seed}")
        save(tiny_lora(BASE, "lora", seed=seed), folder / f"lora-{seed}")
    save(tiny_correction(tiny_base(seed=1), "foreign"), folder / "foreign")
    bank = Bank(BASE.hidden, "cpu")
    engine = Engine(BASE, bank, CONFIG)
    app = create_app(engine, BASE, bank, api_keys=["user"], admin_keys=["boss"], corrections_root=folder)
    with loopback(app, engine) as url:
        yield Server(url, folder, app.state.service)


def error_of(response: httpx.Response) -> tuple[int, Any, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["param"], error["code"]


def tokens_of(correction: Correction) -> str:
    """What it answers alone."""
    bank = Bank(BASE.hidden, "cpu")
    bank.add(correction)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    events = Core(BASE, bank, CONFIG).run([Request("r", tuple(PROMPT), sampling, Steering(correction.name))])
    return str([event.token for event in events])


# Who may


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/corrections"),
        ("POST", "/v1//corrections/"),
        ("DELETE", "/v1/corrections/head"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter%0A"),  # for a route, the same
        ("POST", "/v1/corrections%0A"),
    ],
)
def test_changes_take_the_admin_key_and_where_there_is_none_nobody_may(server: Server, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer user"}, {"Authorization": "Basic boss"}):
        assert error_of(server.ask(method, path, headers=headers))[::2] == (401, "invalid_api_key")
    with in_memory(ScriptedEngine(say("x"))) as ask:
        assert error_of(ask(method, path, headers=ADMIN))[::2] == (403, "forbidden")


def test_an_app_that_is_mounted_asks_for_the_same_keys() -> None:
    inner = scripted_app(ScriptedEngine(say("x")), api_keys=["user"], admin_keys=["boss"])
    outer = Starlette(routes=[Mount("/llm", app=inner)])

    async def ask(method: str, path: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://x") as client:
            return (await client.request(method, f"/llm{path}", headers={"Authorization": "Bearer user"})).status_code

    assert asyncio.run(ask("DELETE", "/v1/corrections/brief")) == 401
    assert asyncio.run(ask("GET", "/v1/models")) == 200


def test_the_list_takes_an_api_key_and_the_admin_key_is_one(server: Server) -> None:
    assert server.ask("GET", "/v1/corrections", headers={}).status_code == 401
    for key in ("user", "boss"):
        listed = server.ask("GET", "/v1/corrections", headers={"Authorization": f"Bearer {key}"}).json()
        assert listed["object"] == "list"
        assert {"id", "version", "tier", "gate", "strength", "report"} <= listed["data"][0].keys()


# From where


def test_a_folder_is_loaded_listed_served_replaced_and_removed(server: Server) -> None:
    versions = [version_of(load(server.folder / f"head-{seed}")) for seed in (0, 1)]
    added = server.ask("POST", "/v1/corrections", json={"name": "mine", "path": "head-0"})
    assert (added.status_code, added.json()["id"], added.json()["version"]) == (201, "mine", versions[0])
    assert added.json() == server.ask("GET", "/v1/corrections/mine").json()
    replaced = server.ask("POST", "/v1/corrections", json={"name": "mine", "path": str(server.folder / "head-1")})
    assert (replaced.status_code, replaced.json()["version"]) == (200, versions[1])
    assert [c["id"] for c in server.ask("GET", "/v1/corrections").json()["data"]].count("mine") == 1
    assert "mine" in [m["id"] for m in server.ask("GET", "/v1/models").json()["data"]]
    body = {"model": "mine", "prompt": PROMPT, "max_tokens": 2}
    answer = server.ask("POST", "/v1/completions", json=body).json()
    assert answer["choices"][0]["steering"]["version"] == versions[1]
    scored = server.ask("POST", "/v1/steering/score", json={"model": "mine", "prompt": "a", "completion": "b"})
    assert scored.json()["steering"]["version"] == versions[1]
    labels = f'correction="mine",model_name="tiny-llama",tier="head",version="{versions[1]}"'
    assert f"trimtab:correction_info{{{labels}}} 1.0" in server.ask("GET", "/metrics").text
    removed = server.ask("DELETE", "/v1/corrections/mine").json()
    assert removed == {"id": "mine", "object": "correction", "deleted": True}
    assert error_of(server.ask("DELETE", "/v1/corrections/mine")) == (404, "correction", "correction_not_found")
    assert server.ask("POST", "/v1/completions", json=body).status_code == 404


@pytest.mark.parametrize("tier", ["head", "lora"])
def test_an_upload_is_the_same_as_its_folder(server: Server, tier: str) -> None:
    folder = server.folder / f"{tier}-0"
    files = {path.name: (path.name, path.read_bytes()) for path in folder.iterdir()}
    answer = server.ask("POST", "/v1/corrections", files=files, data={"name": f"up-{tier}"})
    assert answer.status_code == 201, answer.text
    assert answer.json()["version"] == version_of(load(folder))
    unnamed = server.ask("POST", "/v1/corrections", files=files)
    assert unnamed.json()["id"] == tier, "as its correction.json calls it"
    for name in (f"up-{tier}", tier):
        assert server.ask("DELETE", f"/v1/corrections/{name}").status_code == 200


def test_a_peft_adapter_is_uploaded_with_a_name(server: Server) -> None:
    files = {name: (name, content) for name, content in adapter_files(tiny_lora(BASE).adapter).items()}
    assert error_of(server.ask("POST", "/v1/corrections", files=files))[:2] == (400, "name")
    answer = server.ask("POST", "/v1/corrections", files=files, data={"name": "peft"}).json()
    assert (answer["id"], answer["tier"], answer["gate"]["kind"], answer["slots"]) == ("peft", "lora", "always", 1)
    server.ask("DELETE", "/v1/corrections/peft")


def test_vllms_verbs_do_the_same(server: Server) -> None:
    loaded = server.ask("POST", "/v1/load_lora_adapter", json={"lora_name": "verb", "lora_path": "lora-0", "x": 1})
    assert (loaded.status_code, "added successfully" in loaded.text) == (200, True)
    assert server.ask("GET", "/v1/models/verb").status_code == 200
    unloaded = server.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": "verb"})
    assert (unloaded.status_code, "removed successfully" in unloaded.text) == (200, True)
    assert error_of(server.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": "verb"}))[:2] == (404, "lora_name")
    for body, field in (({"lora_path": "no/where/at/all"}, "lora_path"), ({"lora_name": "a/b"}, "lora_name")):
        wrong = server.ask("POST", "/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "lora-0"} | body)
        assert error_of(wrong)[:2] == (400, field)
    assert error_of(server.ask("POST", "/v1/load_lora_adapter", json={}))[:2] == (400, "lora_name")


def test_a_hub_id_is_fetched_without_what_is_not_read(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = {}

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked[hub_id] = set(allow_patterns)
        if hub_id != "some/body":
            raise OSError("no such repository")
        return str(server.folder / "head-0")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    answer = server.ask("POST", "/v1/corrections", json={"name": "hub", "path": "some/body"})
    assert answer.status_code == 201
    assert asked["some/body"] == set(sources.FILES)
    refused = server.ask("POST", "/v1/corrections", json={"name": "hub", "path": "no/body"})
    assert "no such repository" in refused.text
    assert error_of(refused)[:2] == (400, "path")
    server.ask("DELETE", "/v1/corrections/hub")


def test_the_fleet_calls_the_same(server: Server) -> None:
    async def main() -> None:
        made = tiny_correction(BASE, "own", seed=5)
        entry, replaced = await corrections.install(server.service, made, "called")
        assert (entry.correction.name, entry.version, replaced) == ("called", version_of(made), False)
        _, replaced = await corrections.install(server.service, server.folder / "head-0", "called")
        assert replaced
        await corrections.remove(server.service, "called")
        with pytest.raises(NotFound):
            await corrections.remove(server.service, "called")
        with pytest.raises(InvalidRequest, match="other weights"):
            await corrections.install(server.service, server.folder / "foreign")

    asyncio.run(main())


# What is refused


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"path": "../root"}, "path", "outside"),
        ({"path": "/etc"}, "path", "outside"),
        ({"path": "link"}, "path", "outside"),
        ({"path": "absent"}, "path", "no folder"),
        ({"path": "foreign"}, "correction", "fitted to"),
        ({"path": "pickled"}, "correction", "cannot be read"),
        ({"path": "deep"}, "correction", "is not JSON"),
        ({"path": "head-0", "name": "../x"}, "name", "name must be"),
        ({"path": "head-0", "name": "tiny-llama"}, "name", "the model itself"),
        ({"path": "head-0", "nmae": "x"}, "nmae", "Extra"),
        ({"name": "x"}, "path", "required"),
    ],
)
def test_what_cannot_be_served_is_a_400_and_changes_nothing(server: Server, body: Any, param: str, says: str) -> None:
    link = server.folder / "link"
    link.exists() or link.symlink_to(server.folder.parent)
    pickled, deep = server.folder / "pickled", server.folder / "deep"
    if not pickled.exists():
        shutil.copytree(server.folder / "lora-0", pickled)
        (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
        deep.mkdir()
        (deep / "correction.json").write_text("[" * 100_000)
    before = server.ask("GET", "/v1/corrections").json()
    refused = server.ask("POST", "/v1/corrections", json=body)
    assert error_of(refused)[:2] == (400, param)
    assert says in refused.json()["error"]["message"]
    assert server.ask("GET", "/v1/corrections").json() == before


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"evil.pkl": b"x"}, "none of them"),
        ({"../correction.json": b"{}"}, "none of them"),
        ({"correction.json": b"{}"}, "format is None"),
        ({"correction.json": b"\xff"}, "is not JSON"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"not"}, "not a safetensors"),
        ({"adapter_config.json": b'{"alpha_pattern": 5}', "adapter_model.safetensors": b"\0" * 20}, "the upload"),
    ],
)
def test_an_upload_that_is_none_is_a_400_that_tells_no_path(server: Server, files: Any, says: str) -> None:
    upload = {name: (name, content) for name, content in files.items()}
    refused = server.ask("POST", "/v1/corrections", files=upload, data={"name": "x"})
    assert refused.status_code == 400
    assert says in refused.text
    assert "trimtab-upload" not in refused.text


def test_an_upload_may_be_large_and_other_bodies_may_not(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"x" * (front_door.MAX_BODY + 2**20)
    upload = {"correction.json": ("correction.json", content)}
    assert server.ask("POST", "/v1/corrections", files=upload).status_code == 400, "it was read"
    assert server.ask("POST", "/v1/corrections", content=content).status_code == 413
    assert server.ask("POST", "/v1/completions", content=content).status_code == 413
    monkeypatch.setattr(corrections, "MAX_UPLOAD", len(content))
    assert server.ask("POST", "/v1/corrections", files=upload).status_code == 413
    chunked = {"Content-Type": "multipart/form-data; boundary=b", **ADMIN}
    head = b'--b\r\nContent-Disposition: form-data; name="correction.json"; filename="f"\r\n\r\n'
    pieces = iter([head, content, b"\r\n--b--\r\n"])
    assert server.ask("POST", "/v1/corrections", content=pieces, headers=chunked).status_code == 413


# Under load


@pytest.mark.parametrize("tier", ["head", "lora"])
def test_swaps_under_streams_fail_none_and_each_answer_is_its_versions(server: Server, tier: str) -> None:
    """Ten clients stream answers one after the other, all to one prompt, while the correction changes ten times."""
    folders = [server.folder / f"{tier}-{seed}" for seed in (0, 1)]
    expected = {version_of(load(folder)): tokens_of(load(folder)) for folder in folders}
    assert len(set(expected.values())) == 2, "the test wants corrections that matter"
    body = {"model": "hot", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "steering": {"report": "tokens"}}
    answers: list[tuple[str, str]] = []

    async def main() -> None:
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=server.url, headers=ADMIN, timeout=300, limits=limits) as client:

            async def swap(seed: int) -> None:
                response = await client.post("/v1/corrections", json={"name": "hot", "path": folders[seed].name})
                assert response.status_code in (200, 201), response.text

            async def stream() -> None:
                version, receipts = "", []
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200, await response.aread()
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            chunk = json.loads(line.removeprefix("data: "))
                            assert "error" not in chunk, chunk
                            told = chunk["choices"][0].get("steering", {})
                            receipts += [receipt["token_id"] for receipt in told.get("tokens", [])]
                            version = told.get("version", version)
                answers.append((version, str(receipts)))

            async def client_loop() -> None:
                while not done.is_set():
                    await stream()

            await swap(0)
            done = asyncio.Event()
            clients = [asyncio.create_task(client_loop()) for _ in range(10)]
            for turn in range(1, 11):
                wanted = len(answers) + 2
                while len(answers) < wanted and not any(task.done() for task in clients):
                    await asyncio.sleep(0.01)
                await swap(turn % 2)
            done.set()
            await asyncio.gather(*clients)

    asyncio.run(main())
    server.ask("DELETE", "/v1/corrections/hot")
    assert {version for version, _ in answers} == expected.keys()
    assert [tokens for version, tokens in answers if tokens != expected[version]] == []
