"""A problem: a prompt and what its answer must be. Plain data."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Split = Literal["train", "held-out"]


class Problem(NamedTuple):
    """One of `messages` (rendered by the base's chat template) and `prompt` (used as it stands) is set."""

    id: str  # unique in its task; seeds and files are keyed by it
    answer: Any  # a JSON value that the verifier understands
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | None = None
    kind: str = ""  # a group that the report counts apart; "" is none
