"""What every response has, whatever the route: times, HEAD, envelopes, and browsers from elsewhere."""

import json

import pytest

from scripted import ScriptedEngine, in_memory, loopback, say, scripted_app

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("GET", "/none"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models")]
)
def test_every_response_tells_its_milliseconds(method: str, path: str) -> None:
    with in_memory(ScriptedEngine(say("x")), api_keys=["k"]) as ask:
        response = ask(method, path, json=CHAT, headers={"Authorization": "Bearer k"} if path != "/v1/models" else {})
    assert int(response.headers["openai-processing-ms"]) >= 0


def test_a_stream_tells_them_too() -> None:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        assert "openai-processing-ms" in ask("POST", "/v1/chat/completions", json=CHAT | {"stream": True}).headers


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/v1/models", 200), ("/none", 404)])
def test_head_is_a_get_without_its_body(path: str, status: int) -> None:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        head, get = ask("HEAD", path), ask("GET", path)
    assert (head.status_code, head.content) == (status, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


def test_head_over_a_socket_leaves_the_connection_usable() -> None:
    import httpx

    engine = ScriptedEngine(say("x"))
    with loopback(scripted_app(engine), engine) as url, httpx.Client(base_url=url) as client:
        assert client.head("/health").status_code == 200
        assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(("method", "path", "allowed"), [("GET", "/v1/responses", "POST"), ("PUT", "/health", "GET")])
def test_a_wrong_method_is_told_the_right_one(method: str, path: str, allowed: str) -> None:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        response = ask(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("origin", "let_in"), [("http://here", True), ("http://there", False)])
def test_pages_of_allowed_origins_may_call_though_a_preflight_has_no_key(origin: str, let_in: bool) -> None:
    wish = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    with in_memory(ScriptedEngine(say("x")), api_keys=["k"], origins=["http://here"]) as ask:
        before = ask("OPTIONS", "/v1/chat/completions", headers=wish)
        call = ask("POST", "/v1/chat/completions", json=CHAT, headers={"Origin": origin, "Authorization": "Bearer k"})
        refused = ask("GET", "/v1/models", headers={"Origin": origin})
    assert (before.status_code == 200) == let_in
    for response in (call, refused):
        assert (response.headers.get("access-control-allow-origin") == origin) == let_in
    assert (call.status_code, refused.status_code) == (200, 401)
    exposed = call.headers.get("access-control-expose-headers", "").lower().split(", ")
    assert {"x-request-id", "retry-after", "openai-processing-ms"} <= set(exposed) or not let_in


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_json_that_is_not_called_so_is_told_the_header(path: str, headers: dict[str, str]) -> None:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        response = ask("POST", path, content=json.dumps(CHAT), headers=headers)
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_without_the_flag_no_page_may() -> None:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        response = ask("GET", "/health", headers={"Origin": "http://here"})
    assert "access-control-allow-origin" not in response.headers
