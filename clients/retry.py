"""When to try again, and how long to wait before.

Invariant: a refusal is retried only where a later attempt can differ (408, 409, 429, 5xx, a broken connection), never
sooner than the server's Retry-After asks; its x-should-retry has the last word. A read that timed out is not retried:
the server would do the work twice.
"""

import random
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from trimtab.errors import InvalidRequest


@dataclass(frozen=True)
class Retries:
    """limit: attempts after the first. Waits grow from `first` by doubling up to `longest`, with jitter, in seconds."""

    limit: int = 2
    first: float = 0.5
    longest: float = 8.0
    patience: float = 60.0  # the longest Retry-After that is waited for; beyond it the error is raised at once

    def __post_init__(self) -> None:
        if not isinstance(self.limit, int) or self.limit < 0:
            raise InvalidRequest(f"max_retries must be at least 0, not {self.limit!r}", "max_retries")

    def after_response(self, attempt: int, response: httpx.Response) -> float | None:
        """Seconds to wait after the refusal of attempt 0, 1, ...; None: give up."""
        status = response.status_code
        told = response.headers.get("x-should-retry")
        worth = told == "true" if told in ("true", "false") else status in (408, 409, 429) or status >= 500
        if attempt >= self.limit or not worth:
            return None
        asked = retry_after(response)
        if asked is None:
            return self._back_off(attempt)
        return asked if asked <= self.patience else None

    def after_error(self, attempt: int, error: httpx.RequestError) -> float | None:
        """Seconds to wait after a transport failure of attempt 0, 1, ...; None: give up."""
        passing = isinstance(error, httpx.TransportError) and not isinstance(error, _FINAL)
        return self._back_off(attempt) if passing and attempt < self.limit else None

    def _back_off(self, attempt: int) -> float:
        return float(min(self.longest, self.first * 2.0**attempt)) * random.uniform(0.75, 1.0)


_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
_FINAL = (httpx.ReadTimeout, httpx.WriteTimeout, httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.ProxyError)


def retry_after(response: httpx.Response) -> float | None:
    """The Retry-After header in seconds from now, as a number or a date; None when absent or not understood.

    Retry-After-Ms says the same more finely, and goes first.
    """
    value = response.headers.get("retry-after-ms", "").strip()
    if _NUMBER.fullmatch(value):
        return float(value) / 1000
    value = response.headers.get("retry-after", "").strip()
    if _NUMBER.fullmatch(value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):  # the year 10 ** 20
        return None
