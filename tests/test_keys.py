"""Who may come in, and how many at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from scripted import EOS, ScriptedEngine, event, in_memory, loopback, say, scripted_app
from trimtab.errors import Forbidden, InvalidRequest, Unauthorized
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request
from trimtab.server.keys import Keys, choose_keys

VARIABLE = "TRIMTAB_TEST_KEY"
BODY = {"prompt": "ab"}


def test_keys_come_from_flags_and_a_file_else_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\none\n\n  two \n")

    def choose(given: list[str] | None = None, path: Path | None = None) -> list[str]:
        return choose_keys(given, VARIABLE, path, "api-key")

    assert choose() == []
    assert choose(["a", "b"], file) == ["a", "b", "one", "two"]
    monkeypatch.setenv(VARIABLE, "e, f g")
    assert choose() == ["e", "f", "g"]
    assert choose(["a"]) == ["a"]
    assert choose(None, file) == ["one", "two"]


@pytest.mark.parametrize("empty", ["flag", "file", "variable"])
def test_an_empty_key_is_refused(empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(InvalidRequest, match="must not be empty: look at --api-key"):
        choose_keys(["a", ""] if empty == "flag" else None, VARIABLE, file if empty == "file" else None, "api-key")


def test_a_key_is_what_a_header_can_bring(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes("\ufeffone\r\ntwo\r\n".encode())  # as an editor on Windows writes it
    keys = choose_keys([" three\n"], VARIABLE, file, "api-key")
    assert keys == ["three", "one", "two"]
    for key in keys:
        assert Keys(keys).admit(f"Bearer {key}", admin=False) is not None


@pytest.mark.parametrize("key", ["schlüssel", "\ufeffsecret", "se\x01cret"])
@pytest.mark.parametrize("source", ["flag", "file", "variable"])
def test_a_key_that_no_header_can_bring_is_refused_and_not_told(
    key: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"good\n{key}\n", encoding="utf-8")
    monkeypatch.setenv(VARIABLE, f"good,{key}")
    given = ["good", key] if source == "flag" else None
    with pytest.raises(
        InvalidRequest, match=r"printable ASCII.*--api-key, --api-key-file and TRIMTAB_TEST_KEY"
    ) as caught:
        choose_keys(given, VARIABLE, file if source == "file" else None, "api-key")
    assert caught.value.field == "api-key"
    assert key not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_a_file_that_cannot_be_read_is_told(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"--admin-key-file .* cannot be read"):
        choose_keys(None, VARIABLE, file, "admin-key")


def test_an_admin_key_opens_what_an_api_key_does_and_not_the_other_way_round() -> None:
    keys = Keys(["user"], ["boss"])
    assert keys.admit("Bearer user", admin=False) is not None
    assert keys.admit("bearer  boss", admin=False) is None
    assert keys.admit("Bearer boss", admin=True) is None
    for header, admin in (("Bearer user", True), ("", True), ("", False), ("Bearer ", False), ("Basic boss", True)):
        with pytest.raises(Unauthorized):
            keys.admit(header, admin)
    with pytest.raises(Forbidden):
        Keys(["user"]).admit("Bearer user", admin=True)
    open_door = Keys([], ["boss"])
    assert open_door.admit("", admin=False) is None
    with pytest.raises(Unauthorized):
        open_door.admit("", admin=True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_has_so_many_requests_at_once_and_more_are_a_429(stream: bool) -> None:
    held = threading.Semaphore(0)

    def silence(request: Request, index: int) -> list[Event]:
        held.release()
        return []

    engine = ScriptedEngine(silence)
    app = scripted_app(engine, api_keys=["k1", "k2"], admin_keys=["boss"], max_per_key=2)
    with loopback(app, engine) as url, ThreadPoolExecutor(5) as callers:

        def ask(key: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.post(f"{url}/v1/completions", json=BODY | {"stream": stream}, headers=headers, timeout=60)

        going = [callers.submit(ask, "k1") for _ in range(2)]
        assert all(held.acquire(timeout=30) for _ in going)
        refused = ask("k1")
        going += [callers.submit(ask, key) for key in ("k2", "boss", "boss")]
        assert all(held.acquire(timeout=30) for _ in range(3)), "other keys, and admins, are not counted with it"
        for request in engine.requests:
            engine.on_events([event(request, 0, EOS, finish="stop")])
        assert [answer.result(30).status_code for answer in going] == [200] * 5
        engine.script = say("x")
        assert ask("k1").status_code == 200, "its answers are over"
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], refused.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")


def test_a_refused_body_is_not_counted() -> None:
    with in_memory(ScriptedEngine(say("x")), api_keys=["k"], max_per_key=1) as ask:
        headers = {"Authorization": "Bearer k"}
        answers = [ask("POST", "/v1/completions", json=body, headers=headers) for body in ({}, BODY, {}, BODY)]
    assert [answer.status_code for answer in answers] == [400, 200, 400, 200]
