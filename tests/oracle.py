"""The step's semantics (kernels/record.py) written a second time, as plainly as possible, in float64.

Slow and obvious: it sorts whole rows and keeps every intermediate. Both implementations are held against it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.record import RANK_ORDER, StepInputs


class Expected(NamedTuple):
    """One row's answer. `edges` are the values of u at which the drawn token changes: rounding may decide there."""

    entropy: float
    open: bool
    fired: bool
    base: Tensor  # float64 [vocab]: log softmax(z)
    steered: Tensor  # float64 [vocab]: log softmax(z')
    order: list[int]  # the kept tokens in the order of the draw
    probabilities: Tensor  # float64: theirs


def rank(z: Tensor) -> list[int]:
    """Token ids in (value descending, id ascending) order."""
    return sorted(range(len(z)), key=lambda i: (-float(z[i]), i))


def expect(inputs: StepInputs, row: int) -> Expected | None:
    """The answer for one row, or None when it is dead."""
    p: Any = type(inputs.params)(*(column[row].item() for column in inputs.params))
    z = inputs.logits[row].double()
    if z.isnan().any() or (z == float("inf")).any() or (z == float("-inf")).all():
        return None
    base = z.log_softmax(0)
    entropy = float(-(base.exp() * base.masked_fill(base == float("-inf"), 0)).sum())
    is_open = p.correction >= 0 and entropy > p.tau
    fired = is_open and p.strength != 0
    steered = z.clone()
    if fired and inputs.corrections is not None:
        c = inputs.corrections
        A, B, b = (t[p.correction].double() for t in (c.A, c.B, c.b))
        cap = float(c.cap[p.correction])
        shift = B @ (A @ inputs.hidden[row].double()) + b
        ids = rank(inputs.logits[row])[: int(c.top_k[p.correction])]
        steered[ids] += p.strength * cap * torch.tanh(inputs.head[ids].double() @ shift / cap)
    final = steered.clone() if fired and not p.shadow else z.clone()
    if inputs.edits is not None:
        e = inputs.edits
        for i in range(int(e.offsets[row]), int(e.offsets[row + 1])):
            token, count, bias = int(e.token[i]), int(e.counts[i]), float(e.bias[i])
            value = float(final[token])
            if count >= 0:
                value = value / p.repetition if value > 0 else value * p.repetition
            final[token] = value - p.frequency * max(count, 0) - p.presence * (count > 0) + bias
    order = [i for i in rank(final) if final[i] > float("-inf")]
    if not order:
        return None
    if p.temperature == 0:
        order = order[:1]
        return Expected(entropy, is_open, fired, base, steered.log_softmax(0), order, torch.ones(1).double())
    weights = ((final - final.max()) / p.temperature).exp()
    if p.top_k:
        order = order[: p.top_k]
    if p.top_p < 1:
        mass = weights[order].cumsum(0)
        order = order[: 1 + int((mass < p.top_p * mass[-1]).sum())]
    order = [i for i in order if weights[i] >= p.min_p * weights[order[0]]]
    unfiltered = not p.top_k and p.top_p >= 1 and p.min_p <= 0
    if len(order) > RANK_ORDER or (unfiltered and len(z) > RANK_ORDER):
        order = sorted(order)
    kept = weights[order]
    return Expected(entropy, is_open, fired, base, steered.log_softmax(0), order, kept / kept.sum())


def draw(expected: Expected, uniform: float, slack: float = 1e-5) -> set[int]:
    """The tokens that this uniform may draw: one, or two when it lies within `slack` of the edge between them."""
    edges = expected.probabilities.cumsum(0)
    picked = set()
    for u in (uniform - slack, uniform, uniform + slack):
        picked.add(expected.order[min(int((edges <= u).sum()), len(edges) - 1)])
    return picked
