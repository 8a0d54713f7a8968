"""How a server is reached: its addresses, keys, timeout and retries; what both clients make their HTTP requests from.

Invariant: a Connection sends nothing and is never changed; client.py and async_client.py send what it builds and
differ in `await` alone. What the caller left out is taken from TRIMTAB_BASE_URL, TRIMTAB_API_KEY and TRIMTAB_ADMIN_KEY.
"""

import os
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from trimtab.clients.errors import BadAnswer, ClientError, status_error, transport_error
from trimtab.clients.requests import Call
from trimtab.clients.retry import Retries, retry_after
from trimtab.errors import InvalidRequest

DEFAULT_URL = "http://127.0.0.1:8000/v1"
_CONNECT_TIMEOUT = 5.0
_VERSION = "/v1"
R = TypeVar("R")


class Verdict(NamedTuple):
    """What becomes of a failed attempt: wait so many seconds and try again, or raise."""

    wait: float | None
    error: ClientError


@dataclass(frozen=True)
class Connection:
    """base_url: with its /v1. timeout: seconds between two signs of life of the server."""

    base_url: httpx.URL
    api_key: str | None
    admin_key: str | None
    timeout: float
    retries: Retries

    def request(self, http: httpx.Client | httpx.AsyncClient, call: Call) -> httpx.Request:
        """A call as httpx's request, ready to be sent; built anew for each attempt."""
        server = str(self.base_url).rstrip("/")
        if call.root:
            server = server.removesuffix(_VERSION)
        key = self.admin_key or self.api_key if call.admin else self.api_key
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(self.timeout, connect=min(_CONNECT_TIMEOUT, self.timeout))
        options: dict[str, Any] = {"headers": headers, "timeout": timeout}
        if call.files is None:
            options["json"] = call.body
        else:
            files = {name: (name, content, "application/octet-stream") for name, content in call.files.items()}
            options |= {"data": call.body, "files": files}
        return http.build_request(call.method, server + call.path, **options)

    def changed(self, timeout: float | None, max_retries: int | None) -> "Connection":
        """The same server, with what is not None."""
        return replace(
            self,
            timeout=self.timeout if timeout is None else timeout,
            retries=self.retries if max_retries is None else Retries(max_retries),
        )

    def after_error(self, attempt: int, error: httpx.RequestError) -> Verdict:
        """On a failure of the transport in attempt 0, 1, ..."""
        return Verdict(self.retries.after_error(attempt, error), transport_error(error, str(self.base_url)))

    def after_response(self, attempt: int, response: httpx.Response) -> Verdict:
        """On a refusal, already read."""
        return Verdict(self.retries.after_response(attempt, response), status_error(response, retry_after(response)))


def connection(
    base_url: str | None, api_key: str | None, admin_key: str | None, timeout: float, max_retries: int
) -> Connection:
    """Raises InvalidRequest for what cannot be meant."""
    if base_url is None:
        base_url = os.environ.get("TRIMTAB_BASE_URL", "").strip() or DEFAULT_URL
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError) as error:
        raise InvalidRequest(f"base_url {base_url!r} is not a URL: {error}", "base_url") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidRequest(f"base_url must look like {DEFAULT_URL}, not {base_url!r}", "base_url")
    if url.path in ("", "/"):
        url = url.copy_with(path=_VERSION)
    api_key = _key("api_key", api_key, "TRIMTAB_API_KEY")
    admin_key = _key("admin_key", admin_key, "TRIMTAB_ADMIN_KEY")
    return Connection(url, api_key, admin_key, timeout=timeout, retries=Retries(max_retries))


def read(response: httpx.Response, kind: type[R]) -> R:
    """An answer as data. Raises BadAnswer."""
    try:
        return TypeAdapter(kind).validate_json(response.content)
    except ValidationError as error:
        raise BadAnswer(f"{response.url} did not answer in this API's shape: is base_url right? ({error})") from error


def _key(name: str, given: str | None, variable: str) -> str | None:
    """What was given, or the environment's: of several there, all of which a server takes, the first. Empty is none."""
    if given is None:
        key = next(iter(os.environ.get(variable, "").replace(",", " ").split()), "")
    else:
        key = given.strip()
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest(f"{name} must be printable ASCII, as it travels in a header", name)
    return key or None
