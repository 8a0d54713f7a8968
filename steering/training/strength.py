"""Strength: how hard a correction pushes, chosen by how far from the base that brings it.

A divergence here is a function of the strength: held-out KL(base || corrected) in nats a position, which grows with it.
Invariant: a control is brought to its correction's own divergence, or as near as STRENGTH_LIMIT lets it, and says so.
"""

import math
from collections.abc import Callable

from trimtab.steering.training.config import STRENGTH_LIMIT, FitConfig
from trimtab.steering.training.progress import say

Divergence = Callable[[float], float]


def within_limit(divergence: Divergence, config: FitConfig) -> dict[float, float]:
    """The config's strengths that keep within its KL limit, and their KL; where none does, the one that meets it."""
    limit = config.kl_limit
    kls = {strength: divergence(strength) for strength in config.strengths}
    within = {strength: kl for strength, kl in kls.items() if not limit or kl <= limit}
    if not within:
        strength = bisect(divergence, limit)
        within = {strength: divergence(strength)}
    shown = ", ".join(f"x{s:g} {kl:.3f}{'' if s in within else ' (too far)'}" for s, kl in (kls | within).items())
    say("strengths", f"held-out KL from the base: {shown}; the limit is {limit or 'off'}")
    return within


def bring_to(divergence: Divergence, kl: float, kind: str) -> tuple[float, float]:
    """The strength at which a control pushes as hard as its correction, which is `kl` from the base, and its own KL."""
    strength = bisect(divergence, kl)
    plain, reached = divergence(1.0), divergence(strength)
    words = f"held-out KL {plain:.3f}, brought to {reached:.3f} (the correction's: {kl:.3f}) by strength {strength:.2f}"
    say(kind, words + (", the limit: it pushes less than the correction" if strength >= STRENGTH_LIMIT else ""))
    return strength, reached


def bisect(divergence: Divergence, kl: float) -> float:
    """The strength at which the divergence is `kl`, or just below; STRENGTH_LIMIT where even that is less."""
    if divergence(STRENGTH_LIMIT) < kl:
        return STRENGTH_LIMIT
    low, high = 0.0, STRENGTH_LIMIT
    for _ in range(20):
        middle = (low + high) / 2
        if divergence(middle) < kl:
            low = middle
        else:
            high = middle
    return math.floor(low * 1e4) / 1e4
