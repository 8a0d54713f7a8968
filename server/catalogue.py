"""The names this server answers to: the base, and every correction as a model whose parent is the base.

Invariant: a name that `choose` accepts is listed, and the other way round. The base's names mean the base; a
correction's name means the base steered by it.
"""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.errors import InvalidRequest, NotFound
from trimtab.server.request import Steering
from trimtab.server.rule import Rule, rule_for
from trimtab.server.steering_body import SteeringBody
from trimtab.steering.bank import Bank
from trimtab.steering.correction import ContrastCorrection


class Chosen(NamedTuple):
    """What a request asks for, resolved: the name to report, and the numbers a correction's defaults filled in."""

    name: str
    steering: Steering
    rule: Rule
    negative: str | None = None  # what a companion reads instead of the user's words, where it reads others


class Catalogue:
    """Base names (the first is the default) and a bank of corrections."""

    def __init__(self, base_names: Sequence[str], bank: Bank, max_len: int) -> None:
        self._base_names, self._bank, self._max_len = tuple(base_names), bank, max_len
        self._created = int(time.time())

    @property
    def base(self) -> str:
        """The base's name, as the server tells it."""
        return self._base_names[0]

    def choose(self, model: str | None, asked: SteeringBody | None) -> Chosen:
        """Resolve `model` and `steering` of a body. Raises NotFound, InvalidRequest."""
        name = model or self.base
        asked = asked or SteeringBody()
        weights = asked.weights
        if name not in self._base_names:
            if name not in self._bank.names:
                raise NotFound(f"The model `{name}` does not exist; this server has: {', '.join(self.names)}")
            if weights and name not in weights:
                field = "steering.correction" if asked.corrections is None else "steering.corrections"
                message = f"model {name!r} is a correction, and {field} names others: {', '.join(weights)}"
                raise InvalidRequest(message, field)
            weights = weights or {name: 1.0}
        if not weights:
            vain = asked.in_vain()
            if vain is not None:
                message = f"steering.{vain} needs a correction: name one in model or steering.correction"
                raise InvalidRequest(message, f"steering.{vain}")
            return Chosen(name, Steering(mode="off"), Rule())
        steering = asked.steering(weights)
        rule = rule_for(steering, self._bank)
        return Chosen(name, steering, rule, self._negative(asked, steering, rule))

    def _negative(self, asked: SteeringBody, steering: Steering, rule: Rule) -> str | None:
        """What the companion reads in place of the user's words; None where there is no such companion."""
        chosen = self._bank.get(steering.correction or "")
        if not isinstance(chosen, ContrastCorrection):
            if asked.negative_prompt is not None:
                message = f"steering.negative_prompt is for a contrast; {chosen.name} is of the tier {chosen.tier}"
                raise InvalidRequest(message, "steering.negative_prompt")
            return None
        if rule.beside is None:
            return None
        return chosen.prompt if asked.negative_prompt is None else asked.negative_prompt

    @property
    def names(self) -> list[str]:
        """All of them, the default first."""
        return list(dict.fromkeys([*self._base_names, *self._bank.names]))

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self.model(name) for name in self.names]}

    def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/{name}. Raises NotFound."""
        if name not in self.names:
            raise NotFound(f"The model `{name}` does not exist; this server has: {', '.join(self.names)}")
        is_base = name in self._base_names
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "trimtab",
            "root": self.base,
            "parent": None if is_base else self.base,
            "tier": None if is_base else self._bank.get(name).tier,
            "max_model_len": self._max_len,
        }

    def correction(self, name: str) -> dict[str, Any]:
        """GET /v1/corrections/{name}: how it acts by default, how it was made and what it did. Raises NotFound."""
        try:
            found = self._bank.get(name)
        except NotFound as error:
            raise NotFound(str(error), "correction") from None
        gate = found.gate
        return {
            "id": found.name,
            "object": "correction",
            "parent": self.base,
            "tier": found.tier,
            **found.facts,
            "strength": found.strength,
            "gate": {
                "kind": gate.kind,
                "tau": gate.tau,
                "ceiling": None if math.isinf(gate.ceiling) else gate.ceiling,
                "calibration": [list(pair) for pair in gate.calibration],
            },
            "slots": rule_for(Steering(found.name), self._bank).rows,
            "provenance": dict(found.provenance),
            "report": None if found.report is None else dict(found.report),
        }
