"""AsyncClient: talk to a Trimtab server, or to any OpenAI-compatible one.

Invariant: it mirrors Client method by method, and they differ in `await` and in the event loop alone; what is sent,
retried, read and raised is decided in requests.py, connection.py, retry.py, types.py and errors.py, which know nothing
of either.

    async with AsyncClient("http://127.0.0.1:8000") as client:
        answer = await client.chat("Why is the sky blue?", steering="smollm2-135m-instructions", max_tokens=60)
        print(answer.text, answer.steering)
"""

import asyncio
import copy
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, Unpack

import httpx

from trimtab.clients import requests
from trimtab.clients.connection import LIMITS, R, connection, open_http, read
from trimtab.clients.errors import ClientError
from trimtab.clients.facts import Correction, CorrectionList, Deleted, Detokenized, Model, ModelList, Score, Tokens
from trimtab.clients.options import Extra, Messages, Options, Prompt, ResponseOptions, Steer, Text
from trimtab.clients.requests import Call
from trimtab.clients.responses import Response, ResponseEvent
from trimtab.clients.stream import AsyncStream, C
from trimtab.clients.types import ChatChunk, ChatCompletion, Completion


class AsyncClient:
    """base_url: the server, with /v1 or without. timeout: seconds between two signs of life of the
    server; None: for ever. headers: sent with every request, though not where a redirect leads to another origin.

    max_retries: further attempts after 408, 409, 429, 5xx and broken connections. transport: any httpx transport.
    admin_key: for changing the server's corrections; the api_key, unless given. An address or a key that is left out
    comes from TRIMTAB_BASE_URL, TRIMTAB_API_KEY or TRIMTAB_ADMIN_KEY; of several keys there, the first. An empty key is
    none.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float | None = 600.0,
        max_retries: int = 2,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._connection = connection(base_url, api_key, admin_key, timeout, max_retries, headers)
        self._http = open_http(lambda: httpx.AsyncClient(transport=transport, limits=LIMITS))

    def with_options(
        self,
        *,
        timeout: float | Literal["same"] | None = "same",
        max_retries: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Self:
        """This client with another timeout (None: for ever), other retries or further headers, over the same
        connections: they are closed together."""
        other = copy.copy(self)
        other._connection = self._connection.changed(timeout, max_retries, headers)
        return other

    # what is generated

    async def chat(
        self, messages: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> ChatCompletion:
        """One answer (or n) to a string or a list of {role, content}, or of an earlier answer's messages.

        steering: a correction's name, or a Steering.
        options: those of `Options`, which has OpenAI's and vLLM's names (max_tokens, temperature, stop, tools ...)."""
        return await self._get(requests.chat(messages, model, steering, options, stream=False), ChatCompletion)

    def stream_chat(
        self, messages: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> AbstractAsyncContextManager[AsyncStream[ChatChunk]]:
        """As `chat`, piece by piece. Leaving the context early ends the generation."""
        return self._open(requests.chat(messages, model, steering, options, stream=True), ChatChunk)

    async def complete(
        self, prompt: Prompt, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> Completion:
        """The continuation of a text, of token ids, or of a batch of either."""
        return await self._get(requests.complete(prompt, model, steering, options, stream=False), Completion)

    def stream_complete(
        self, prompt: Prompt, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> AbstractAsyncContextManager[AsyncStream[Completion]]:
        """As `complete`, piece by piece. Leaving the context early ends the generation."""
        return self._open(requests.complete(prompt, model, steering, options, stream=True), Completion)

    async def respond(
        self, asked: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[ResponseOptions]
    ) -> Response:
        """An answer by /v1/responses, to a string or a list of input items, or of an earlier answer's."""
        return await self._get(requests.respond(asked, model, steering, options, stream=False), Response)

    def stream_respond(
        self, asked: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[ResponseOptions]
    ) -> AbstractAsyncContextManager[AsyncStream[ResponseEvent]]:
        """As `respond`, event by event. Leaving the context early ends the generation."""
        return self._open(requests.respond(asked, model, steering, options, stream=True), ResponseEvent)

    # what is measured

    async def score(
        self,
        prompt: Text,
        completion: Text,
        *,
        model: str | None = None,
        steering: Steer = None,
        extra: Extra = None,
    ) -> Score:
        """How likely the completion is after the prompt: a receipt for each of its tokens. Nothing is drawn.

        extra: further keys of the body, such as seed."""
        return await self._get(requests.score(prompt, completion, model, steering, extra), Score)

    async def score_chat(
        self,
        messages: Messages,
        completion: Text,
        *,
        model: str | None = None,
        steering: Steer = None,
        extra: Extra = None,
    ) -> Score:
        """How likely the completion is as the chat's next message. extra: as of `score`."""
        return await self._get(requests.score_chat(messages, completion, model, steering, extra), Score)

    async def tokenize(
        self,
        text: Messages,
        *,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        extra: Extra = None,
    ) -> Tokens:
        """The token ids of a string, or of messages as the model's chat template writes them.

        extra: further keys of the body, such as tools or return_token_strs."""
        return await self._get(requests.tokenize(text, model, add_special_tokens, extra), Tokens)

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        return (await self._get(requests.detokenize(tokens, model), Detokenized)).prompt

    # what the server holds

    async def models(self) -> list[Model]:
        """The models and corrections that the server offers."""
        return (await self._get(requests.list_models(), ModelList)).data

    async def model(self, name: str) -> Model:
        """One of them. Raises NotFound."""
        return await self._get(requests.get_model(name), Model)

    async def corrections(self) -> list[Correction]:
        """The corrections that the server holds."""
        return (await self._get(requests.list_corrections(), CorrectionList)).data

    async def correction(self, name: str) -> Correction:
        """One of them: how it acts, how it was made, and its report. Raises NotFound."""
        return await self._get(requests.get_correction(name), Correction)

    async def add_correction(self, name: str, path: str) -> Correction:
        """Load a folder on the server's machine, or a model hub's id. A name that is taken is replaced at once."""
        return await self._get(requests.add_correction(name, path), Correction)

    async def upload_correction(self, folder: str | Path, name: str | None = None) -> Correction:
        """Send a folder of this machine. A name (the folder's, unless given) that is taken is replaced at once."""
        return await self._get(requests.upload_correction(folder, name), Correction)

    async def delete_correction(self, name: str) -> bool:
        """Take a correction away; answers under way finish with it. Raises NotFound."""
        return (await self._get(requests.delete_correction(name), Deleted)).deleted

    async def close(self) -> None:
        with _one_loop():
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _get(self, call: Call, kind: type[R]) -> R:
        return read(await self._send(call, stream=False), kind)

    @asynccontextmanager
    async def _open(self, call: Call, kind: type[C]) -> AsyncIterator[AsyncStream[C]]:
        response = await self._send(call, stream=True)
        stream = AsyncStream(response, kind)
        try:
            yield stream
        finally:
            await stream.close()

    async def _send(self, call: Call, stream: bool) -> httpx.Response:
        """-> a successful response (read, unless streamed), after as many attempts as are allowed."""
        for attempt in count():
            cause: httpx.RequestError | None = None
            try:
                with _one_loop():
                    response = await self._follow(call, stream)
                if response.is_success:
                    return response
                await response.aread()
                verdict = self._connection.after_response(attempt, response)
            except httpx.RequestError as error:
                verdict, cause = self._connection.after_error(attempt, error), error
            if verdict.wait is None:
                raise verdict.error from cause
            await asyncio.sleep(verdict.wait)
        raise AssertionError("count() does not end")

    async def _follow(self, call: Call, stream: bool) -> httpx.Response:
        """-> what answers, where redirects lead. Raises BadAnswer for one that cannot be followed."""
        request = self._connection.request(self._http, call)
        for followed in count():
            try:
                response = await self._http.send(request, stream=stream)
            except UnicodeError as error:
                raise self._connection.misled(error) from error
            if not response.has_redirect_location:
                return response
            await response.aread()
            request = self._connection.onward(call, response, followed)
        raise AssertionError("count() does not end")


@contextmanager
def _one_loop() -> Iterator[None]:
    """Connections belong to the event loop that opened them. Raises ClientError where it was another."""
    try:
        yield
    except RuntimeError as error:
        if "loop" not in str(error):  # "Event loop is closed", "... attached to a different loop"
            raise
        told = "this client belongs to the event loop in which it was used first: make another for this one"
        raise ClientError(told) from error
