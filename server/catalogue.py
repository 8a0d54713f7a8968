"""The names this server answers to: the base, and every correction as a model whose parent is the base.

Invariant: a name that `choose` accepts is listed, and the other way round. The base's names mean the base; a
correction's name means the base steered by it.
"""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.errors import InvalidRequest, NotFound
from trimtab.server.engine.request import Steering
from trimtab.server.engine.rule import Rule, rule_for, slots_of
from trimtab.server.steering_body import SteeringBody
from trimtab.steering.bank import Bank, Entry
from trimtab.steering.correction import ContrastCorrection


class Chosen(NamedTuple):
    """What a request asks for, resolved: the name to report, and the numbers a correction's defaults filled in."""

    name: str
    steering: Steering
    rule: Rule
    negative: str | None = None  # what a companion reads instead of the user's words, where it reads others

    @property
    def facts(self) -> dict[str, Any]:
        """For the log."""
        correction, mode = self.steering.correction, self.steering.mode
        return {"model": self.name, "correction": correction, "version": self.rule.version, "mode": mode}


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
                raise self._unknown(name)
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
        return Chosen(name, steering, rule, self._negative(asked, rule))

    def _negative(self, asked: SteeringBody, rule: Rule) -> str | None:
        """What the companion reads in place of the user's words; None where there is no such companion."""
        chosen = rule.entries[0].correction
        if not isinstance(chosen, ContrastCorrection):
            if asked.negative_prompt is not None:
                message = f"steering.negative_prompt is for a contrast; {chosen.name} is of the tier {chosen.tier}"
                raise InvalidRequest(message, "steering.negative_prompt")
            return None
        if rule.companion is None:
            return None
        return chosen.prompt if asked.negative_prompt is None else asked.negative_prompt

    @property
    def names(self) -> list[str]:
        """All of them, the default first."""
        return list(dict.fromkeys([*self._base_names, *self._bank.names]))

    def is_base(self, name: str) -> bool:
        """Whether the base is called so, and nothing else may be."""
        return name in self._base_names

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        tiers: dict[str, str | None] = dict.fromkeys(self._base_names)
        tiers |= {entry.correction.name: entry.correction.tier for entry in self._bank.entries}
        return {"object": "list", "data": [self._model(*pair) for pair in tiers.items()]}

    def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/{name}. Raises NotFound."""
        found = next((model for model in self.models()["data"] if model["id"] == name), None)
        if found is None:
            raise self._unknown(name)
        return dict(found)

    def _unknown(self, name: str) -> NotFound:
        return NotFound(f"The model `{name}` does not exist; this server has: {', '.join(self.names)}")

    def _model(self, name: str, tier: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "trimtab",
            "root": self.base,
            "parent": None if self.is_base(name) else self.base,
            "tier": tier,
            "max_model_len": self._max_len,
        }

    def corrections(self) -> dict[str, Any]:
        """GET /v1/corrections."""
        return {"object": "list", "data": [self.describe(entry) for entry in self._bank.entries]}

    def correction(self, name: str) -> dict[str, Any]:
        """GET /v1/corrections/{name}. Raises NotFound."""
        return self.describe(self._bank.entry(name))

    def describe(self, entry: Entry) -> dict[str, Any]:
        """A correction: its version, how it acts by default, how it was made and what it did."""
        found = entry.correction
        gate = found.gate
        return {
            "id": found.name,
            "object": "correction",
            "version": entry.version,
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
            "slots": slots_of(found),
            "provenance": dict(found.provenance),
            "report": None if found.report is None else dict(found.report),
        }
