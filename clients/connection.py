"""How a server is reached: its addresses, keys, timeout and retries; what both clients make their HTTP requests from.

Invariant: a Connection sends nothing and is never changed; client.py and async_client.py send what it builds and
differ in `await` alone. What the caller left out is taken from TRIMTAB_BASE_URL, TRIMTAB_API_KEY and TRIMTAB_ADMIN_KEY.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from trimtab.clients.errors import BadAnswer, ClientError, status_error, transport_error
from trimtab.clients.requests import Call
from trimtab.clients.retry import Retries, retry_after
from trimtab.errors import InvalidRequest

DEFAULT_URL = "http://127.0.0.1:8000/v1"
_CONNECT_TIMEOUT = 5.0
LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)  # the server says when it is full
_VERSION = "/v1"
_LONGEST = 1e6  # seconds: a socket counts its milliseconds in 31 bits
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_FRAMING = ("content-length", "transfer-encoding")
_NEEDED = ("host", "content-type")  # of every request, though the caller may have worded them
_REDIRECTS = 20  # that are followed in a row
R = TypeVar("R")
H = TypeVar("H", httpx.Client, httpx.AsyncClient)


class Verdict(NamedTuple):
    """What becomes of a failed attempt: wait so many seconds and try again, or raise."""

    wait: float | None
    error: ClientError


@dataclass(frozen=True)
class Connection:
    """base_url: with its /v1. timeout: seconds between two signs of life of the server; None: any time.

    headers: sent with every request."""

    base_url: httpx.URL
    api_key: str | None
    admin_key: str | None
    timeout: float | None
    retries: Retries
    headers: Mapping[str, str] = field(default_factory=dict)

    def request(self, http: httpx.Client | httpx.AsyncClient, call: Call) -> httpx.Request:
        """A call as httpx's request, ready to be sent; built anew for each attempt. Raises ClientError, once closed."""
        if http.is_closed:
            raise ClientError("this client is closed, and those that share its connections: make another")
        server = str(self.base_url).rstrip("/")
        if call.root:
            server = server.removesuffix(_VERSION)
        key = self.admin_key or self.api_key if call.admin else self.api_key
        headers = dict(self.headers) if key is None else {"authorization": f"Bearer {key}", **self.headers}
        soon = _CONNECT_TIMEOUT if self.timeout is None else min(_CONNECT_TIMEOUT, self.timeout)
        timeout = httpx.Timeout(self.timeout, connect=soon)
        options: dict[str, Any] = {"headers": headers, "timeout": timeout}
        if call.files is None:
            options["json"] = call.body
        else:
            files = {name: (name, content, "application/octet-stream") for name, content in call.files.items()}
            options |= {"data": call.body, "files": files}
        return http.build_request(call.method, server + call.path, **options)

    def changed(
        self, timeout: float | Literal["same"] | None, max_retries: int | None, headers: Mapping[str, str] | None
    ) -> "Connection":
        """The same server, with a timeout that is not "same" and retries that are not None; headers: in addition.

        Raises InvalidRequest."""
        return replace(
            self,
            timeout=self.timeout if timeout == "same" else _seconds(timeout),
            retries=self.retries if max_retries is None else Retries(max_retries),
            headers={**self.headers, **_checked(headers)},
        )

    def onward(self, call: Call, response: httpx.Response, followed: int) -> httpx.Request:
        """What a redirect asks for, after so many that were followed. Raises BadAnswer for one that cannot be."""
        here, there = response.url, response.headers["location"]
        kept = response.status_code in (307, 308) or call.method == "GET"  # by the others, a POST becomes a GET
        if not kept or response.next_request is None:
            raise BadAnswer(
                f"{here} answered with a redirect (HTTP {response.status_code}) to {there}, and with a {call.method} "
                f"only 307 and 308 are followed: if that is the server, use it as base_url, without {call.path}"
            )
        if followed == _REDIRECTS:
            raise BadAnswer(f"{self.base_url} answers with one redirect after another: is base_url right?")
        request = response.next_request  # httpx has left the key out where another origin would see it
        if not _is_trusted(request.url, here):
            for name in self.headers.keys() - _NEEDED:
                request.headers.pop(name, None)
        return request

    def misled(self, error: UnicodeError) -> BadAnswer:
        """A redirect names a host that no address can have: base_url's own was tried when the client was made."""
        return BadAnswer(f"{self.base_url} redirects to a host that cannot be ({error}): is base_url right?")

    def after_error(self, attempt: int, error: httpx.RequestError) -> Verdict:
        """On a failure of the transport in attempt 0, 1, ..."""
        return Verdict(self.retries.after_error(attempt, error), transport_error(error, str(self.base_url)))

    def after_response(self, attempt: int, response: httpx.Response) -> Verdict:
        """On a refusal, already read."""
        return Verdict(self.retries.after_response(attempt, response), status_error(response, retry_after(response)))


def connection(
    base_url: str | None,
    api_key: str | None,
    admin_key: str | None,
    timeout: float | None,
    max_retries: int,
    headers: Mapping[str, str] | None,
) -> Connection:
    """Raises InvalidRequest for what cannot be meant."""
    if base_url is None:
        base_url = os.environ.get("TRIMTAB_BASE_URL", "").strip() or DEFAULT_URL
    try:
        url = httpx.URL(base_url)
        url.host.encode("idna")  # as a socket will
    except (httpx.InvalidURL, TypeError, UnicodeError) as error:
        raise InvalidRequest(f"base_url {base_url!r} is not a URL: {error}", "base_url") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidRequest(f"base_url must look like {DEFAULT_URL}, not {base_url!r}", "base_url")
    if url.userinfo:
        raise InvalidRequest(
            "base_url holds a name or a password: leave it out, and give api_key or headers", "base_url"
        )
    if url.query or url.fragment:
        raise InvalidRequest(f"base_url must end with its path, as {DEFAULT_URL} does: {base_url!r}", "base_url")
    if not url.path.strip("/"):
        url = url.copy_with(path=_VERSION)
    api_key = _key("api_key", api_key, "TRIMTAB_API_KEY")
    admin_key = _key("admin_key", admin_key, "TRIMTAB_ADMIN_KEY")
    return Connection(url, api_key, admin_key, _seconds(timeout), Retries(max_retries), _checked(headers))


def open_http(make: Callable[[], H]) -> H:
    """httpx's client, made. Raises InvalidRequest for what the environment asks of it and cannot be."""
    try:
        return make()
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        variables = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE or SSL_CERT_DIR"
        raise InvalidRequest(f"the environment's {variables} cannot be used: {error}") from error


def read(response: httpx.Response, kind: type[R]) -> R:
    """An answer as data. Raises BadAnswer."""
    try:
        return TypeAdapter(kind).validate_json(response.content)
    except ValidationError as error:
        raise BadAnswer(f"{response.url} did not answer in this API's shape: is base_url right? ({error})") from error


def _is_trusted(there: httpx.URL, here: httpx.URL) -> bool:
    """Whether what was meant for one address may be seen at another: at its own origin, or that by https."""
    return (there.host, there.port) == (here.host, here.port) and there.scheme in (here.scheme, "https")


def _seconds(timeout: float | None) -> float | None:
    if timeout is not None and (not isinstance(timeout, int | float) or not 0 < timeout <= _LONGEST):
        told = f"timeout must be seconds above 0, at most a million (None waits for ever), not {timeout!r}"
        raise InvalidRequest(told, "timeout")
    return timeout


def _checked(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Header fields that can travel, by names without upper case: they mean the same."""
    for name, value in (headers or {}).items():
        if not all(isinstance(part, str) and part.isascii() and part.isprintable() for part in (name, value)):
            raise InvalidRequest(f"headers must be of printable ASCII, not {name!r}: {value!r}", "headers")
        if _FIELD_NAME.fullmatch(name) is None or name.lower() in _FRAMING:
            raise InvalidRequest(f"headers: {name!r} is no field that can be given", "headers")
    return {name.lower(): value for name, value in (headers or {}).items()}


def _key(name: str, given: str | None, variable: str) -> str | None:
    """What was given, or the environment's: of several there, all of which a server takes, the first. Empty is none."""
    if given is None:
        key = next(iter(os.environ.get(variable, "").replace(",", " ").split()), "")
    else:
        key = given.strip()
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest(f"{name} must be printable ASCII, as it travels in a header", name)
    return key or None
