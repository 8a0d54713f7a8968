"""A problem: a prompt and what its answer must be. Plain data."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Split = Literal["train", "validation", "held-out"]  # to learn from, to choose on, to judge on


class Problem(NamedTuple):
    """One of `messages` (rendered by the base's chat template) and `prompt` (used as it stands) is set."""

    id: str  # unique in its task; seeds and files are keyed by it
    answer: Any  # a JSON value that the verifier understands
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | None = None
    kind: str = ""  # a group that the report counts apart; "" is none
    where: str = ""  # the file and line it was read from

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.where}: problem {self.id!r}" if self.where else f"problem {self.id!r}"


class Extract(NamedTuple):
    """The answer a completion gives."""

    text: str  # equal answers are equal texts
    marked: bool  # given in a form that says so: after #### or in \\boxed{}
