"""Every error a caller of this package can meet; the client adds its own (clients/errors.py).

    TrimtabError
    |-- InvalidRequest        a value in a request is wrong: names the field and the fix       (HTTP 400)
    |   |-- Unfollowable      a schema, or another structure, that no text can be held to      (HTTP 400)
    |   `-- ContextOverflow   the prompt alone does not fit the model's context                (HTTP 400)
    |-- Unauthorized          the API key is missing or wrong                                  (HTTP 401)
    |-- Forbidden             this server was not told to let anybody do that                  (HTTP 403)
    |-- NotFound              no model or correction of that name                              (HTTP 404)
    |-- RateLimited           this key has too many requests under way                         (HTTP 429)
    |-- Overloaded            the queue is full; try again later                               (HTTP 503)
    |-- EngineFailure         one request failed inside the engine; the others go on           (HTTP 500)
    |-- EngineStopped         the engine ended before the answer did                           (HTTP 503)
    |-- UnsupportedModel      this model cannot be served, and why
    |-- CorrectionError       a correction's folder is damaged, or made for another base
    `-- TaskError             a task file or verifier is wrong: names the line and the fix
        |-- TooFew            it has not as many problems as were asked for
        `-- Diverged          a fit's loss is no number, or what it learns runs away from the base

server/http_errors.py knows their HTTP statuses. Nothing here imports anything of ours, so clients may use it too.
"""

from typing import Any


class TrimtabError(Exception):
    """Base of all errors raised on purpose by this package."""


class InvalidRequest(TrimtabError):
    """A request's value is wrong.

    field: the name of the offending field as the caller wrote it, or None when no single field is at fault.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def rename(self, field: str) -> None:
        """Tell it of the same field by the name that the caller wrote."""
        if self.field and str(self).startswith(self.field):
            self.args = (field + str(self).removeprefix(self.field),)
        self.field = field


class Unfollowable(InvalidRequest):
    """A schema, or another structure, that no text can be held to."""


class ContextOverflow(InvalidRequest):
    """The prompt alone fills the context. Agents match on this message: keep OpenAI's wording.

    at_least: the prompt was not tokenised, as its bytes alone need so many of the longest tokens.
    """

    def __init__(
        self, limit: int, prompt: int, completion: int, field: str = "messages", at_least: bool = False
    ) -> None:
        self._made_of = (limit, prompt, completion, field, at_least)
        some = "at least " if at_least else ""
        self._words = (
            f"This model's maximum context length is {limit} tokens. However, you requested {some}"
            f"{prompt + completion} tokens ({some}{prompt} in the {{field}}, {completion} in the completion). Please "
            "reduce the length of the {field} or completion."
        )
        super().__init__(self._words.format(field=field), field)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as it was made."""
        return type(self), self._made_of, {"args": self.args, "field": self.field}

    def rename(self, field: str) -> None:
        """As of any field. This message holds the field's name within, so it is written anew."""
        self.args, self.field = (self._words.format(field=field),), field


class Unauthorized(TrimtabError):
    """The API key is missing or wrong."""


class Forbidden(TrimtabError):
    """No key allows it: the server was started without the flag for that."""


class NotFound(TrimtabError):
    """No model or correction has this name. field: where the caller wrote it."""

    def __init__(self, message: str, field: str = "model") -> None:
        super().__init__(message)
        self.field = field

    def rename(self, field: str) -> None:
        """Tell it of the same field by the name that the caller wrote."""
        self.field = field


class RateLimited(TrimtabError):
    """The key has as many requests under way as it may."""


class Overloaded(TrimtabError):
    """The server's queue is full: the same request may be answered in a moment."""


class EngineFailure(TrimtabError):
    """One request failed inside the engine (NaN logits, an internal error)."""


SHUTTING_DOWN = "the server is shutting down: send the request to another, or again in a moment"


class EngineStopped(TrimtabError):
    """The engine ended before the answer did: the server is shutting down, or its log says why."""


class UnsupportedModel(TrimtabError):
    """The model cannot be served: the message says what it lacks."""


class CorrectionError(TrimtabError):
    """A correction's folder cannot be used: the message names the file, the field and the fix."""


class TaskError(TrimtabError):
    """A task cannot be used: the message names the file, the line and the fix."""


class TooFew(TaskError):
    """A task has not as many problems as were asked for. there: how many it has."""

    def __init__(self, message: str, there: int) -> None:
        super().__init__(message)
        self.there = there


class Diverged(TaskError):
    """What was learned went astray: its loss is no number, or it ran away from the base. The message names the fix."""
