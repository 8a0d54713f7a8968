"""Both clients over a mock transport, and what a server may answer: no socket, and no waiting.

both.call(Server(httpx.Response(200, json=CHAT)), "chat", "Why?")     # on Client or AsyncClient
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx

from trimtab.clients import AsyncClient, Client

Handler = Callable[[httpx.Request], httpx.Response]
RECEIPT = {
    "token": " sky", "token_id": 7, "entropy": 1.25, "open": True, "fired": True, "flip": True,
    "base_token": " sea", "base_token_id": 8, "steered_token": " sky", "steered_token_id": 7,
    "base_logprob": -1.5, "steered_logprob": -0.25, "base_token_logprob": -0.5, "steered_token_logprob": -0.25,
    "statistic": 1.25, "kl": 0.5, "strength": 1.0,
}  # fmt: skip
TOTALS = {
    "correction": "brief", "version": "0a1b2c", "corrections": {"brief": 1.0, "kind": 0.5}, "mode": "apply",
    "strength": 1.0,
    "gate": "entropy", "tau": 0.5, "ceiling": None,
    "steps": 2, "open": 1, "fired": 1, "flips": 1, "mean_entropy": 0.75, "kl": 0.5,
}  # fmt: skip
CHAT = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "demo", "shade": "new",
    "choices": [{
        "index": 0, "message": {"role": "assistant", "content": "The sky"}, "finish_reason": "stop",
        "logprobs": {"content": [{
            "token": "The", "logprob": -0.5, "bytes": [84], "top_logprobs": [{"token": "The", "logprob": -0.5}],
        }]},
        "steering": {**TOTALS, "tokens": [RECEIPT]},
    }],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
}  # fmt: skip
COMPLETION = {"id": "cmpl-1", "model": "demo", "choices": [{"index": 0, "text": " blue", "finish_reason": "length"}]}


class Both:
    """Runs the same call on Client or AsyncClient, over a handler."""

    def __init__(self, kind: type[Client] | type[AsyncClient]) -> None:
        self.kind = kind

    def call(self, handler: Handler, method: str, *args: Any, settings: dict[str, Any] | None = None, **kw: Any) -> Any:
        transport = httpx.MockTransport(handler)
        if self.kind is Client:
            with Client(**settings or {}, transport=transport) as client:
                return getattr(client, method)(*args, **kw)

        async def main() -> Any:
            async with AsyncClient(**settings or {}, transport=transport) as client:
                return await getattr(client, method)(*args, **kw)

        return asyncio.run(main())

    def stream(self, handler: Handler, *args: Any, method: str = "stream_chat", limit: int = 99, **kw: Any) -> Any:
        """-> (the chunks, at most `limit`, and the stream)."""
        transport = httpx.MockTransport(handler)
        chunks: list[Any]
        if self.kind is Client:
            chunks = []
            with Client(transport=transport) as client, getattr(client, method)(*args, **kw) as stream:
                for chunk in stream:
                    chunks.append(chunk)
                    if len(chunks) == limit:
                        break
            return chunks, stream

        async def main() -> Any:
            chunks = []
            async with AsyncClient(transport=transport) as client, getattr(client, method)(*args, **kw) as stream:
                async for chunk in stream:
                    chunks.append(chunk)
                    if len(chunks) == limit:
                        break
            return chunks, stream

        return asyncio.run(main())


class Server:
    """Answers in turn, and keeps the requests. A number is a refusal with that status, an exception is raised."""

    def __init__(self, *answers: httpx.Response | Exception | int) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return refusal(answer) if isinstance(answer, int) else answer

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)


def refusal(status: int, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    error = {"message": "no", "type": None, "param": None, "code": None, **fields}
    return httpx.Response(status, json={"error": error}, headers=headers)


def sse(*events: Any) -> bytes:
    return b"".join(b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events)


def piece(content: str | None = None, **choice: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {"id": "chatcmpl-1", "model": "demo", "choices": [{"index": 0, "delta": delta, **choice}]}
