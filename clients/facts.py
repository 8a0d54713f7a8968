"""What a server says of itself and of texts: models, corrections, scores, tokens. As in types.py: only read."""

from typing import Any

from pydantic import Field

from trimtab.clients.reading import Answer, OrNull
from trimtab.clients.types import Receipt, SteeringReport


class Model(Answer):
    """One entry of /v1/models: the base, or the base with a correction."""

    id: str
    object: OrNull[str] = "model"
    created: OrNull[int] = 0
    owned_by: OrNull[str] = ""
    parent: str | None = None  # of a correction: the base it steers
    tier: str | None = None  # of a correction: head, lora, or contrast, which nothing was learned for
    max_model_len: int | None = None


class Gate(Answer):
    """Where a correction may act, unless a request says otherwise."""

    kind: str = "entropy"
    tau: float | None = None
    ceiling: float | None = None
    calibration: list[tuple[float, float]] = Field(default_factory=list)  # (share of steps, the tau that opens so many)


class Correction(Answer):
    """A correction that the server holds: how it acts by default, how it was made, and what it did."""

    id: str
    parent: str | None = None
    tier: str | None = None
    version: str | None = None  # of its files
    strength: float | None = None
    gate: Gate | None = None
    slots: int | None = None  # that a request steered by it takes
    provenance: dict[str, Any] | None = None
    report: dict[str, Any] | None = None  # against the base and its controls, on held-out problems


class ScoredToken(Receipt):
    """The receipt of a token that was given, not drawn."""

    logprob: float  # of the token, as the request's steering left it


class Score(Answer):
    """How likely a completion is, token by token, and what steering does to it."""

    id: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    steering: SteeringReport | None = None
    tokens: list[ScoredToken] = Field(default_factory=list)

    @property
    def logprob(self) -> float:
        """Of the whole completion."""
        return sum(token.logprob for token in self.tokens)


class Tokens(Answer):
    """A text as token ids."""

    tokens: list[int]
    count: int
    max_model_len: int | None = None
    token_strs: list[str] | None = None


class Detokenized(Answer):
    """Token ids as text."""

    prompt: str


class ModelList(Answer):
    """GET /v1/models."""

    data: list[Model]


class CorrectionList(Answer):
    """GET /v1/corrections."""

    data: list[Correction]


class Deleted(Answer):
    """What was taken away."""

    id: str = ""
    deleted: bool
