"""What one pass over a row's logits leaves, on the CPU: the rest of a step reads groups, not rows.

Invariant: everything is taken below the row's largest logit: exact however large the logits are.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.draw import GROUP, best_tokens, total_mass
from trimtab.kernels.record import GATE_MARGIN, GATE_RANDOM, GATE_VARENTROPY

_FLOOR = -1e4  # exp is 0 there, and 0 * _FLOOR is 0 where 0 * -inf is NaN


class Row(NamedTuple):
    """One row's statistics. By default those of a dead row."""

    alive: bool = False
    entropy: float = 0.0  # nats
    statistic: float = 0.0  # of the row's gate
    best: float = 0.0  # the largest logit
    normaliser: float = 0.0  # log sum exp
    maxima: Tensor = torch.empty(0)  # [groups]: each group's largest logit
    masses: Tensor = torch.empty(0)  # [groups]: each group's sum of exp(z - best)


def read_row(z: Tensor, gate: int, chance: float) -> Row:
    """z [padded] of one row, the kind of its gate, and the statistic of GATE_RANDOM."""
    maxima = z.view(-1, GROUP).amax(1)
    best = float(maxima.amax())
    if not math.isfinite(best):  # NaN and +inf surface in the maximum; -inf means no token is left
        return Row()
    d = (z - best).clamp_(min=_FLOOR)
    e = d.exp()
    masses = e.view(-1, GROUP).sum(1)
    mass = float(masses.sum())
    log_mass = math.log(mass)
    mean = float(total_mass(d.mul_(e))) / mass  # of d
    entropy = max(log_mass - mean, 0.0)
    statistic = entropy
    if gate == GATE_VARENTROPY:
        statistic = float(total_mass((z - best).clamp_(min=_FLOOR).sub_(mean).square_().mul_(e))) / mass
    elif gate == GATE_MARGIN:
        first, second = best_tokens(z, maxima, 2)[0].tolist()
        statistic = math.expm1(second - first) / mass
    elif gate == GATE_RANDOM:
        statistic = chance
    return Row(True, entropy, statistic, best, best + log_mass, maxima, masses)
