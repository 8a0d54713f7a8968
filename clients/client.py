"""Client: talk to a Trimtab server, or to any OpenAI-compatible one.

Invariant: it mirrors AsyncClient method by method, and they differ in `await` and in the event loop alone; what is
sent, retried, read and raised is decided in requests.py, connection.py, retry.py, types.py and errors.py, which know
nothing of either.

    with Client("http://127.0.0.1:8000") as client:
        answer = client.chat("Why is the sky blue?", steering="smollm2-135m-instructions", max_tokens=60)
        print(answer.text, answer.steering)
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, Unpack

import httpx

from trimtab.clients import requests
from trimtab.clients.connection import LIMITS, R, connection, open_http, read
from trimtab.clients.facts import Correction, CorrectionList, Deleted, Detokenized, Model, ModelList, Score, Tokens
from trimtab.clients.options import Extra, Messages, Options, Prompt, ResponseOptions, Steer, Text
from trimtab.clients.requests import Call
from trimtab.clients.responses import Response, ResponseEvent
from trimtab.clients.stream import C, Stream
from trimtab.clients.types import ChatChunk, ChatCompletion, Completion


class Client:
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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._connection = connection(base_url, api_key, admin_key, timeout, max_retries, headers)
        self._http = open_http(lambda: httpx.Client(transport=transport, limits=LIMITS))

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

    def chat(
        self, messages: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> ChatCompletion:
        """One answer (or n) to a string or a list of {role, content}, or of an earlier answer's messages.

        steering: a correction's name, or a Steering.
        options: those of `Options`, which has OpenAI's and vLLM's names (max_tokens, temperature, stop, tools ...)."""
        return self._get(requests.chat(messages, model, steering, options, stream=False), ChatCompletion)

    def stream_chat(
        self, messages: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> AbstractContextManager[Stream[ChatChunk]]:
        """As `chat`, piece by piece. Leaving the context early ends the generation."""
        return self._open(requests.chat(messages, model, steering, options, stream=True), ChatChunk)

    def complete(
        self, prompt: Prompt, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> Completion:
        """The continuation of a text, of token ids, or of a batch of either."""
        return self._get(requests.complete(prompt, model, steering, options, stream=False), Completion)

    def stream_complete(
        self, prompt: Prompt, *, model: str | None = None, steering: Steer = None, **options: Unpack[Options]
    ) -> AbstractContextManager[Stream[Completion]]:
        """As `complete`, piece by piece. Leaving the context early ends the generation."""
        return self._open(requests.complete(prompt, model, steering, options, stream=True), Completion)

    def respond(
        self, asked: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[ResponseOptions]
    ) -> Response:
        """An answer by /v1/responses, to a string or a list of input items, or of an earlier answer's."""
        return self._get(requests.respond(asked, model, steering, options, stream=False), Response)

    def stream_respond(
        self, asked: Messages, *, model: str | None = None, steering: Steer = None, **options: Unpack[ResponseOptions]
    ) -> AbstractContextManager[Stream[ResponseEvent]]:
        """As `respond`, event by event. Leaving the context early ends the generation."""
        return self._open(requests.respond(asked, model, steering, options, stream=True), ResponseEvent)

    # what is measured

    def score(
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
        return self._get(requests.score(prompt, completion, model, steering, extra), Score)

    def score_chat(
        self,
        messages: Messages,
        completion: Text,
        *,
        model: str | None = None,
        steering: Steer = None,
        extra: Extra = None,
    ) -> Score:
        """How likely the completion is as the chat's next message. extra: as of `score`."""
        return self._get(requests.score_chat(messages, completion, model, steering, extra), Score)

    def tokenize(
        self,
        text: Messages,
        *,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        extra: Extra = None,
    ) -> Tokens:
        """The token ids of a string, or of messages as the model's chat template writes them.

        extra: further keys of the body, such as tools or return_token_strs."""
        return self._get(requests.tokenize(text, model, add_special_tokens, extra), Tokens)

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        return self._get(requests.detokenize(tokens, model), Detokenized).prompt

    # what the server holds

    def models(self) -> list[Model]:
        """The models and corrections that the server offers."""
        return self._get(requests.list_models(), ModelList).data

    def model(self, name: str) -> Model:
        """One of them. Raises NotFound."""
        return self._get(requests.get_model(name), Model)

    def corrections(self) -> list[Correction]:
        """The corrections that the server holds."""
        return self._get(requests.list_corrections(), CorrectionList).data

    def correction(self, name: str) -> Correction:
        """One of them: how it acts, how it was made, and its report. Raises NotFound."""
        return self._get(requests.get_correction(name), Correction)

    def add_correction(self, name: str, path: str) -> Correction:
        """Load a folder on the server's machine, or a model hub's id. A name that is taken is replaced at once."""
        return self._get(requests.add_correction(name, path), Correction)

    def upload_correction(self, folder: str | Path, name: str | None = None) -> Correction:
        """Send a folder of this machine. A name (the folder's, unless given) that is taken is replaced at once."""
        return self._get(requests.upload_correction(folder, name), Correction)

    def delete_correction(self, name: str) -> bool:
        """Take a correction away; answers under way finish with it. Raises NotFound."""
        return self._get(requests.delete_correction(name), Deleted).deleted

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _get(self, call: Call, kind: type[R]) -> R:
        return read(self._send(call, stream=False), kind)

    @contextmanager
    def _open(self, call: Call, kind: type[C]) -> Iterator[Stream[C]]:
        response = self._send(call, stream=True)
        stream = Stream(response, kind)
        try:
            yield stream
        finally:
            stream.close()

    def _send(self, call: Call, stream: bool) -> httpx.Response:
        """-> a successful response (read, unless streamed), after as many attempts as are allowed."""
        for attempt in count():
            cause: httpx.RequestError | None = None
            try:
                response = self._follow(call, stream)
                if response.is_success:
                    return response
                response.read()
                verdict = self._connection.after_response(attempt, response)
            except httpx.RequestError as error:
                verdict, cause = self._connection.after_error(attempt, error), error
            if verdict.wait is None:
                raise verdict.error from cause
            time.sleep(verdict.wait)
        raise AssertionError("count() does not end")

    def _follow(self, call: Call, stream: bool) -> httpx.Response:
        """-> what answers, where redirects lead. Raises BadAnswer for one that cannot be followed."""
        request = self._connection.request(self._http, call)
        for followed in count():
            try:
                response = self._http.send(request, stream=stream)
            except UnicodeError as error:
                raise self._connection.misled(error) from error
            if not response.has_redirect_location:
                return response
            response.read()
            request = self._connection.onward(call, response, followed)
        raise AssertionError("count() does not end")
