"""Both clients over a mock transport: what they send, read, retry, stream and raise. No server and no waiting."""

import asyncio
import inspect
import pickle
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import httpx
import pytest

from mocked import CHAT, COMPLETION, RECEIPT, TOTALS, Both, Server, piece, refusal, sse
from trimtab.clients import (
    AsyncClient,
    Authentication,
    BadAnswer,
    BadRequest,
    Budget,
    Client,
    ClientError,
    ConnectionFailed,
    NotFound,
    Options,
    PermissionDenied,
    RateLimit,
    ResponseOptions,
    ServerError,
    StatusError,
    Steering,
    StreamFailed,
    TimedOut,
)
from trimtab.clients.retry import Retries
from trimtab.errors import ContextOverflow, InvalidRequest, TrimtabError

# what is sent


def test_a_bare_chat_sends_the_message_and_nothing_else(both: Both) -> None:
    server = Server(httpx.Response(200, json=CHAT))
    both.call(server, "chat", "Why?")
    assert server.body == {"messages": [{"role": "user", "content": "Why?"}]}
    assert str(server.requests[0].url) == "http://127.0.0.1:8000/v1/chat/completions"
    assert "authorization" not in server.requests[0].headers


def test_a_full_chat(both: Both) -> None:
    server = Server(httpx.Response(200, json=CHAT))
    steering = Steering("brief", strength=0.0, tau=1.4, mode="shadow", report="tokens")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    both.call(
        server, "chat", messages, model="demo", steering=steering, temperature=0.0, seed=3, extra={"metadata": {}},
        settings={"base_url": "https://example.test/api/v1", "api_key": "k"},
    )  # fmt: skip
    assert server.body == {
        "model": "demo", "messages": messages, "temperature": 0.0, "seed": 3, "metadata": {},
        "steering": {"correction": "brief", "strength": 0.0, "tau": 1.4, "mode": "shadow", "report": "tokens"},
    }  # fmt: skip
    assert str(server.requests[0].url) == "https://example.test/api/v1/chat/completions"
    assert server.requests[0].headers["authorization"] == "Bearer k"


def test_all_that_steering_can_say_is_sent_as_it_is(both: Both) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    steering = Steering(
        corrections={"brief": 1.0, "kind": 0.5}, gate="margin", ceiling=-0.1, rate=0.2, negative_prompt="",
        budget=Budget(
            max_steps=3, max_share=0.5, cooldown=0, kl=0.25, until="####", structured=True, spans=[("<a>", "</a>")],
        ),
    )  # fmt: skip
    both.call(server, "complete", "a", steering=steering)
    assert server.body["steering"] == {
        "corrections": {"brief": 1.0, "kind": 0.5}, "gate": "margin", "ceiling": -0.1, "rate": 0.2,
        "negative_prompt": "",
        "budget": {
            "max_steps": 3, "max_share": 0.5, "cooldown": 0, "kl": 0.25, "until": "####", "structured": True,
            "spans": [["<a>", "</a>"]],
        },
    }  # fmt: skip


def test_an_older_servers_receipts_are_read_too(both: Both) -> None:
    old = {key: value for key, value in RECEIPT.items() if key not in ("statistic", "kl", "strength")}
    answer = {**CHAT, "choices": [{**CHAT["choices"][0], "steering": {"tokens": [old]}}]}  # type: ignore[index]
    receipt = both.call(Server(httpx.Response(200, json=answer)), "chat", "Why?").steering.tokens[0]
    assert (receipt.entropy, receipt.statistic, receipt.kl) == (1.25, None, None)


@pytest.mark.parametrize("prompt", ["The sky is", [1, 2, 3], ["a", "b"], [[1], [2]]])
def test_a_completion_sends_the_prompt_as_it_is(both: Both, prompt: Any) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    answer = both.call(server, "complete", prompt, steering="brief")
    assert server.body == {"prompt": prompt, "steering": {"correction": "brief"}}
    assert server.requests[0].url.path == "/v1/completions"
    assert (answer.text, answer.choices[0].finish_reason, answer.steering) == (" blue", "length", None)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1//", "http://h:1/v1", "http://h:1/v1/"])
def test_the_base_url_may_leave_v1_out(both: Both, url: str) -> None:
    server = Server(httpx.Response(200, json={"object": "list", "data": [{"id": "demo"}, {"id": "brief"}]}))
    models = both.call(server, "models", settings={"base_url": url})
    assert [model.id for model in models] == ["demo", "brief"]
    assert str(server.requests[0].url) == "http://h:1/v1/models"


def test_headers_are_sent_with_every_request(both: Both) -> None:
    server = Server(httpx.Response(200, json={"object": "list", "data": []}))
    both.call(
        server, "models", settings={"api_key": "k", "headers": {"X-Session-Id": "s1", "Authorization": "Basic x"}}
    )
    assert server.requests[0].headers["x-session-id"] == "s1"
    assert server.requests[0].headers.get_list("authorization") == ["Basic x"], "the caller's own goes first"


def test_a_client_with_options_adds_to_its_headers_and_waits_for_ever_if_told_so() -> None:
    sent: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, json={"object": "list", "data": []})

    with Client(timeout=None, headers={"a": "1", "b": "2"}, transport=httpx.MockTransport(handle)) as client:
        client.with_options(headers={"B": "3"}).models()
        client.models()
    assert [(one.headers["a"], one.headers["b"]) for one in sent] == [("1", "3"), ("1", "2")]
    assert sent[0].extensions["timeout"] == {"connect": 5.0, "read": None, "write": None, "pool": None}


def test_a_copy_waits_for_ever_if_told_so_and_as_ever_if_not() -> None:
    server = Server(*(httpx.Response(200, json={"data": []}) for _ in range(2)))
    with Client(timeout=7, transport=httpx.MockTransport(server)) as client:
        client.with_options(timeout=None).models()
        client.with_options(max_retries=0).models()
    assert [request.extensions["timeout"]["read"] for request in server.requests] == [None, 7]
    with pytest.raises(InvalidRequest, match="timeout must be seconds"):
        Client().with_options(timeout=0)


def test_further_keys_of_a_score_and_of_tokens_are_sent(both: Both) -> None:
    server = Server(httpx.Response(200, json={}), httpx.Response(200, json={"tokens": [], "count": 0}))
    both.call(server, "score", "a", "b", extra={"seed": 3})
    assert server.body == {"prompt": "a", "completion": "b", "seed": 3}
    both.call(server, "tokenize", "a", extra={"return_token_strs": True})
    assert server.body == {"prompt": "a", "return_token_strs": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "http://"},
        {"base_url": 8000},
        {"base_url": "http://a..b"},
        {"base_url": "http://name:word@h"},
        {"base_url": "http://h/v1?key=1"},
        {"base_url": "http://h/v1#there"},
        {"max_retries": -1},
        {"max_retries": None},
        {"timeout": -1},
        {"timeout": "5"},
        {"timeout": float("inf")},
        {"headers": {"x name": "1"}},
        {"headers": {"Content-Length": "3"}},
        {"headers": {"x-name": "schlüssel"}},
        {"headers": {"x-name": 1}},
        {"api_key": "schlüssel"},
        {"api_key": "a\nb"},
    ],
)
def test_wrong_settings_are_named(both: Both, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        both.call(Server(), "models", settings=settings)
    assert caught.value.field in settings


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("messages", "options", "field"),
    [
        ([1], {}, "messages"),
        (None, {}, "messages"),
        ({"role": "user", "content": "Why?"}, {}, "messages"),
        ([["role", "user"]], {}, "messages"),
        ("Why?", {"temperature": float("nan")}, "temperature"),
        ("Why?", {"stop": {"a"}}, "stop"),
        ("Why?", {"extra": {"a": object()}}, "a"),
        ("Why?", {"extra": [1]}, "extra"),
        ("Why?", {"max_token": 3}, "max_token"),
        ("Why?", {"steering": 5}, "steering"),
        ("Why?", {"steering": Steering("brief", budget={"kl": 1})}, "steering"),  # type: ignore[arg-type]
        ("half a pair: \ud800", {}, "messages"),
        ([{"role": "user", "content": ENDLESS}], {}, "messages"),
        ("Why?", {"extra": {"stream": True}}, "stream"),
    ],
)
def test_what_cannot_be_sent_is_named(both: Both, messages: Any, options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        both.call(Server(), "chat", messages, **options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("method", "options", "answer"),
    [("chat", Options, CHAT), ("complete", Options, COMPLETION), ("respond", ResponseOptions, {"id": "r"})],
)
def test_an_option_that_is_none_is_not_sent(both: Both, method: str, options: Any, answer: Any) -> None:
    """Some servers refuse null."""
    bare, server = (Server(httpx.Response(200, json=answer)) for _ in range(2))
    both.call(bare, method, "Why?")
    both.call(server, method, "Why?", steering=None, **dict.fromkeys(options.__annotations__))
    assert server.body == bare.body
    assert all(type(None) in get_args(kind) for kind in get_type_hints(options).values())


def test_null_is_sent_where_extra_says_so(both: Both) -> None:
    server = Server(httpx.Response(200, json=CHAT))
    both.call(server, "chat", "Why?", temperature=None, extra={"seed": None})
    assert server.body.items() > {"seed": None}.items()
    assert "temperature" not in server.body


def test_a_misspelled_option_is_told_its_name(both: Both) -> None:
    with pytest.raises(InvalidRequest, match="max_token is no option here: did you mean max_tokens"):
        both.call(Server(), "chat", "Why?", max_token=3)
    with pytest.raises(InvalidRequest, match="with_options"):
        both.call(Server(), "chat", "Why?", timeout=3)
    with pytest.raises(InvalidRequest, match="use stream_chat"):
        both.call(Server(), "chat", "Why?", stream=True)
    with pytest.raises(InvalidRequest, match="use stream_chat"):
        both.call(Server(), "chat", "Why?", extra={"stream": True})


def test_the_newer_name_of_max_tokens_is_known(both: Both) -> None:
    server = Server(httpx.Response(200, json=CHAT))
    both.call(server, "chat", "Why?", max_completion_tokens=2)
    assert server.body["max_completion_tokens"] == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://h:1"), ("HTTP_PROXY", "foo://h:1"), ("SSL_CERT_FILE", "/no/such/file")],
)
def test_an_environment_that_cannot_be_followed_is_named(
    both: Both, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequest, match=name):
        both.kind()


def test_a_proxy_of_the_environment_is_thought_of(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    settings = {"base_url": "http://h:1", "max_retries": 0}
    with pytest.raises(ConnectionFailed, match="NO_PROXY"):
        both.call(Server(httpx.ConnectError("refused")), "models", settings=settings)
    monkeypatch.setenv("NO_PROXY", "h")
    with pytest.raises(ConnectionFailed, match=r"is the server running\?$"):
        both.call(Server(httpx.ConnectError("refused")), "models", settings=settings)


# what is read


def test_an_answer_is_read_with_its_receipts(both: Both) -> None:
    answer = both.call(Server(httpx.Response(200, json=CHAT)), "chat", "Why?")
    assert answer.text == "The sky"
    assert answer.usage.total_tokens == 7
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "The"
    assert answer.steering.model_dump(exclude={"tokens"}) == TOTALS
    assert answer.steering.tokens[0].model_dump() == RECEIPT
    assert answer.shade == "new"  # a field this version does not know


@pytest.mark.parametrize("content", [b"<html>", b"{}", b'{"choices": 3}', b'{"choices": []}', b""])
def test_an_answer_of_another_shape_is_told(both: Both, content: bytes) -> None:
    with pytest.raises(BadAnswer, match="base_url"):
        both.call(Server(httpx.Response(200, content=content)), "chat", "Why?")


def test_what_a_foreign_server_writes_as_null_or_in_parts_is_read(both: Both) -> None:
    parts = [{"type": "text", "text": "The"}, {"type": "thinking", "thinking": []}, {"type": "text", "text": " sky"}]
    logprobs = {"content": [{"token": "The", "logprob": -0.5, "top_logprobs": None}]}
    choice = {"index": None, "message": {"role": "assistant", "content": parts}, "logprobs": logprobs}
    usage = {"prompt_tokens": 5, "completion_tokens": None, "prompt_tokens_details": {"cached_tokens": None}}
    foreign = {"id": None, "model": None, "created": None, "choices": [choice], "usage": usage}
    answer = both.call(Server(httpx.Response(200, json=foreign)), "chat", "Why?")
    assert (answer.id, answer.model, answer.text) == ("", "", "The sky")
    assert answer.choices[0].logprobs.content[0].top_logprobs == []
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 0)
    chunks = ({"id": None, "choices": [{"index": 0, "delta": {"content": parts}}]},
              {"choices": [{"index": 0, "delta": None, "finish_reason": "stop"}]}, {"choices": None})  # fmt: skip
    _, stream = both.stream(Server(httpx.Response(200, content=sse(*chunks, b"[DONE]"))), "Why?")
    assert (stream.text, stream.finish_reason) == ("The sky", "stop")


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": "a"}, "steering": {**TOTALS, "steps": None}},
        {"message": {"content": "a"}, "steering": {"tokens": [{**RECEIPT, "entropy": None}]}},
        {"message": {"content": [1]}},
        {"message": {"content": [{"type": "text", "text": 1}]}},
    ],
)
def test_what_is_wrong_whoever_wrote_it_is_not_read(both: Both, choice: dict[str, Any]) -> None:
    with pytest.raises(BadAnswer, match="base_url"):
        both.call(Server(httpx.Response(200, json={"choices": [choice]})), "chat", "Why?")


# what is raised


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest), (401, Authentication), (403, PermissionDenied), (404, NotFound), (409, StatusError),
        (418, StatusError), (422, BadRequest), (429, RateLimit), (500, ServerError), (503, ServerError),
    ],
)  # fmt: skip
def test_a_status_is_a_class_of_the_tree(both: Both, status: int, kind: type[StatusError]) -> None:
    answer = refusal(status, {"x-request-id": "r1"}, message="too hot", param="temperature", code="c", type="t")
    with pytest.raises(TrimtabError, match="too hot") as caught:
        both.call(Server(answer), "chat", "Why?", settings={"max_retries": 0})
    error = caught.value
    assert type(error) is kind
    assert isinstance(error, StatusError)
    assert (error.status, error.param, error.code, error.type) == (status, "temperature", "c", "t")
    assert error.request_id == "r1"


@pytest.mark.parametrize(
    ("content", "message"), [(b"<b>gateway</b>", "HTTP 502: <b>gateway"), (b"", "HTTP 502: Bad Gateway"),
                             (b'{"error": "asleep"}', "asleep"), (b'{"error": null}', "HTTP 502"), (b"[]", "HTTP 502"),
                             (b"[" * 100_000, r"HTTP 502: \[\[")]
)  # fmt: skip
def test_a_refusal_without_an_envelope_is_quoted(both: Both, content: bytes, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        both.call(Server(httpx.Response(502, content=content)), "models", settings={"max_retries": 0})


@pytest.mark.parametrize("charset", ["utf-16", "idna", "undefined", "hex"])
def test_a_refusal_in_letters_that_cannot_be_read_is_quoted_too(both: Both, charset: str) -> None:
    answer = httpx.Response(502, headers={"content-type": f"text/html; charset={charset}"}, content=b"\xffgateway")
    with pytest.raises(ServerError, match="gateway"):
        both.call(Server(answer), "models", settings={"max_retries": 0})


BARE = {"object": "error", "message": "boom", "type": "BadRequestError", "param": None, "code": 400}


def test_an_envelope_without_an_error_key_is_one(both: Both) -> None:
    with pytest.raises(BadRequest, match=r"^boom$") as caught:
        both.call(Server(httpx.Response(400, json=BARE)), "chat", "Why?")
    assert (caught.value.type, caught.value.code) == ("BadRequestError", "400")
    with pytest.raises(StreamFailed, match=r"^boom$") as failed:
        both.stream(Server(httpx.Response(200, content=sse(piece("The"), BARE, b"[DONE]"))), "Why?")
    assert (failed.value.type, failed.value.code) == ("BadRequestError", "400")


@pytest.mark.parametrize("told", ["Event loop is closed", "Task got Future attached to a different loop"])
def test_a_client_of_another_event_loop_says_so(told: str) -> None:
    async def ask(client: AsyncClient) -> None:
        await client.chat("Why?")

    client = AsyncClient(transport=httpx.MockTransport(Server(RuntimeError(told), RuntimeError("a bug"))))
    with pytest.raises(ClientError, match=r"event loop.*make another"):
        asyncio.run(ask(client))
    with pytest.raises(RuntimeError, match="a bug"):
        asyncio.run(ask(client))


def test_a_client_that_another_event_loop_closes_says_so() -> None:
    class Bound(httpx.MockTransport):
        async def aclose(self) -> None:
            raise RuntimeError("Event loop is closed")

    with pytest.raises(ClientError, match="event loop"):
        asyncio.run(AsyncClient(transport=Bound(Server())).close())


def test_transport_failures_name_the_server(both: Both) -> None:
    settings = {"base_url": "http://h:1", "max_retries": 0}
    with pytest.raises(ConnectionFailed, match=r"http://h:1.*running") as caught:
        both.call(Server(httpx.ConnectError("refused")), "models", settings=settings)
    assert isinstance(caught.value, ClientError)
    with pytest.raises(TimedOut, match="timeout"):
        both.call(Server(httpx.ReadTimeout("slow")), "models", settings=settings)
    with pytest.raises(TimedOut, match="this client has as many requests under way as it has connections"):
        both.call(Server(httpx.PoolTimeout("none free")), "models", settings=settings)


@pytest.mark.parametrize(("timeout", "waited"), [(600.0, "5"), (None, "5"), (2.5, "2.5")])
def test_an_address_that_is_not_reached_is_not_a_slow_answer(both: Both, timeout: float | None, waited: str) -> None:
    settings = {"base_url": "http://h:1", "max_retries": 0, "timeout": timeout}
    with pytest.raises(TimedOut, match=rf"http://h:1/v1 could not be reached within {waited} seconds") as caught:
        both.call(Server(httpx.ConnectTimeout("slow")), "models", settings=settings)
    assert "timeout" not in str(caught.value), "to raise it would not help"


def test_an_answer_that_cannot_be_decompressed_is_no_answer(both: Both, naps: list[float]) -> None:
    def damaged(status: int) -> httpx.Response:
        return httpx.Response(status, headers={"content-encoding": "gzip"}, stream=Body(b"not gzip"))

    for status in (200, 404):
        with pytest.raises(BadAnswer, match=r"http://127.0.0.1:8000/v1 .*decompressed.*base_url"):
            both.call(Server(damaged(status)), "chat", "Why?")
        with pytest.raises(BadAnswer, match="decompressed"):
            both.stream(Server(damaged(status)), "Why?")
    assert naps == []


@pytest.mark.parametrize(
    "error",
    [
        BadRequest("m", 400, "c", "t", "p", "id", 1.5),
        StreamFailed("m", "c", "t", "p", "id"),
        ContextOverflow(10, 20, 1),
    ],
)
def test_errors_come_home_from_a_pool_of_processes(error: TrimtabError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found)) == (type(error), str(error))
    assert vars(found) == vars(error)
    renamed = ContextOverflow(10, 20, 1)
    renamed.rename("prompt")
    assert str(pickle.loads(pickle.dumps(renamed))) == str(renamed)


@pytest.mark.parametrize("method", ["chat", "stream_chat"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_closed_client_says_so(both: Both, method: str, copied: bool) -> None:
    """So does a copy with other options: they share their connections."""
    transport = httpx.MockTransport(Server())

    def ask() -> None:
        client = Client(transport=transport)
        asked = client.with_options(timeout=1) if copied else client
        client.close()
        with getattr(asked, method)("Why?"):
            pass

    async def ask_async() -> None:
        client = AsyncClient(transport=transport)
        asked = client.with_options(timeout=1) if copied else client
        await client.close()
        answer = getattr(asked, method)("Why?")
        await (answer if method == "chat" else answer.__aenter__())

    with pytest.raises(ClientError, match="this client is closed"):
        ask() if both.kind is Client else asyncio.run(ask_async())


def test_a_client_that_is_closed_while_it_waits_to_try_again_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(transport=httpx.MockTransport(Server(503)))
    monkeypatch.setattr("trimtab.clients.client.time", SimpleNamespace(sleep=lambda _: client.close()))
    with pytest.raises(ClientError, match="this client is closed"):
        client.chat("Why?")


# what is retried


@pytest.mark.parametrize("first", [408, 409, 429, 500, httpx.ConnectError("x")])
def test_a_passing_failure_is_retried(both: Both, naps: list[float], first: int | Exception) -> None:
    server = Server(first, httpx.RemoteProtocolError("hung up"), httpx.Response(200, json=CHAT))
    assert both.call(server, "chat", "Why?").text == "The sky"
    assert len({request.content for request in server.requests}) == 1
    assert 0.3 < naps[0] <= 0.5 < 0.7 < naps[1] <= 1.0


@pytest.mark.parametrize(("status", "header", "attempts"), [(503, "false", 1), (400, "true", 2), (503, "maybe", 2)])
def test_the_server_has_the_last_word_on_retries(
    both: Both, naps: list[float], status: int, header: str, attempts: int
) -> None:
    server = Server(refusal(status, {"x-should-retry": header}), 404)
    with pytest.raises(StatusError):
        both.call(server, "chat", "Why?")
    assert len(server.requests) == attempts
    assert len(naps) == attempts - 1


def test_milliseconds_go_before_seconds(both: Both, naps: list[float]) -> None:
    answers = [{"retry-after-ms": "250", "retry-after": "7"}, {"retry-after-ms": "soon", "retry-after": "7"}]
    both.call(Server(*(refusal(429, headers) for headers in answers), httpx.Response(200, json=CHAT)), "chat", "Why?")
    assert naps == [0.25, 7.0]


@pytest.mark.parametrize("answer", [400, 404, httpx.ReadTimeout("slow")])
def test_a_lasting_failure_is_not(both: Both, naps: list[float], answer: int | Exception) -> None:
    with pytest.raises(ClientError):
        both.call(Server(answer), "chat", "Why?")
    assert naps == []


def test_it_gives_up_after_max_retries(both: Both, naps: list[float]) -> None:
    server = Server(*[refusal(503, message=f"full {n}") for n in range(4)])
    with pytest.raises(ServerError, match="full 3"):
        both.call(server, "chat", "Why?", settings={"max_retries": 3})
    assert len(naps) == 3


def test_retry_after_is_obeyed(both: Both, naps: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    answers = [refusal(503, {"retry-after": "7"}), refusal(429, {"retry-after": date}), httpx.Response(200, json=CHAT)]
    both.call(Server(*answers), "chat", "Why?")
    assert naps[0] == 7.0
    assert 20 < naps[1] <= 30


@pytest.mark.parametrize(("value", "waited"), [("2.5", 2.5), ("0", 0.0), (" 3 ", 3.0)])
def test_retry_after_may_be_a_fraction(both: Both, naps: list[float], value: str, waited: float) -> None:
    both.call(Server(refusal(503, {"retry-after": value}), httpx.Response(200, json=CHAT)), "chat", "Why?")
    assert naps == [waited]


@pytest.mark.parametrize("value", ["", "soon", "-1", "nan", "1e3", "1.", "1 Jan 99999999999999999999 00:00:00 GMT"])
def test_a_retry_after_that_says_nothing_is_as_none(both: Both, naps: list[float], value: str) -> None:
    both.call(Server(refusal(503, {"retry-after": value}), httpx.Response(200, json=CHAT)), "chat", "Why?")
    assert 0.3 < naps[0] <= 0.5


def test_a_retry_after_beyond_patience_is_raised_at_once(both: Both, naps: list[float]) -> None:
    with pytest.raises(RateLimit) as caught:
        both.call(Server(refusal(429, {"retry-after": "3600"})), "chat", "Why?")
    assert caught.value.retry_after == 3600
    assert naps == []


@pytest.mark.parametrize("value", ["soon", "-1", "", "1e999", "²"])
def test_a_retry_after_that_says_nothing_is_backed_off(both: Both, naps: list[float], value: str) -> None:
    header = {"retry-after": value.encode("utf-8")}
    first = httpx.Response(503, headers=header)
    both.call(Server(first, httpx.Response(200, json=CHAT)), "chat", "Why?")
    assert 0 < naps[0] <= 0.5


def test_waits_double_up_to_the_longest() -> None:
    retries = Retries(limit=20)
    waits = [retries.after_error(attempt, httpx.ConnectError("x")) for attempt in range(20)]
    assert all(wait is not None and 0.75 * cap <= wait <= cap
               for wait, cap in zip(waits, [0.5, 1, 2, 4] + [8.0] * 16, strict=True))  # fmt: skip
    assert retries.after_error(20, httpx.ConnectError("x")) is None


# where it is redirected to


def moved(location: str, status: int = 307) -> httpx.Response:
    return httpx.Response(status, headers={"location": location})


@pytest.mark.parametrize("status", [307, 308])
def test_a_redirect_is_followed_with_the_same_body(both: Both, status: int) -> None:
    server = Server(moved("/there/v1/chat/completions", status), httpx.Response(200, json=CHAT))
    settings = {"base_url": "http://h:1", "api_key": "k", "timeout": 7.0}
    assert both.call(server, "chat", "Why?", settings=settings).text == "The sky"
    first, second = server.requests
    assert (second.method, second.content, second.headers) == ("POST", first.content, first.headers)
    assert str(second.url) == "http://h:1/there/v1/chat/completions"
    assert second.extensions["timeout"] == {"connect": 5.0, "read": 7.0, "write": 7.0, "pool": 7.0}


def test_a_key_does_not_go_to_another_origin(both: Both) -> None:
    server = Server(moved("http://other:2/v1/chat/completions"), httpx.Response(200, json=CHAT))
    both.call(server, "chat", "Why?", settings={"base_url": "http://h:1", "api_key": "k"})
    assert [request.headers.get("authorization") for request in server.requests] == ["Bearer k", None]
    assert server.requests[1].headers["host"] == "other:2"


def test_headers_do_not_go_to_another_origin_either(both: Both) -> None:
    ways = [("http://h:1/there", "s"), ("http://other:2", None), ("http://h:1/back", None)]
    server = Server(*(moved(url) for url, _ in ways), httpx.Response(200, json=CHAT))
    settings = {"base_url": "http://h:1", "headers": {"x-api-key": "s", "Host": "virtual", "Content-Type": "a/json"}}
    both.call(server, "chat", "Why?", settings=settings)
    assert [request.headers.get("x-api-key") for request in server.requests[1:]] == [key for _, key in ways]
    assert [request.headers["host"] for request in server.requests] == ["virtual", "virtual", "other:2", "h:1"]
    assert {request.headers["content-type"] for request in server.requests} == {"a/json"}


def test_headers_go_on_to_the_same_server_by_https_and_not_back(both: Both) -> None:
    server = Server(moved("https://h/v1"), moved("http://h/v1"), httpx.Response(200, json=CHAT))
    both.call(server, "chat", "Why?", settings={"base_url": "http://h", "headers": {"x-api-key": "s"}})
    assert [request.headers.get("x-api-key") for request in server.requests] == ["s", "s", None]


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_that_would_lose_the_body_says_where_to_go(both: Both, status: int, naps: list[float]) -> None:
    there = "https://h/v1/chat/completions"
    for ask in (both.call, both.stream):
        server = Server(moved(there, status), httpx.Response(200, json=CHAT))
        body = Body(b"moved")
        server.answers[0] = httpx.Response(status, headers={"location": there}, stream=body)
        with pytest.raises(BadAnswer, match=rf"HTTP {status}\) to {there}.*base_url, without /chat/completions"):
            ask(server, *(["chat"] if ask == both.call else []), "Why?")
        assert len(server.requests) == 1
        assert body.closed
    assert naps == []


@pytest.mark.parametrize("status", [301, 302, 303])
def test_what_has_no_body_loses_none(both: Both, status: int) -> None:
    server = Server(moved("https://h/v1/models", status), httpx.Response(200, json={"object": "list", "data": []}))
    assert both.call(server, "models", settings={"base_url": "http://h"}) == []
    assert [(request.method, request.url.scheme) for request in server.requests] == [("GET", "http"), ("GET", "https")]


def test_what_a_redirect_leads_to_is_retried_from_the_start(both: Both, naps: list[float]) -> None:
    answers = [moved("/there"), refusal(503, {"retry-after": "2"}), moved("/there"), httpx.Response(200, json=CHAT)]
    server = Server(*answers)
    both.call(server, "chat", "Why?")
    paths = [request.url.path for request in server.requests]
    assert paths == ["/v1/chat/completions", "/there"] * 2
    assert naps == [2.0]


def test_a_redirected_stream_adds_up(both: Both) -> None:
    server = Server(moved("/there"), httpx.Response(200, stream=Body(EVENTS)))
    _, stream = both.stream(server, "Why?")
    assert stream.text == "The sky"
    assert (server.requests[1].url.path, server.body["stream"]) == ("/there", True)


def test_a_form_is_sent_again_where_a_redirect_leads(both: Both, tmp_path: Path) -> None:
    for name in ("correction.json", "correction.safetensors"):
        (tmp_path / name).write_bytes(b"some bytes")
    server = Server(moved("/there"), httpx.Response(200, json={"id": "brief"}))
    both.call(server, "upload_correction", tmp_path, "brief")
    first, second = server.requests
    assert first.content == second.content
    assert b"some bytes" in second.content


def test_redirects_in_a_circle_come_to_an_end(both: Both, naps: list[float]) -> None:
    server = Server(*(moved("/round") for _ in range(99)))
    with pytest.raises(BadAnswer, match=r"redirect.*base_url"):
        both.call(server, "chat", "Why?")
    assert (len(server.requests), naps) == (21, [])


def test_a_redirect_to_a_host_that_cannot_be_is_no_answer(both: Both) -> None:
    with pytest.raises(BadAnswer, match=r"redirects to a host.*base_url"):
        both.call(Server(moved("http://xn--/")), "chat", "Why?")


# streams

EVENTS = sse(
    {"choices": [{"index": 0, "delta": {"role": "assistant"}}]},
    piece("The", steering={"tokens": [RECEIPT]}),
    piece(" sky", steering={"tokens": [{**RECEIPT, "entropy": 0.5}]}),
    piece(finish_reason="stop", steering=TOTALS),
    {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}},
    b"[DONE]",
)


def test_an_error_that_is_null_is_none(both: Both) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "The"}}], "error": None, "created": 1.5}
    answer = both.stream(Server(httpx.Response(200, content=sse(chunk, b"[DONE]"))), "Why?")
    assert [chunk.text for chunk in answer[0]] == ["The"]


def test_a_stream_adds_up(both: Both) -> None:
    server = Server(httpx.Response(200, content=EVENTS))
    chunks, stream = both.stream(server, "Why?", steering="brief", max_tokens=9)
    assert server.body["stream"] is True
    assert server.body["stream_options"] == {"include_usage": True}
    assert server.body["max_tokens"] == 9
    assert [chunk.text for chunk in chunks] == ["", "The", " sky", "", ""]
    assert stream.text == "The sky"
    assert [receipt.entropy for receipt in stream.receipts] == [1.25, 0.5]
    assert stream.steering.model_dump(exclude={"tokens"}) == TOTALS
    assert (stream.finish_reason, stream.usage.total_tokens) == ("stop", 7)


def test_a_completion_streams_too(both: Both) -> None:
    events = sse(*({"choices": [{"index": i, "text": t}]} for i, t in [(0, " bl"), (1, " gr"), (0, "ue")]), b"[DONE]")
    chunks, stream = both.stream(Server(httpx.Response(200, content=events)), [1, 2], method="stream_complete")
    assert [chunk.choices[0].text for chunk in chunks] == [" bl", " gr", "ue"]
    assert stream.text == " blue"  # of choice 0


@pytest.mark.parametrize("reason", ["###", 0, 7, None])
def test_what_stopped_an_answer_is_read(both: Both, reason: Any) -> None:
    ended = {"index": 0, "text": "a", "finish_reason": "stop", "stop_reason": reason}
    answer = both.call(Server(httpx.Response(200, json={**COMPLETION, "choices": [ended]})), "complete", "a")
    assert answer.choices[0].stop_reason == reason
    events = sse({"choices": [{"index": 0, "text": "a"}]}, {"choices": [ended]}, {"choices": []}, b"[DONE]")
    _, stream = both.stream(Server(httpx.Response(200, content=events)), "a", method="stream_complete")
    assert (stream.finish_reason, stream.stop_reason) == ("stop", reason)


def test_a_stream_cut_short_is_an_error(both: Both) -> None:
    cut = EVENTS.replace(b"data: [DONE]", b": end")
    with pytest.raises(StreamFailed, match="incomplete"):
        both.stream(Server(httpx.Response(200, content=cut)), "Why?")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r"])
def test_an_end_without_its_blank_line_is_one(both: Both, end: bytes) -> None:
    whole = EVENTS.removesuffix(b"\n\n") + end
    _, stream = both.stream(Server(httpx.Response(200, stream=Body(whole[:-5], whole[-5:]))), "Why?")
    assert (stream.text, stream.usage.total_tokens) == ("The sky", 7)
    with pytest.raises(StreamFailed, match="incomplete"):
        both.stream(Server(httpx.Response(200, content=sse(piece("The")) + b"data: [DON" + end)), "Why?")


@pytest.mark.parametrize(
    ("events", "kind", "message"),
    [
        (
            sse(piece("The"), {"error": {"message": "engine died", "code": None}}, b"[DONE]"),
            StreamFailed,
            "engine died",
        ),
        (sse(piece("The"), {"error": None}, b"[DONE]"), StreamFailed, "without a message"),
        (sse(b"{"), BadAnswer, "not a chunk"),
        (sse(b"[" * 100_000), BadAnswer, "not a chunk"),
        (sse({"choices": [{"index": "x"}]}), BadAnswer, "not a chunk"),
    ],
)
def test_a_failure_in_the_middle_is_raised(both: Both, events: bytes, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        both.stream(Server(httpx.Response(200, content=events)), "Why?")


def test_a_failure_in_the_middle_says_all_that_a_refusal_does(both: Both) -> None:
    error = {"message": "no token is left", "type": "invalid_request_error", "param": "bad_words", "code": "c"}
    answer = httpx.Response(200, content=sse(piece("The"), {"error": error}), headers={"x-request-id": "r1"})
    with pytest.raises(StreamFailed, match="no token is left") as caught:
        both.stream(Server(answer), "Why?")
    told = caught.value
    assert (told.type, told.param, told.code) == ("invalid_request_error", "bad_words", "c")
    assert told.request_id == "r1"


def test_a_stream_that_breaks_tells_its_request_id(both: Both) -> None:
    for events in (Body(sse(piece("The"))), Body(sse(piece("The")), httpx.ReadError("reset"))):
        with pytest.raises(StreamFailed) as caught:
            both.stream(Server(httpx.Response(200, stream=events, headers={"x-request-id": "r1"})), "Why?")
        assert (caught.value.request_id, caught.value.code) == ("r1", None)


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A response's body that tells whether it was closed, and may break."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces, self.closed = pieces, False

    def __iter__(self) -> Iterator[bytes]:
        for part in self.pieces:
            if isinstance(part, Exception):
                raise part
            yield part

    async def __aiter__(self) -> Any:
        for part in self:
            yield part

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def test_leaving_a_stream_early_closes_it(both: Both) -> None:
    body = Body(*(sse(piece(str(n))) for n in range(9)))
    chunks, stream = both.stream(Server(httpx.Response(200, stream=body)), "Why?", limit=3)
    assert (len(chunks), stream.text) == (3, "012")
    assert body.closed


def test_a_connection_that_breaks_in_a_stream_is_an_error(both: Both) -> None:
    body = Body(sse(piece("The")), httpx.ReadError("reset"))
    with pytest.raises(StreamFailed, match="reset"):
        both.stream(Server(httpx.Response(200, stream=body)), "Why?")
    assert body.closed


@pytest.mark.parametrize("end", [b"data: [DONE]\n\n", b"data: [DONE] \n\n"])
def test_what_breaks_after_the_end_is_no_answers(both: Both, end: bytes) -> None:
    body = Body(sse(piece("The")), end, httpx.ReadError("reset"))
    chunks, stream = both.stream(Server(httpx.Response(200, stream=body)), "Why?")
    assert ([chunk.text for chunk in chunks], stream.text) == (["The"], "The")


def test_a_stream_goes_on_where_it_was_left_while_it_is_open() -> None:
    body = Body(*(sse(piece(str(n))) for n in range(5)), sse(b"[DONE]"))
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=body))
    with Client(transport=transport) as client, client.stream_chat("Why?") as stream:
        assert next(stream).text == "0"
        for chunk in stream:
            if chunk.text == "2":
                break
        assert "".join(chunk.text for chunk in stream) == "34"
        assert list(stream) == []
        assert stream.text == "01234"


def test_an_async_stream_goes_on_where_it_was_left() -> None:
    async def main() -> list[str]:
        body = Body(*(sse(piece(str(n))) for n in range(3)), sse(b"[DONE]"))
        transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=body))
        async with AsyncClient(transport=transport) as client, client.stream_chat("Why?") as stream:
            first = await anext(stream)
            return [first.text, *[chunk.text async for chunk in stream], *[chunk.text async for chunk in stream]]

    assert asyncio.run(main()) == ["0", "1", "2"]


def test_a_stream_that_was_left_early_is_never_taken_for_whole(both: Both) -> None:
    body = Body(*(sse(piece(str(n))) for n in range(9)))
    _, stream = both.stream(Server(httpx.Response(200, stream=body)), "Why?", limit=3)

    async def again() -> None:
        async for _ in stream:
            pass

    for _ in range(2):
        with pytest.raises(StreamFailed, match="read once, inside its `with` block"):
            asyncio.run(again()) if both.kind is AsyncClient else list(stream)


def test_a_stream_that_was_left_while_another_reads_it_says_so() -> None:
    class Cut(Body):
        def __iter__(self) -> Iterator[bytes]:
            yield sse(piece("0"))
            opened.close()  # as the other does meanwhile
            raise httpx.ReadError("[Errno 9] Bad file descriptor")

    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Cut()))
    left = pytest.raises(StreamFailed, match=r"^a stream can be read once, inside its `with` block$")
    with Client(transport=transport) as client, client.stream_chat("Why?") as opened, left:
        list(opened)


def test_a_stream_that_was_read_whole_is_still_whole_when_it_was_left(both: Both) -> None:
    _, stream = both.stream(Server(httpx.Response(200, content=EVENTS)), "Why?")

    async def again() -> list[Any]:
        return [chunk async for chunk in stream]

    assert (asyncio.run(again()) if both.kind is AsyncClient else list(stream)) == []


def test_an_answer_that_is_no_stream_is_a_bad_answer(both: Both) -> None:
    page = httpx.Response(200, text="<html>", headers={"content-type": "text/html"})
    with pytest.raises(BadAnswer, match="text/html, not with a stream: is base_url right"):
        both.stream(Server(page), "Why?")


def test_calls_without_an_index_are_told_apart_by_their_ids(both: Both) -> None:
    def delta(**call: Any) -> bytes:
        return sse({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]})

    body = Body(
        delta(id="a", type="function", function={"name": "f", "arguments": "{"}),
        delta(function={"arguments": "}"}),
        delta(id="b", type="function", function={"name": "g", "arguments": "{}"}),
        sse(b"[DONE]"),
    )
    _, stream = both.stream(Server(httpx.Response(200, stream=body)), "Why?")
    found = [(call.index, call.id, call.function.name, call.function.arguments) for call in stream.tool_calls]
    assert found == [(0, "a", "f", "{}"), (1, "b", "g", "{}")]


def test_a_refused_stream_is_retried_then_raised(both: Both, naps: list[float]) -> None:
    server = Server(refusal(503, {"retry-after": "2"}), refusal(401, message="whose key?"))
    with pytest.raises(Authentication, match="whose key"):
        both.stream(server, "Why?")
    assert naps == [2.0]


# the mirror


def test_the_clients_mirror_one_another() -> None:
    def surface(kind: type) -> dict[str, Any]:
        """Of each method: what it takes, and what it says it does."""
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: ([*inspect.signature(method).parameters], inspect.getdoc(method))
            for name, method in methods
            if not name.startswith("_") or name == "__init__"
        }

    assert surface(Client) == surface(AsyncClient)
    assert inspect.getdoc(Client) == inspect.getdoc(AsyncClient)
    assert all(told for name, (_, told) in surface(Client).items() if name != "close")
    assert {"chat", "respond", "score", "models", "stream_chat", "close"} < set(surface(Client))
