"""The decode step in plain torch: the CPU path, and the oracle that the Triton kernel is held against.

Invariant: a row is computed from that row alone, with operations whose order does not depend on the batch, so its
record is bit-identical whoever shares the step. The semantics are numbered in record.py.

Rows are walked one by one because a row of logits fits a core's cache and a batch does not. Corrections are in
heads.py, order and the draw in draw.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.draw import GROUP, best_token, best_tokens, draw_token, total_mass
from trimtab.kernels.heads import Candidates, correct
from trimtab.kernels.record import (
    DEAD,
    FIELDS,
    FIRED,
    GATE_ALWAYS,
    GATE_MARGIN,
    GATE_RANDOM,
    GATE_VARENTROPY,
    OPEN,
    Edits,
    RowParams,
    StepInputs,
    StepRecord,
)

_FLOOR = -1e4  # exp is 0 there, and 0 * _FLOOR is 0 where 0 * -inf is NaN


class _Rows(NamedTuple):
    """What one pass over the logits leaves: the rest of a step reads groups, not rows."""

    entropy: Tensor  # [rows] nats; 0 for a dead row
    statistic: Tensor  # [rows] of the row's gate; 0 for a dead row
    alive: Tensor  # [rows] bool
    best: Tensor  # [rows]: the largest logit
    normaliser: Tensor  # [rows]: log sum exp
    maxima: Tensor  # [rows, groups]: each group's largest logit
    masses: Tensor  # [rows, groups]: each group's sum of exp(z - best)


@torch.inference_mode()
def step(inputs: StepInputs) -> StepRecord:
    """One decode step; see record.py. CPU tensors in, CPU tensors out."""
    rows, vocab = inputs.logits.shape
    z = torch.full((rows, -(-vocab // GROUP) * GROUP), float("-inf"))  # [rows, padded], ours to write
    z[:, :vocab] = inputs.logits
    params = inputs.params
    base = _read_rows(z, params)
    within = (base.statistic > params.tau) & (base.statistic <= params.ceiling)
    is_open = base.alive & params.steered & (within | (params.gate == GATE_ALWAYS))
    fired = is_open & (params.strength != 0)
    record = _empty_record(rows, inputs.alternatives)
    record.entropy.copy_(base.entropy)
    record.statistic.copy_(base.statistic)
    record.status.copy_(is_open * OPEN + fired * FIRED + ~base.alive * DEAD)
    record.applied_strength.copy_(params.strength * fired)
    for row, (alive, acts) in enumerate(zip(base.alive.tolist(), fired.tolist(), strict=True)):
        if alive:
            candidates = correct(inputs, row, z[row], base.maxima[row], float(base.normaliser[row])) if acts else None
            _finish_row(inputs, row, z[row], base, candidates, record)
    return record


def _read_rows(z: Tensor, params: RowParams) -> _Rows:
    """z [rows, padded] -> its statistics, with one pass a row while the row is in cache."""
    rows = len(z)
    groups = z.shape[1] // GROUP
    entropy, best, normaliser = torch.zeros(3, rows)
    maxima, masses = torch.zeros(2, rows, groups)
    alive = torch.zeros(rows, dtype=torch.bool)
    others: dict[int, Tensor] = {}  # statistics that are not the entropy, by row
    for row, (values, gate) in enumerate(zip(z, params.gate.tolist(), strict=True)):
        torch.amax(values.view(-1, GROUP), 1, out=maxima[row])
        top = maxima[row].amax()
        if not torch.isfinite(top):  # NaN and +inf surface in the maximum; -inf means no token is left
            continue
        d = (values - top).clamp_(min=_FLOOR)
        e = d.exp()
        torch.sum(e.view(-1, GROUP), 1, out=masses[row])
        mass = masses[row].sum()
        log_mass = mass.log()
        mean = total_mass(d.mul_(e)) / mass
        entropy[row] = (log_mass - mean).clamp_(min=0)  # shifted: exact as |z| grows
        best[row] = top
        normaliser[row] = top + log_mass
        alive[row] = True
        if gate == GATE_VARENTROPY:
            deviation = (values - top).clamp_(min=_FLOOR).sub_(mean)
            others[row] = total_mass(deviation.square_().mul_(e)) / mass
        elif gate == GATE_MARGIN:
            first, second = best_tokens(z[row : row + 1], maxima[row : row + 1], 2)[0][0]
            others[row] = (second - first).expm1() / mass
        elif gate == GATE_RANDOM:
            others[row] = params.chance[row]
    statistic = entropy.clone()
    for row, value in others.items():
        statistic[row] = value
    return _Rows(entropy, statistic, alive, best, normaliser, maxima, masses)


def _finish_row(
    inputs: StepInputs, row: int, z: Tensor, base: _Rows, candidates: Candidates | None, out: StepRecord
) -> None:
    """Steer, edit, draw and report one live row. z [padded] is the base's and is overwritten."""
    maxima, base_normaliser = base.maxima[row], float(base.normaliser[row])
    base_token = steered_token = best_token(z, maxima)
    base_best = steered_best = float(base.best[row])
    normaliser, steered_normaliser = base_normaliser, base_normaliser
    applied = candidates is not None and not inputs.params.shadow[row]
    if candidates is not None:
        out.kl[row], out.applied_strength[row] = candidates.kl, candidates.strength
        z[candidates.ids] = candidates.steered
        steered_maxima, steered_normaliser = _read_steered(z, base, row, candidates.ids)
        steered_token = best_token(z, steered_maxima)
        steered_best = float(z[steered_token])
        if applied:
            maxima, normaliser = steered_maxima, steered_normaliser
        else:
            z[candidates.ids] = candidates.base
    final = z if inputs.edits is None else _edit(z, inputs.edits, inputs, row)
    token = draw_token(final, maxima if final is z else final.view(-1, GROUP).amax(1), inputs, row)
    if token < 0:  # the edits forbade every token
        out.status[row] |= DEAD
        return
    base_value = steered_value = float(inputs.logits[row, token])
    if candidates is not None and (at := (candidates.ids == token).nonzero()).numel():
        steered_value = float(candidates.steered[at[0, 0]])
    out.token[row] = token
    out.base_token[row], out.steered_token[row] = base_token, steered_token
    out.base_logprob[row] = base_value - base_normaliser
    out.steered_logprob[row] = steered_value - steered_normaliser
    out.base_token_logprob[row] = base_best - base_normaliser
    out.steered_token_logprob[row] = steered_best - steered_normaliser
    if inputs.alternatives:
        k = min(inputs.alternatives, inputs.logits.shape[1])
        values, ids = best_tokens(z[None], maxima[None], k)
        out.top_ids[row, :k] = ids[0].int()
        # float64, as the token's own log-probability above: the two must be the same float
        out.top_logprobs[row, :k] = values[0].double() - normaliser


def _read_steered(z: Tensor, base: _Rows, row: int, ids: Tensor) -> tuple[Tensor, float]:
    """Maxima and log-normaliser of a row whose `ids` have changed: only their groups are read again."""
    touched = ids // GROUP
    groups = z.view(-1, GROUP)[touched]
    maxima = base.maxima[row].index_copy(0, touched, groups.amax(1))
    best = maxima.amax()
    masses = base.masses[row] * (base.best[row] - best).exp()
    masses[touched] = (groups - best).exp_().sum(1)
    return maxima, float(best + masses.sum().log())


def _edit(z: Tensor, edits: Edits, inputs: StepInputs, row: int) -> Tensor:
    """Penalties and bias on the row's listed tokens (record.py, 5). -> z itself when it lists none, else a copy."""
    begin, end = edits.spans[row].tolist()
    if begin == end:
        return z
    token, count = edits.token[begin:end].long(), edits.counts[begin:end]
    params = inputs.params
    values = z[token]
    repeated = torch.where(values > 0, values / params.repetition[row], values * params.repetition[row])
    values = torch.where(count >= 0, repeated, values)
    values = values - params.frequency[row] * count.clamp(min=0)
    values = values - params.presence[row] * (count > 0)
    return z.scatter(0, token, values + edits.bias[begin:end])


def _empty_record(rows: int, alternatives: int) -> StepRecord:
    """A record of dead rows: every live one overwrites its own."""
    integers = [torch.full((rows,), fill, dtype=torch.int32) for fill in (-1, 0, -1, -1)]
    floats = [torch.zeros(rows) for _ in range(4, FIELDS)]
    top = torch.full((rows, alternatives), -1, dtype=torch.int32)
    return StepRecord._make([*integers, *floats, top, torch.full((rows, alternatives), float("-inf"))])
