"""Text to tokens and back, in vLLM's shape: /tokenize, /detokenize, /tokenizer_info; and /version.

Invariant: a chat is tokenised by the code that a generation uses, so that `count` is what its usage would say;
also where it does not fit the context, up to a length that the prompter bounds.

    add_routes(app, service)
"""

import json
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from trimtab import __version__
from trimtab.clients import facts
from trimtab.errors import InvalidRequest
from trimtab.server import chat
from trimtab.server.many import Bounded, Many, Most
from trimtab.server.messages import Messages
from trimtab.server.prompt import WHOLE, Ids
from trimtab.server.schema import ChatBody
from trimtab.server.service import Service
from trimtab.server.wire import or_gone

_PATHS = {"name_or_path", "vocab_file", "tokenizer_file", "merges_file"}  # where the files lie concerns nobody


class TokenizeBody(Bounded, extra="allow"):
    """POST /tokenize: a prompt or a chat's messages. Further keys are read as a chat's."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Raise InvalidRequest for what does not go together."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("send either prompt or messages", "prompt")
        if self.messages is not None and self.add_special_tokens:
            message = "add_special_tokens must not be true with messages: the chat template writes them"
            raise InvalidRequest(message, "add_special_tokens")

    def chat(self) -> ChatBody:
        """The chat that is tokenised. Raises RequestValidationError."""
        own = ("prompt", "add_special_tokens", "return_token_strs")
        try:
            return ChatBody.model_validate({key: value for key, value in self if key not in own and value is not None})
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error


class DetokenizeBody(Bounded, extra="allow"):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[Many[int], Most(WHOLE)]


class TokenizerInfo(BaseModel, extra="allow"):
    """How the tokenizer was made: what its configuration says."""

    tokenizer_class: str
    chat_template: str | dict[str, str] | None


class Version(BaseModel):
    """Of the server."""

    version: str


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the four routes."""
    prompter = service.prompter

    async def read(body: TokenizeBody) -> Ids:
        body.check()
        service.catalogue.choose(body.model, None)
        if body.prompt is not None:
            (ids,) = await prompter.text([body.prompt], body.add_special_tokens is not False, "whole")
            return ids
        asked = body.chat()
        return await chat.renderer(service, asked, "whole")([message.for_template() for message in asked.messages])

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody, request: Request) -> facts.Tokens:
        """Turn a prompt or a chat into the ids that a generation would read."""
        ids = await or_gone(request.receive, read(body))
        strings = await prompter.strings(ids) if body.return_token_strs else None
        return facts.Tokens(count=len(ids), max_model_len=service.max_len, tokens=list(ids), token_strs=strings)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> facts.Detokenized:
        """Turn ids into text, special tokens included."""
        service.catalogue.choose(body.model, None)
        if not all(map(prompter.knows, body.tokens)):
            raise InvalidRequest("tokens holds an id that the tokenizer does not have", "tokens")
        (text,) = await prompter.decode([tuple(body.tokens)])
        return facts.Detokenized(prompt=text)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """Tell how the tokenizer was made, its chat template included."""
        told = {name: value for name, value in prompter.info().items() if name not in _PATHS and _is_json(value)}
        return TokenizerInfo(**told)

    @app.get("/version")
    async def version() -> Version:
        """Tell the server's version."""
        return Version(version=__version__)


def _is_json(value: object) -> bool:
    """Whether a value of a tokenizer's configuration can be told."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
