"""Corrections at run time: list, load, replace, remove; and vLLM's verbs for the same.

Invariant: a correction that is answered with is live, and one that was refused has changed nothing. The front door has
asked for the admin key before any of a body was read (`changes` says which), and has bounded it.

    add_routes(app, service, root)
    entry, replaced = await install(service, "runs/mine", "mine");  await remove(service, "mine")
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse

from trimtab.clients import facts
from trimtab.errors import CorrectionError, InvalidRequest, NotFound
from trimtab.server import openapi
from trimtab.server.http_errors import parse
from trimtab.server.many import Closed
from trimtab.server.service import Service
from trimtab.server.sources import FILES, read_files, read_named, rename
from trimtab.steering.bank import Entry
from trimtab.steering.correction import Correction

PATH, LOAD, UNLOAD = "/v1/corrections", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
MAX_UPLOAD = 256 * 2**20  # bytes
_PUT = {**openapi.plain(facts.Correction, "It replaced one."), **openapi.plain(facts.Correction, "It is new.", 201)}


class _Put(Closed):
    """POST /v1/corrections, of what is on this machine or on a hub."""

    name: str | None = None  # None: what its folder calls it
    path: str


class _Load(BaseModel, extra="ignore"):
    """vLLM's. Its further keys say nothing here."""

    lora_name: str
    lora_path: str


class _Unload(BaseModel, extra="ignore"):
    lora_name: str


def changes(method: str, path: str) -> bool:
    """Whether a request asks for a change, which takes the admin key."""
    mutating = method not in ("GET", "HEAD", "OPTIONS") and (path == PATH or path.startswith(f"{PATH}/"))
    return mutating or path in (LOAD, UNLOAD)


async def install(
    service: Service, source: str | Path | Correction, name: str | None = None, root: Path | None = None
) -> tuple[Entry, bool]:
    """Serve a correction, from a folder or hub id or as it is, in place of the one of its name if there is one.

    name: None for its own. root: where a folder must lie; None: anywhere. -> its entry, and whether it replaced one.
    Raises InvalidRequest; then nothing has changed.
    """

    def work() -> tuple[Entry, bool]:
        found = source if isinstance(source, Correction) else read_named(str(source), name, root)
        return _put(service, found if name is None else rename(found, name))

    return await service.apart.do(work)


async def remove(service: Service, name: str) -> None:
    """No new request finds it; those that have it keep it. Raises NotFound."""
    await service.apart.do(lambda: service.swap.remove(name))


def _put(service: Service, correction: Correction) -> tuple[Entry, bool]:
    if service.catalogue.is_base(correction.name):
        raise InvalidRequest(f"name: the model itself is called {correction.name}", "name")
    try:
        return service.swap.put(correction)
    except CorrectionError as error:
        raise InvalidRequest(str(error), "correction") from error


@contextmanager
def _told_as(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors name the field that the caller wrote."""
    try:
        yield
    except (InvalidRequest, NotFound) as error:
        if error.field is not None and error.field in names:
            error.rename(names[error.field])
        raise


def add_routes(app: FastAPI, service: Service, root: Path | None) -> None:
    """root: where folders must lie; None: anywhere."""
    catalogue = service.catalogue

    @app.get(PATH, responses=openapi.plain(facts.CorrectionList))
    async def list_corrections() -> dict[str, Any]:
        """List the corrections."""
        return catalogue.corrections()

    @app.post(PATH, response_model=None, responses=_PUT)
    async def put_correction(request: Request) -> JSONResponse:
        """Load a correction, or swap the one of that name: from a folder (JSON) or from files (multipart)."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            async with request.form(max_files=len(FILES), max_fields=len(FILES)) as form:
                name = form.get("name")
                files = {key: value.file for key, value in form.items() if isinstance(value, UploadFile)}
                if loose := sorted(form.keys() - files.keys() - {"name"}):
                    raise InvalidRequest(f"{loose[0]} must be sent as a file, with a file name", loose[0])
                called = name if isinstance(name, str) else None
                entry, replaced = await service.apart.do(lambda: _put(service, read_files(files, called)))
        else:
            body = parse(_Put, await request.body())
            entry, replaced = await install(service, body.path, body.name, root)
        return JSONResponse(catalogue.describe(entry), 200 if replaced else 201)

    @app.delete(PATH + "/{name}", responses=openapi.plain(facts.Deleted))
    async def delete_correction(name: str) -> dict[str, Any]:
        """Take a correction away: requests under way finish on it."""
        await remove(service, name)
        return {"id": name, "object": "correction", "deleted": True}

    @app.post(LOAD, response_model=None)
    async def load_lora_adapter(body: _Load) -> PlainTextResponse:
        """vLLM's word for loading one from a folder."""
        with _told_as({"path": "lora_path", "name": "lora_name"}):
            await install(service, body.lora_path, body.lora_name, root)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post(UNLOAD, response_model=None)
    async def unload_lora_adapter(body: _Unload) -> PlainTextResponse:
        """vLLM's word for taking one away."""
        with _told_as({"correction": "lora_name"}):
            await remove(service, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
