"""What steering did to one choice, in JSON: the summary and, when asked, the receipts token by token.

Invariant: every sampled token counts as a step, shown or not: `steps` equals the choice's completion tokens.
"""

import math
from typing import Any

from trimtab.server.catalogue import Chosen
from trimtab.server.engine.event import Receipt
from trimtab.server.engine.pieces import Pieces
from trimtab.server.stream import Step

_LIMIT = 9999.0  # stands for infinity, which JSON does not know


def finite(value: float) -> float:
    """A number that JSON can say."""
    return max(-_LIMIT, min(_LIMIT, value))


class Tally:
    """Counts the steps of one choice."""

    def __init__(self, chosen: Chosen) -> None:
        self._chosen = chosen
        self._steps = self._open = self.fired = self.flips = 0
        self._entropy = self._kl = 0.0

    def add(self, receipt: Receipt) -> None:
        self._steps += 1
        self._open += receipt.open
        self.fired += receipt.fired
        self.flips += receipt.flip
        self._entropy += receipt.entropy
        self._kl += receipt.kl

    def summary(self) -> dict[str, Any]:
        steering, rule = self._chosen.steering, self._chosen.rule
        chosen = steering.correction is not None
        together = {str(steering.correction): steering.weight, **steering.also} if steering.also else None
        return {
            "correction": steering.correction,
            "version": rule.version,
            **({"corrections": together, "versions": rule.versions} if together else {}),
            "mode": steering.mode,
            "strength": rule.strength if chosen else None,
            "gate": rule.gate if chosen else None,
            "tau": rule.tau if math.isfinite(rule.tau) else None,
            "ceiling": rule.ceiling if math.isfinite(rule.ceiling) else None,
            "steps": self._steps,
            "open": self._open,
            "fired": self.fired,
            "flips": self.flips,
            "mean_entropy": self._entropy / self._steps if self._steps else None,
            "kl": self._kl / self.fired if self.fired else None,
        }


def receipt_json(step: Step, pieces: Pieces) -> dict[str, Any]:
    """One receipt, with its tokens as text beside their ids."""
    receipt = step.receipt
    return {
        "token": pieces.label(step.token),
        "token_id": step.token,
        "entropy": finite(receipt.entropy),
        "open": receipt.open,
        "fired": receipt.fired,
        "flip": receipt.flip,
        "base_token": pieces.label(receipt.base_token),
        "base_token_id": receipt.base_token,
        "steered_token": pieces.label(receipt.steered_token),
        "steered_token_id": receipt.steered_token,
        "base_logprob": finite(receipt.base_logprob),
        "steered_logprob": finite(receipt.steered_logprob),
        "base_token_logprob": finite(receipt.base_token_logprob),
        "steered_token_logprob": finite(receipt.steered_token_logprob),
        "statistic": finite(receipt.statistic),
        "kl": finite(receipt.kl),
        "strength": receipt.strength,
    }
