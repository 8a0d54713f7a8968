"""The HTTP application: OpenAI's routes over an engine.

Invariant: a handler holds no state and does no work of its own: it reads the body, prepares a generation and answers
with it. The engine starts with the app and is closed with it.

    app = create_app(engine, base, bank);  uvicorn.run(app)
"""

import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from trimtab.clients import facts
from trimtab.server import chat, completions, corrections, http_errors, openapi, page, score, tokens
from trimtab.server.apart import Apart
from trimtab.server.catalogue import Catalogue
from trimtab.server.drain import Lifecycle
from trimtab.server.engine.engine import Engine
from trimtab.server.engine.pieces import Pieces
from trimtab.server.front_door import FrontDoor
from trimtab.server.generation import Generation
from trimtab.server.keys import Keys
from trimtab.server.metrics import Metrics
from trimtab.server.model.base import Base
from trimtab.server.prompt import Prompter
from trimtab.server.responses import endpoint as responses
from trimtab.server.responses.body import ResponseBody
from trimtab.server.schema import Body, ChatBody, CompletionBody
from trimtab.server.service import Service
from trimtab.server.swap import Swap
from trimtab.server.tickets import Tickets, tune_interpreter
from trimtab.server.visit import Observer
from trimtab.server.wire import EventStream, or_gone
from trimtab.steering.bank import Bank

log = logging.getLogger(__name__)

B = TypeVar("B", bound=Body)
Prepared = Coroutine[Any, Any, Generation]


def create_app(
    engine: Engine,
    base: Base,
    bank: Bank,
    *,
    names: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    keep_alive: float = 10.0,
    admin_keys: Sequence[str] = (),
    corrections_root: Path | None = None,
    max_per_key: int | None = None,
    lifecycle: Lifecycle | None = None,
    observers: Sequence[Observer] = (),
    defaults: Mapping[str, Any] | None = None,
    trust_templates: bool = False,
    origins: Sequence[str] = (),
    with_page: bool = True,
) -> FastAPI:
    """names: what the base is called, the first being the default; base.name when empty. api_keys: none means open.

    keep_alive: seconds of silence after which a stream sends a comment. admin_keys: none means that corrections stay as
    they are. corrections_root: where those that are loaded must lie. defaults: of sampling, where a body is silent.
    trust_templates: requests may bring a chat template. origins: whose pages may call from a browser. with_page:
    whether there is one at `/`. For the rest see front_door.py.
    """
    names = names or [base.name]
    lifecycle = lifecycle or Lifecycle()
    pieces = Pieces(base.tokenizer)
    service = Service(
        tickets=Tickets(engine),
        prompter=Prompter(base.tokenizer, pieces, engine.max_len, engine.capacity),
        pieces=pieces,
        catalogue=Catalogue(names, bank, engine.max_len),
        metrics=Metrics(names[0]),
        max_len=engine.max_len,
        capacity=engine.capacity,
        queue_tokens=engine.queue_tokens,
        vocab=base.vocab,
        fingerprint=f"fp_{base.identity.fingerprint[:12]}",
        swap=Swap(engine, base, bank),
        keep_alive=keep_alive,
        defaults=defaults or {},
        trust_templates=trust_templates,
    )
    lifecycle.at_end += [service.prompter.close, service.tickets.close, service.apart.close]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tune_interpreter()
        service.tickets.start()
        yield
        await Apart().do(engine.close)  # its last events still reach their callers
        service.prompter.close()

    # No redirects: behind a proxy they would send a caller, and his key, to plain http.
    app = FastAPI(**openapi.DOCUMENT, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    app.add_middleware(
        FrontDoor,
        keys=Keys(api_keys, admin_keys),
        lifecycle=lifecycle,
        max_per_key=max_per_key,
        observers=[service.metrics.count, *observers],
    )
    if origins:  # outside the front door: a browser asks without its key whether it may ask
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After", "openai-processing-ms"],  # else a page cannot read them
        )
    http_errors.install(app)

    async def answer(request: Request, body: B, prepare: Callable[[Service, B], Prepared]) -> Response:
        service.tickets.check_room()
        generation = await or_gone(request.receive, prepare(service, body))
        service.unknown.tell(body.unknown_keys())
        if body.stream:
            return EventStream(generation)
        content = await or_gone(request.receive, generation.whole())
        return Response(content, media_type="application/json")

    @app.post("/v1/chat/completions", response_model=None, responses=openapi.CHATS)
    async def create_chat(request: Request, body: ChatBody) -> Response:
        """Answer a chat."""
        return await answer(request, body, chat.prepare)

    @app.post("/v1/completions", response_model=None, responses=openapi.TEXTS)
    async def create_completion(request: Request, body: CompletionBody) -> Response:
        """Continue a prompt, or each of several."""
        return await answer(request, body, completions.prepare)

    @app.post("/v1/responses", response_model=None, responses=openapi.RESPONSES)
    async def create_response(request: Request, body: ResponseBody) -> Response:
        """Answer a conversation, in OpenAI's newer words. Nothing is stored."""
        return await answer(request, body, responses.prepare)

    @app.get("/v1/models/", include_in_schema=False)
    @app.get("/v1/models", responses=openapi.plain(facts.ModelList))
    async def list_models() -> dict[str, Any]:
        """List what may stand as `model`."""
        return service.catalogue.models()

    @app.get("/v1/models/{name:path}", responses=openapi.plain(facts.Model))
    async def get_model(name: str) -> dict[str, Any]:
        """Tell of one model."""
        return service.catalogue.model(name)

    @app.get("/v1/corrections/{name}", responses=openapi.plain(facts.Correction))
    async def get_correction(name: str) -> dict[str, Any]:
        """Tell of one correction, its report included."""
        return service.catalogue.correction(name)

    @app.get("/health", response_model=None, responses=openapi.status("ok", "unhealthy"))
    async def health() -> Response:
        """Whether the engine is alive and moves."""
        well = engine.stats().well
        return JSONResponse({"status": "ok" if well else "unhealthy"}, 200 if well else 503)

    @app.get("/ready", response_model=None, responses=openapi.status("ready", "draining or unhealthy"))
    async def ready() -> Response:
        """Whether new requests are taken."""
        draining = lifecycle.draining
        up = not draining and engine.stats().well
        return JSONResponse({"status": "ready" if up else "draining" if draining else "unhealthy"}, 200 if up else 503)

    @app.get("/metrics", response_model=None, response_class=PlainTextResponse, responses=openapi.TEXT)
    async def metrics() -> Response:
        """Prometheus' metrics."""
        return Response(
            service.metrics.render(engine.stats(), bank.entries, service.prompter.waiting),
            media_type=CONTENT_TYPE_LATEST,
        )

    tokens.add_routes(app, service)
    corrections.add_routes(app, service, corrections_root)
    score.add_routes(app, service)
    if with_page:
        page.add_routes(app)
    return app
