"""A checked request's choices as sequences: every default resolved, before anything is computed.

Invariant: it changes nothing but what it makes: an allowance, a place in a grammar and a companion of its own.

    sequence = Starter(base, max_len).start(request, rule, index, seed)
"""

from functools import cached_property

from trimtab.server.engine.budget import Allowance
from trimtab.server.engine.constraint import Constraint
from trimtab.server.engine.pieces import Pieces
from trimtab.server.engine.request import Request
from trimtab.server.engine.rule import Rule
from trimtab.server.engine.sequence import Row, Scores, Sequence
from trimtab.server.engine.slots import NO_ADAPTER
from trimtab.server.model.base import Base


class Starter:
    """Of one core. max_len: tokens that a slot holds."""

    def __init__(self, base: Base, max_len: int) -> None:
        self._base, self._max_len = base, max_len

    def start(self, request: Request, rule: Rule, index: int, seed: int) -> Sequence:
        """Choice `index`, with every default resolved."""
        sampling, budget = request.sampling, request.steering.budget
        bounded = rule.steered and rule.adapter == NO_ADAPTER
        first = len(request.prompt) if request.score_from is None or index else request.score_from
        scores = Scores(request.prompt[first:], Allowance(budget, self._pieces) if bounded else None)
        told = len(scores.tokens)
        companion = None
        if rule.companion is not None:
            read = request.steering.companion_prompt if rule.companion.own_prompt else None
            before = list(read or request.prompt[:first])
            companion = Row(before + list(scores.tokens), rule.companion.adapter, _before(len(before), told))
        stops = sampling.stop_token_ids | self._base.eos
        if sampling.ignore_eos and request.structure is None:
            stops = sampling.stop_token_ids
        room = self._max_len - max(len(request.prompt), companion.prompt if companion else 0)
        return Sequence(
            request=request,
            index=index,
            seed=seed,
            limit=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
            rule=rule,
            stops=stops,
            row=Row(list(request.prompt), rule.adapter, _before(first, told)),
            companion=companion,
            allowance=Allowance(budget, self._pieces) if bounded else None,
            scores=scores if told else None,
            constraint=self._constrain(request, stops),
        )

    def _constrain(self, request: Request, stops: frozenset[int]) -> Constraint | None:
        grammar, sampling = request.grammar, request.sampling
        if grammar is None and sampling.allowed_tokens is None:
            return None
        matcher = None if grammar is None else grammar.start()
        steer = request.steering.budget.structured
        return Constraint(matcher, sampling, stops, self._base.eos, self._base.vocab, steer)

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self._base.tokenizer)


def _before(first: int, count: int) -> range:
    """The positions that predict `count` tokens from `first` on."""
    return range(first - 1, first - 1 + count) if count else range(0)
