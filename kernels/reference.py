"""The decode step in plain torch: the CPU path, and the oracle that the Triton kernel is held against.

Invariant: a row is computed from that row alone, with operations whose order does not depend on the batch, so its
record is bit-identical whoever shares the step. The semantics are numbered in record.py.

Rows are walked one by one because a row of logits fits a core's cache and a batch does not: 13 ms became 4 for 32
rows of 49152 (float32, one thread). Order and the draw are in draw.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.draw import GROUP, best_token, best_tokens, draw_token, total_mass
from trimtab.kernels.record import DEAD, FIRED, OPEN, Corrections, Edits, StepInputs, StepRecord

_FLOOR = -1e4  # exp is 0 there, and 0 * _FLOOR is 0 where 0 * -inf is NaN


class _Candidates(NamedTuple):
    """The tokens a correction acts on, for the open rows of a batch."""

    ids: Tensor  # int64 [open rows, max top_k]
    steered: Tensor  # float32 [open rows, max top_k]: z + strength * delta


@torch.inference_mode()
def step(inputs: StepInputs) -> StepRecord:
    """One decode step; see record.py. CPU tensors in, CPU tensors out."""
    rows, vocab = inputs.logits.shape
    z = torch.full((rows, -(-vocab // GROUP) * GROUP), float("-inf"))  # [rows, padded], ours to write
    z[:, :vocab] = inputs.logits
    entropy, normaliser, alive = _base_statistics(z)
    params = inputs.params
    is_open = alive & (params.correction >= 0) & (entropy > params.tau)
    fired = is_open & (params.strength != 0)
    record = _empty_record(rows, inputs.alternatives)
    record.entropy.copy_(entropy)
    record.status.copy_(is_open * OPEN + fired * FIRED + ~alive * DEAD)
    candidates = _correct(inputs, inputs.corrections, z, fired) if inputs.corrections and fired.any() else None
    nth_fired = (fired.cumsum(0) - 1).tolist()
    for row, row_alive in enumerate(alive.tolist()):
        if row_alive:
            _finish_row(inputs, row, z[row], float(normaliser[row]), _pick(candidates, fired, row, nth_fired), record)
    return record


def _base_statistics(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z [rows, padded] -> entropy in nats, log-normaliser, alive; each [rows]. Dead rows have entropy 0."""
    entropy, normaliser = torch.zeros(len(z)), torch.zeros(len(z))
    alive = torch.zeros(len(z), dtype=torch.bool)
    for row, values in enumerate(z):
        best = values.view(-1, GROUP).amax(1).amax()
        if not torch.isfinite(best):  # NaN and +inf surface in the maximum; -inf means no token is left
            continue
        d = (values - best).clamp_(min=_FLOOR)
        e = d.exp()
        mass, moment = total_mass(e), total_mass(d.mul_(e))
        log_mass = mass.log()
        entropy[row] = (log_mass - moment / mass).clamp_(min=0)  # shifted coordinates: exact as |z| grows
        normaliser[row] = best + log_mass
        alive[row] = True
    return entropy, normaliser, alive


def _correct(inputs: StepInputs, bank: Corrections, z: Tensor, fired: Tensor) -> _Candidates:
    """The corrected logits of the fired rows' candidates.

    Sums of products instead of matrix multiplications: the bits of a GEMM depend on how many rows it is given.
    """
    at = fired.nonzero()[:, 0]
    which = inputs.params.correction[at].long()
    k = min(bank.max_top_k, inputs.logits.shape[1])
    tops = [best_tokens(z[row], k) for row in at.tolist()]
    ids = torch.stack([ids for _, ids in tops])  # [fired, k]
    base = torch.stack([values for values, _ in tops])
    h = inputs.hidden[at].float()  # [fired, hidden]
    inner = (bank.A[which] * h[:, None, :]).sum(-1)  # [fired, rank]
    shift = (bank.B[which] * inner[:, None, :]).sum(-1) + bank.b[which]  # [fired, hidden]
    raw = (inputs.head[ids].float() * shift[:, None, :]).sum(-1)  # [fired, k]
    cap = bank.cap[which, None]
    delta = cap * torch.tanh(raw / cap)
    within = torch.arange(k)[None, :] < bank.top_k[which, None]
    return _Candidates(ids, torch.where(within, base + inputs.params.strength[at, None] * delta, base))


def _pick(candidates: _Candidates | None, fired: Tensor, row: int, nth: list[int]) -> tuple[Tensor, Tensor] | None:
    """The row's candidate ids and steered logits, or None where the correction did not fire."""
    if candidates is None or not fired[row]:
        return None
    return candidates.ids[nth[row]], candidates.steered[nth[row]]


def _finish_row(
    inputs: StepInputs,
    row: int,
    z: Tensor,
    normaliser: float,
    candidates: tuple[Tensor, Tensor] | None,
    out: StepRecord,
) -> None:
    """Steer, edit, draw and report one live row. z [padded] is the base's and may be overwritten."""
    params = inputs.params
    base_token = steered_token = best_token(z)
    base_best = steered_best = float(z[base_token])
    steered_normaliser, start = normaliser, z
    steered = z
    if candidates is not None:
        steered = z.scatter(0, *candidates)
        steered_normaliser = float(_log_mass(steered))
        steered_token = best_token(steered)
        steered_best = float(steered[steered_token])
        start = z if params.shadow[row] else steered
    start_normaliser = normaliser if start is z else steered_normaliser
    final = start if inputs.edits is None else _edit(start, inputs.edits, inputs, row)
    token = draw_token(final, inputs, row)
    if token < 0:  # the edits forbade every token
        out.status[row] |= DEAD
        return
    out.token[row] = token
    out.base_token[row], out.steered_token[row] = base_token, steered_token
    out.base_logprob[row] = float(z[token]) - normaliser
    out.steered_logprob[row] = float(steered[token]) - steered_normaliser
    out.base_token_logprob[row] = base_best - normaliser
    out.steered_token_logprob[row] = steered_best - steered_normaliser
    if inputs.alternatives:
        values, ids = best_tokens(start, min(inputs.alternatives, inputs.logits.shape[1]))
        out.top_ids[row, : len(ids)] = ids.int()
        out.top_logprobs[row, : len(ids)] = (
            values.double() - start_normaliser
        )  # as the token's own is computed: bit-equal


def _edit(z: Tensor, edits: Edits, inputs: StepInputs, row: int) -> Tensor:
    """Penalties and bias on the row's listed tokens (record.py, 5). -> z itself when it lists none, else a copy."""
    begin, end = int(edits.offsets[row]), int(edits.offsets[row + 1])
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


def _log_mass(z: Tensor) -> Tensor:
    """log sum exp of z [padded], with the same additions in the same order as `_base_statistics`."""
    best = z.max()
    return best + total_mass((z - best).exp_()).log()


def _empty_record(rows: int, alternatives: int) -> StepRecord:
    """A record of dead rows: every live one overwrites its own."""
    integers = [torch.full((rows,), fill, dtype=torch.int32) for fill in (-1, 0, -1, -1)]
    floats = [torch.zeros(rows) for _ in range(5)]
    top = torch.full((rows, alternatives), -1, dtype=torch.int32)
    return StepRecord._make([*integers, *floats, top, torch.full((rows, alternatives), float("-inf"))])
