"""Client and AsyncClient: talk to a Trimtab server, or to any OpenAI-compatible one.

Invariant: the two mirror one another method by method, and differ in `await` alone; what is sent, retried, read and
raised is decided in requests.py, retry.py, types.py and errors.py, which know nothing of either.

    with Client("http://127.0.0.1:8000") as client:
        answer = client.chat("Why is the sky blue?", steering="brief", max_tokens=60)
        print(answer.text, answer.steering)
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from trimtab.clients import requests
from trimtab.clients.errors import BadAnswer, status_error, transport_error
from trimtab.clients.requests import Call, Messages, Options, Prompt, Steer
from trimtab.clients.retry import Retries, retry_after
from trimtab.clients.stream import AsyncStream, C, Stream
from trimtab.clients.types import ChatChunk, ChatCompletion, Completion, Model
from trimtab.errors import InvalidRequest

DEFAULT_URL = "http://127.0.0.1:8000/v1"
_CONNECT_TIMEOUT = 5.0
R = TypeVar("R")


class _ModelList(BaseModel):
    data: list[Model]


class Client:
    """base_url: the server, with or without /v1. timeout: seconds between two signs of life of the server.

    max_retries: further attempts after 408, 409, 429, 5xx and broken connections. transport: any httpx transport.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retries = Retries(max_retries)
        self._http = httpx.Client(**_settings(base_url, api_key, timeout), transport=transport)

    def models(self) -> list[Model]:
        """The models and corrections that the server offers."""
        return self._get(requests.list_models(), _ModelList).data

    def chat(
        self, messages: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> ChatCompletion:
        """One answer (or n) to a string or a list of {role, content}. steering: a correction's name, or a Steering."""
        return self._get(requests.chat(messages, model, steering, options, stream=False), ChatCompletion)

    def complete(
        self, prompt: Prompt, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> Completion:
        """The continuation of a text, of token ids, or of a batch of either."""
        return self._get(requests.complete(prompt, model, steering, options, stream=False), Completion)

    def stream_chat(
        self, messages: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> AbstractContextManager[Stream[ChatChunk]]:
        """As `chat`, piece by piece. Leaving the context early ends the generation."""
        return self._open(requests.chat(messages, model, steering, options, stream=True), ChatChunk)

    def stream_complete(
        self, prompt: Prompt, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> AbstractContextManager[Stream[Completion]]:
        """As `complete`, piece by piece. Leaving the context early ends the generation."""
        return self._open(requests.complete(prompt, model, steering, options, stream=True), Completion)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _get(self, call: Call, kind: type[R]) -> R:
        return _parse(self._send(call, stream=False), kind)

    @contextmanager
    def _open(self, call: Call, kind: type[C]) -> Iterator[Stream[C]]:
        response = self._send(call, stream=True)
        try:
            yield Stream(response, kind)
        finally:
            response.close()

    def _send(self, call: Call, stream: bool) -> httpx.Response:
        """-> a successful response (read, unless streamed), after as many attempts as are allowed."""
        for attempt in count():
            request = self._http.build_request(call.method, call.path, json=call.body)
            try:
                response = self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                response.read()
            except httpx.RequestError as error:
                wait = self._retries.after_error(attempt, error)
                if wait is None:
                    raise transport_error(error, str(self._http.base_url)) from error
            else:
                wait = self._retries.after_response(attempt, response)
                if wait is None:
                    raise status_error(response, retry_after(response))
            time.sleep(wait)
        raise AssertionError("count() does not end")


class AsyncClient:
    """base_url: the server, with or without /v1. timeout: seconds between two signs of life of the server.

    max_retries: further attempts after 408, 409, 429, 5xx and broken connections. transport: any httpx transport.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retries = Retries(max_retries)
        self._http = httpx.AsyncClient(**_settings(base_url, api_key, timeout), transport=transport)

    async def models(self) -> list[Model]:
        """The models and corrections that the server offers."""
        return (await self._get(requests.list_models(), _ModelList)).data

    async def chat(
        self, messages: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> ChatCompletion:
        """One answer (or n) to a string or a list of {role, content}. steering: a correction's name, or a Steering."""
        return await self._get(requests.chat(messages, model, steering, options, stream=False), ChatCompletion)

    async def complete(
        self, prompt: Prompt, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> Completion:
        """The continuation of a text, of token ids, or of a batch of either."""
        return await self._get(requests.complete(prompt, model, steering, options, stream=False), Completion)

    def stream_chat(
        self, messages: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> AbstractAsyncContextManager[AsyncStream[ChatChunk]]:
        """As `chat`, piece by piece. Leaving the context early ends the generation."""
        return self._open(requests.chat(messages, model, steering, options, stream=True), ChatChunk)

    def stream_complete(
        self, prompt: Prompt, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> AbstractAsyncContextManager[AsyncStream[Completion]]:
        """As `complete`, piece by piece. Leaving the context early ends the generation."""
        return self._open(requests.complete(prompt, model, steering, options, stream=True), Completion)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _get(self, call: Call, kind: type[R]) -> R:
        return _parse(await self._send(call, stream=False), kind)

    @asynccontextmanager
    async def _open(self, call: Call, kind: type[C]) -> AsyncIterator[AsyncStream[C]]:
        response = await self._send(call, stream=True)
        try:
            yield AsyncStream(response, kind)
        finally:
            await response.aclose()

    async def _send(self, call: Call, stream: bool) -> httpx.Response:
        """-> a successful response (read, unless streamed), after as many attempts as are allowed."""
        for attempt in count():
            request = self._http.build_request(call.method, call.path, json=call.body)
            try:
                response = await self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                await response.aread()
            except httpx.RequestError as error:
                wait = self._retries.after_error(attempt, error)
                if wait is None:
                    raise transport_error(error, str(self._http.base_url)) from error
            else:
                wait = self._retries.after_response(attempt, response)
                if wait is None:
                    raise status_error(response, retry_after(response))
            await asyncio.sleep(wait)
        raise AssertionError("count() does not end")


def _settings(base_url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    """httpx's settings, the same for both clients."""
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError) as error:
        raise InvalidRequest(f"base_url {base_url!r} is not a URL: {error}", "base_url") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidRequest(f"base_url must look like {DEFAULT_URL}, not {base_url!r}", "base_url")
    if url.path in ("", "/"):
        url = url.copy_with(path="/v1")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise InvalidRequest("api_key must be printable ASCII, as it travels in a header", "api_key")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return {"base_url": url, "headers": headers, "timeout": httpx.Timeout(timeout, connect=_CONNECT_TIMEOUT)}


def _parse(response: httpx.Response, kind: type[R]) -> R:
    try:
        return TypeAdapter(kind).validate_json(response.content)
    except ValidationError as error:
        raise BadAnswer(f"{response.url} did not answer in this API's shape: is base_url right? ({error})") from error
