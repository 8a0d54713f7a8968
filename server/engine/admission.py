"""What a request must be to run on one engine: what request.py, which knows no model, cannot say.

Invariant: a request that `check` returns has its rule and grammar, and can be carried out; a refusal names the field.
"""

from collections.abc import Callable
from dataclasses import replace

from trimtab.errors import ContextOverflow, InvalidRequest
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.request import Request
from trimtab.server.engine.rule import Companion, rule_for
from trimtab.server.engine.slots import NO_ADAPTER
from trimtab.server.engine.structure import Grammars
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank


class Admission:
    """Of one core."""

    def __init__(
        self,
        base: Base,
        bank: Bank,
        config: EngineConfig,
        max_len: int,
        grammars: Grammars,
        has: Callable[[int], bool],
    ) -> None:
        """max_len: tokens that a slot holds. has: whether an adapter is there."""
        self._base, self._bank, self._config, self._max_len = base, bank, config, max_len
        self._grammars, self._has = grammars, has

    def check(self, request: Request) -> Request:
        """Raise what is wrong with a request: ContextOverflow, InvalidRequest, NotFound. -> it, its rule and grammar.

        Reads only, save that a structure is compiled where the request brings no grammar.
        """
        wanted = 1 if request.sampling.max_tokens is None else request.sampling.max_tokens
        if len(request.prompt) + min(wanted, 1) > self._max_len:
            raise ContextOverflow(self._max_len, len(request.prompt), wanted)
        self._check_tokens("prompt", request.prompt)
        for field in ("logit_bias", "stop_token_ids"):
            for token in getattr(request.sampling, field):
                if not 0 <= token < self._base.vocab:
                    raise InvalidRequest(f"{field} names token {token}; ids are 0..{self._base.vocab - 1}", field)
        self._check_tokens("allowed_token_ids", tuple(request.sampling.allowed_tokens or ()))
        for word in request.sampling.bad_words:
            self._check_tokens("bad_words", word)
        self._check_ends(request)
        grammar = request.grammar
        if grammar is None and request.structure is not None:
            grammar = self._grammars.compile(request.structure)
        rule = request.rule or rule_for(request.steering, self._bank)
        if not all(map(self._has, (rule.adapter, rule.companion.adapter if rule.companion else NO_ADAPTER))):
            message = f"{request.steering.correction} came after the engine was made: it is taken by `publish`"
            raise InvalidRequest(message, "steering.correction")
        if rule.companion is not None:
            self._check_companion(request, rule.companion)
        return replace(request, rule=rule, grammar=grammar)

    def _check_ends(self, request: Request) -> None:
        """A text that may not end yet needs another token that is allowed."""
        sampling = request.sampling
        if sampling.allowed_tokens is None or not sampling.min_tokens or request.structure is not None:
            return
        ends = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else self._base.eos)
        if sampling.allowed_tokens <= ends:
            message = "allowed_token_ids has only tokens that end the text, which min_tokens forbids: add others to it"
            raise InvalidRequest(message, "allowed_token_ids")

    def _check_companion(self, request: Request, companion: Companion) -> None:
        if self._config.slots < 2:
            name = request.steering.correction
            message = f"{name} needs a companion row, so two slots a choice; this server has 1 (--max-num-seqs)"
            raise InvalidRequest(message, "steering.correction")
        prompt = request.steering.companion_prompt
        if not companion.own_prompt:
            return
        field = "steering.companion_prompt"
        if prompt is None:
            raise InvalidRequest("contrast needs the tokens that its companion reads", field)
        scored = 0
        if request.score_from is not None:
            if request.sampling.max_tokens != 0:
                message = "a contrast scores what follows its companion's prompt, then samples nothing: max_tokens 0"
                raise InvalidRequest(message, "max_tokens")
            scored = len(request.prompt) - request.score_from
        if len(prompt) + max(scored, 1) > self._max_len:
            wanted = scored or request.sampling.max_tokens or 1
            raise ContextOverflow(self._max_len, len(prompt), wanted, field)
        self._check_tokens(field, prompt)

    def _check_tokens(self, field: str, tokens: tuple[int, ...]) -> None:
        if not all(0 <= token < self._base.vocab for token in tokens):
            raise InvalidRequest(f"{field} holds a token id outside 0..{self._base.vocab - 1}", field)
