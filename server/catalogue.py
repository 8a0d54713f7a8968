"""The names this server answers to: the base, and every correction as a model whose parent is the base.

Invariant: a name that `choose` accepts is listed, and the other way round. The base's names mean the base; a
correction's name means the base steered by it.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.errors import InvalidRequest, NotFound
from trimtab.server.request import Steering
from trimtab.server.schema import SteeringBody
from trimtab.steering.bank import Bank
from trimtab.steering.correction import Correction


class Chosen(NamedTuple):
    """What a request asks for, resolved: the name to report, and the numbers a correction's defaults filled in."""

    name: str
    steering: Steering
    strength: float | None  # None without a correction
    tau: float | None


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
        correction = asked.correction
        if name not in self._base_names:
            if name not in self._bank.names:
                raise NotFound(f"The model `{name}` does not exist; this server has: {', '.join(self.names)}")
            if correction not in (None, name):
                raise InvalidRequest(
                    f"model {name!r} is a correction, and steering.correction names another: {correction!r}",
                    "steering.correction",
                )
            correction = name
        if correction is None:
            for field in ("strength", "tau", "mode"):
                if getattr(asked, field) not in (None, "off"):
                    message = f"steering.{field} needs a correction: name one in model or steering.correction"
                    raise InvalidRequest(message, f"steering.{field}")
            return Chosen(name, Steering(mode="off"), None, None)
        defaults = self._find(correction, "steering.correction")
        steering = Steering(correction, asked.strength, asked.tau, asked.mode or "apply")
        strength = defaults.strength if asked.strength is None else asked.strength
        return Chosen(name, steering, strength, defaults.gate.tau if asked.tau is None else asked.tau)

    @property
    def names(self) -> list[str]:
        """All of them, the default first."""
        return [*self._base_names, *self._bank.names]

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self.model(name) for name in self.names]}

    def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/{name}. Raises NotFound."""
        if name not in self.names:
            raise NotFound(f"The model `{name}` does not exist; this server has: {', '.join(self.names)}")
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "trimtab",
            "root": self.base,
            "parent": None if name in self._base_names else self.base,
            "max_model_len": self._max_len,
        }

    def correction(self, name: str) -> dict[str, Any]:
        """GET /v1/corrections/{name}: how it acts by default, how it was made and what it did. Raises NotFound."""
        found = self._find(name, "correction")
        return {
            "id": found.name,
            "object": "correction",
            "parent": self.base,
            "tier": found.tier,
            **found.facts,
            "strength": found.strength,
            "gate": {"kind": found.gate.kind, "tau": found.gate.tau},
            "provenance": dict(found.provenance),
            "report": None if found.report is None else dict(found.report),
        }

    def _find(self, name: str, field: str) -> Correction:
        """The correction of this name. Raises NotFound, with the field where the caller wrote it."""
        try:
            return self._bank.get(name)
        except NotFound as error:
            raise NotFound(str(error), field) from None
