"""One choice of one request on its way through the engine: its tokens, its slot, and how far its KV has come.

Invariant: a sequence has `computed < len(tokens)` tokens in its slot until it ends; the step that computes the last of
them samples the next. Prefill, chunks, resumed prefixes and decode are all this one rule.
"""

from dataclasses import dataclass, field

from trimtab.server.request import FinishReason, Request


@dataclass(eq=False)
class Sequence:
    """Engine-side state of choice `index` of a request. Defaults of the request's model and correction are resolved."""

    request: Request
    index: int
    seed: int
    limit: int  # tokens it may sample
    correction: int  # index into the bank; -1 is none
    strength: float
    tau: float  # nats
    stops: frozenset[int]  # tokens that end it
    tokens: list[int]  # prompt, then what was sampled
    slot: int = -1
    computed: int = 0
    cached: int = 0  # prompt tokens whose KV was copied, not computed
    counts: dict[int, int] = field(default_factory=dict)  # sampled token -> times; kept only when a penalty needs it

    @property
    def sampled(self) -> int:
        """How many tokens it has sampled: the position of the next draw."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def penalised(self) -> bool:
        """Whether its logits are edited by what it has seen."""
        s = self.request.sampling
        return s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0

    @property
    def edits(self) -> dict[int, tuple[int, float]]:
        """token -> (count, bias), as kernels.record.Edits wants them; empty when nothing is edited."""
        s = self.request.sampling
        found: dict[int, tuple[int, float]] = {}
        if s.repetition_penalty != 1:
            found.update(dict.fromkeys(self.request.prompt, (0, 0.0)))
        if self.penalised:
            found.update((token, (count, 0.0)) for token, count in self.counts.items())
        for token, bias in s.logit_bias.items():
            found[token] = (found[token][0] if token in found else -1, bias)
        if self.sampled < s.min_tokens:
            for token in self.stops:
                found[token] = (found[token][0] if token in found else -1, float("-inf"))
        return found

    def append(self, token: int) -> FinishReason | None:
        """Take the sampled token. -> why the sequence ends here, or None."""
        self.tokens.append(token)
        if self.penalised:
            self.counts[token] = self.counts.get(token, 0) + 1
        if token in self.stops:
            return "stop"
        return "length" if self.sampled >= self.limit else None
