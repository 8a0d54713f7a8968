"""What a row's gate looks at, inside its program: the entropy, and the other statistics where the row asks for one.

Invariant: sums over groups are float64, of numbers of one group each; a statistic is computed for its own gate only.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
import triton
import triton.language as tl

from trimtab.kernels import record as rules
from trimtab.kernels.keys import GROUP, LOWEST, NEG_INF, key_token, key_value, load_logits, to_key

VARENTROPY, MARGIN = tl.constexpr(rules.GATE_VARENTROPY), tl.constexpr(rules.GATE_MARGIN)
RANDOM, ALWAYS = tl.constexpr(rules.GATE_RANDOM), tl.constexpr(rules.GATE_ALWAYS)


@triton.jit
def merge(peak, mass1, moment, best):
    """The groups' numbers -> the row's mass (float64), its logarithm, and the mean of z - best.

    In these shifted coordinates the entropy, log_mass - mean, keeps its digits as |z| grows.
    """
    gap = tl.maximum(peak - best, -200.0)  # exp is 0 long before; 0 * -inf would be NaN
    weight = tl.exp(gap)
    mass = tl.sum((weight * mass1).to(tl.float64), axis=0)
    dot = tl.sum((weight * (moment + mass1 * gap)).to(tl.float64), axis=0)
    return mass, tl.log(mass.to(tl.float32)), (dot / mass).to(tl.float32)


@triton.jit
def look(kind, entropy, chance, logits, vocab, peak, mass1, moment, spread, group, best, mass, mean):
    """The statistic of this kind of gate. chance: a pointer to the row's; moment and spread: to its groups'."""
    statistic = entropy
    if kind == VARENTROPY:
        exists = group * GROUP < vocab
        first = tl.load(moment + group, mask=exists, other=0.0)
        second = tl.load(spread + group, mask=exists, other=0.0)
        gap = tl.maximum(peak - best, -200.0)
        off = gap - mean  # deviations from the mean: no difference of large squares is taken
        square = tl.exp(gap) * (second + 2.0 * off * first + off * off * mass1)
        statistic = tl.maximum((tl.sum(square.to(tl.float64), axis=0) / mass).to(tl.float32), 0.0)
    if kind == MARGIN:
        home = key_token(tl.max(to_key(peak, group * GROUP), axis=0)) // GROUP
        lane = home * GROUP + tl.arange(0, GROUP)
        keys = tl.where(lane < vocab, to_key(load_logits(logits, lane, vocab), lane), LOWEST)
        beside = key_value(tl.max(tl.where(keys < tl.max(keys, axis=0), keys, LOWEST), axis=0))
        beyond = tl.max(tl.where(group == home, NEG_INF, peak), axis=0)
        statistic = (tl.exp(tl.maximum(beside, beyond) - best) - 1.0) / mass.to(tl.float32)
    if kind == RANDOM:
        statistic = tl.load(chance)
    return statistic


@triton.jit
def opens(kind, statistic, tau, ceiling):
    return (kind == ALWAYS) | ((statistic > tau) & (statistic <= ceiling))
