"""The decode step without kernels: the CPU path, and the oracle that the Triton kernel is held against.

Invariant: a row is computed from that row alone, with operations whose order does not depend on the batch, so its
record is bit-identical whoever shares the step. The semantics are numbered in record.py.

Rows are walked one by one because a row of logits fits a core's cache and a batch does not. Corrections are in
heads.py, order and the draw in draw.py.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.kernels.draw import GROUP, Draw, best_token, best_tokens, draw_token
from trimtab.kernels.heads import Changed, correct
from trimtab.kernels.record import DEAD, FIRED, GATE_ALWAYS, OPEN, Masks, RowParams, StepInputs, StepRecord
from trimtab.kernels.rows import Row, read_row


class _Drawn(NamedTuple):
    """The columns of the record that need a token, for one row. By default of a dead row."""

    token: int = -1
    base_token: int = -1
    steered_token: int = -1
    base_logprob: float = 0.0
    steered_logprob: float = 0.0
    base_token_logprob: float = 0.0
    steered_token_logprob: float = 0.0


def step(inputs: StepInputs) -> StepRecord:
    """One decode step; see record.py. CPU tensors in, CPU tensors out."""
    return run(inputs)[0]


@torch.inference_mode()
def run(inputs: StepInputs) -> tuple[StepRecord, dict[int, Changed]]:
    """`step`, and what corrections made of the rows that fired; by row."""
    rows, vocab = inputs.logits.shape
    params = inputs.params
    z = torch.empty(rows, -(-vocab // GROUP) * GROUP)  # [rows, padded], ours to write
    z[:, :vocab], z[:, vocab:] = inputs.logits, float("-inf")
    base = [read_row(*row) for row in zip(z, params.gate.tolist(), params.chance.tolist(), strict=True)]
    entropy, statistic = torch.tensor([(row.entropy, row.statistic) for row in base]).unbind(1)
    opened = _open(base, statistic, params)
    strength = [s if gate else 0.0 for s, gate in zip(params.strength.tolist(), opened, strict=True)]
    changed: dict[int, Changed] = {}
    if inputs.corrections is not None and any(strength):
        mixes = params.correction.tolist()
        acts = [row for row, mix in enumerate(mixes) if strength[row] != 0 and max(mix) >= 0]
        changed = correct(inputs, z, base, acts) if acts else {}
    top_ids = torch.full((rows, inputs.alternatives), -1, dtype=torch.int32)
    top_logprobs = torch.full((rows, inputs.alternatives), float("-inf"))
    draws = map(Draw, *(getattr(params, name).tolist() for name in Draw._fields))
    drawn = [
        _finish(inputs, row, draw, z[row], of, changed.get(row), top_ids, top_logprobs) if of.alive else _Drawn()
        for row, (draw, of) in enumerate(zip(draws, base, strict=True))
    ]
    status = [
        (OPEN if gate else 0) | (FIRED if s != 0 else 0) | (DEAD if row.token < 0 else 0)
        for gate, s, row in zip(opened, strength, drawn, strict=True)
    ]
    token, base_token, steered_token = torch.tensor([row[:3] for row in drawn], dtype=torch.int32).unbind(1)
    kl = torch.tensor([changed[row].kl if row in changed else 0.0 for row in range(rows)])
    applied = torch.tensor([changed[row].strength if row in changed else s for row, s in enumerate(strength)])
    logprobs = torch.tensor([row[3:] for row in drawn]).unbind(1)
    integers = (token, torch.tensor(status, dtype=torch.int32), base_token, steered_token)
    return StepRecord._make([*integers, entropy, *logprobs, statistic, kl, applied, top_ids, top_logprobs]), changed


def _open(base: list[Row], statistic: Tensor, params: RowParams) -> list[bool]:
    """Which gates open, judged on the statistic as it is reported: float32."""
    asked = (statistic, params.tau, params.ceiling, params.gate, params.steered)
    return [
        row.alive and steered and (gate == GATE_ALWAYS or tau < value <= ceiling)
        for row, value, tau, ceiling, gate, steered in zip(base, *(column.tolist() for column in asked), strict=True)
    ]


def _finish(
    inputs: StepInputs,
    row: int,
    draw: Draw,
    z: Tensor,
    base: Row,
    changed: Changed | None,
    top_ids: Tensor,
    top_logprobs: Tensor,
) -> _Drawn:
    """Edit and draw one live row, unless its token is forced, and report it.

    z [padded] holds z'; the row of top_* is overwritten.
    """
    start, maxima, normaliser = z, base.maxima, base.normaliser
    steered_best, steered_normaliser = base.best, normaliser
    if changed is None:
        base_token = steered_token = best_token(z, maxima)
    else:
        base_token = int(changed.ids[0])
        steered_token = changed.token
        steered_best, steered_normaliser = float(z[steered_token]), changed.normaliser
        if inputs.params.shadow[row]:
            start = z.scatter(0, changed.ids, changed.base)
        else:
            maxima, normaliser = changed.maxima, changed.normaliser
    token = int(inputs.params.forced[row])
    if token < 0:
        final = start if inputs.edits is None else _edit(start, inputs, row)
        final = final if inputs.mask is None else _mask(final, inputs.mask, row)
        peaks = maxima if final is start else final.view(-1, GROUP).amax(1)
        token = draw_token(final, peaks, inputs.logits.shape[1], draw)
    if token < 0:  # the edits or the mask forbade every token, or the edits made one infinite
        return _Drawn()
    if inputs.alternatives:
        k = min(inputs.alternatives, inputs.logits.shape[1])
        values, ids = (torch.from_numpy(found) for found in best_tokens(start, maxima, k))
        top_ids[row, :k] = ids
        # float64, as the token's own log-probability below: the two must be the same float
        top_logprobs[row, :k] = values.double() - normaliser
    return _Drawn(
        token=token,
        base_token=base_token,
        steered_token=steered_token,
        base_logprob=float(inputs.logits[row, token]) - base.normaliser,
        steered_logprob=float(z[token]) - steered_normaliser,
        base_token_logprob=base.best - base.normaliser,
        steered_token_logprob=steered_best - steered_normaliser,
    )


def _edit(z: Tensor, inputs: StepInputs, row: int) -> Tensor:
    """Penalties and bias on the row's listed tokens (record.py, 5). -> z itself when it lists none, else a copy."""
    params, edits = inputs.params, inputs.edits
    assert edits is not None
    begin, end = edits.spans[row].tolist()
    if begin == end:
        return z
    token, count = edits.token[begin:end].long(), edits.counts[begin:end]
    values = z[token]
    repeated = torch.where(values > 0, values / params.repetition[row], values * params.repetition[row])
    values = torch.where(count >= 0, repeated, values)
    values = values - params.frequency[row] * count.clamp(min=0)
    values = values - params.presence[row] * (count > 0)
    return z.scatter(0, token, values + edits.bias[begin:end])


def _mask(z: Tensor, mask: Masks, row: int) -> Tensor:
    """z [padded] with -inf where the row's mask (record.py, 5b) has no bit. -> z itself if it has none, else a copy."""
    line = int(mask.row[row])
    if line < 0:
        return z
    bits = np.unpackbits(mask.words[line].numpy().view(np.uint8), bitorder="little")  # [words * 32], fast
    masked = torch.full_like(z, float("-inf"))
    masked[: len(bits)] = torch.where(torch.from_numpy(bits).bool(), z[: len(bits)], float("-inf"))
    return masked
