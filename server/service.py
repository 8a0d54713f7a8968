"""What every request of an app is served with, and the bounds of what one may ask of it.

service = Service(tickets=Tickets(engine), ...);  service.check_room(prompts, n)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import InvalidRequest
from trimtab.server.apart import Apart
from trimtab.server.catalogue import Catalogue
from trimtab.server.engine.pieces import Pieces
from trimtab.server.foreign import Unknown
from trimtab.server.metrics import Metrics
from trimtab.server.prompt import Ids, Prompter
from trimtab.server.swap import Swap
from trimtab.server.tickets import Tickets

MAX_SCORES = 4_000_000  # some 300 MB of JSON


@dataclass(frozen=True)
class Service:
    """What every generation of an app uses."""

    tickets: Tickets
    prompter: Prompter
    pieces: Pieces
    catalogue: Catalogue
    metrics: Metrics
    max_len: int
    capacity: int  # choices under way at once
    queue_tokens: int | None  # of prompts that may wait at once, where there are several
    vocab: int  # ids that the model has
    fingerprint: str
    swap: Swap
    keep_alive: float  # seconds of silence in a stream
    defaults: Mapping[str, Any]  # sampling's, where a body is silent
    trust_templates: bool  # a request may bring its own chat template
    unknown: Unknown = field(default_factory=Unknown)
    apart: Apart = field(default_factory=Apart)  # changes of corrections, which may hang

    def check_room(self, prompts: int, n: int) -> None:
        """Raise InvalidRequest for more choices than can ever be under way."""
        if prompts * n > self.capacity:
            message = f"this server takes {self.capacity} choices at once; this body asks for {prompts * n}: send fewer"
            raise InvalidRequest(message, "n" if prompts == 1 else "prompt")

    def check_scores(self, prompts: Sequence[Ids], n: int, alternatives: int, field: str) -> None:
        """Raise InvalidRequest for more log-probabilities of prompts than an answer can hold. n: how often each."""
        told = sum(map(len, prompts)) * n * (1 + alternatives)
        if told > MAX_SCORES:
            message = f"an answer holds {MAX_SCORES} log-probabilities of prompts; this body asks for {told}"
            raise InvalidRequest(f"{message}: ask for fewer alternatives, choices or prompts", field)

    def check_queue(self, prompts: Sequence[Ids]) -> None:
        """Raise InvalidRequest for more text than can ever wait."""
        tokens = sum(map(len, prompts))
        if self.queue_tokens is not None and len(prompts) > 1 and tokens > self.queue_tokens:
            message = f"this server takes {self.queue_tokens} tokens of prompts at once, not {tokens}: send fewer"
            raise InvalidRequest(message, "prompt")
