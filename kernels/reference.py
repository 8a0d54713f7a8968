"""The decode step in plain torch: the CPU path, and the oracle that the Triton kernel is held against.

Invariant: a row is computed from that row alone, with operations whose order does not depend on the batch, so its
record is bit-identical whoever shares the step. The semantics are numbered in record.py.

Rows are walked one by one because a row of logits fits a core's cache and a batch does not: 13 ms became 4 for 32
rows of 49152 (float32, one thread). The exact top k comes from group maxima: the k best tokens lie in the k groups with
the best maxima. Order is made total by int64 keys: the float's ordered bits, then the lower id.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.record import DEAD, FIRED, OPEN, RANK_ORDER, Corrections, Edits, StepInputs, StepRecord

GROUP = 128  # tokens a group; also the kernel's
_ID_MASK = 0xFFFFFFFF  # the low word of a key holds the id, inverted
_STAGES = (RANK_ORDER, 1024)  # prefixes tried before sorting the whole row
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
        best = values.max()
        if not torch.isfinite(best):  # NaN and +inf surface in the maximum; -inf means no token is left
            continue
        d = (values - best).clamp_(min=_FLOOR)
        e = d.exp()
        # Sums by group: shorter chains of additions keep the entropy within 1e-6 where one long chain loses 1e-4.
        mass = e.view(-1, GROUP).sum(1).sum()
        moment = e.mul_(d).view(-1, GROUP).sum(1).sum()
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
    tops = [_top(z[row], k) for row in at.tolist()]
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
    base_token = steered_token = int(z.argmax())
    base_best = steered_best = float(z[base_token])
    steered_normaliser, start = normaliser, z
    steered = z
    if candidates is not None:
        steered = z.scatter(0, *candidates)
        steered_normaliser = float(_log_mass(steered))
        steered_token = int(steered.argmax())
        steered_best = float(steered[steered_token])
        start = z if params.shadow[row] else steered
    start_normaliser = normaliser if start is z else steered_normaliser
    final = start if inputs.edits is None else _edit(start, inputs.edits, inputs, row)
    token = _draw(final, inputs, row)
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
        values, ids = _top(start, min(inputs.alternatives, inputs.logits.shape[1]))
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


def _draw(z: Tensor, inputs: StepInputs, row: int) -> int:
    """The sampled token of one row (record.py, 6 and 7), or -1 when no token is left."""
    params = inputs.params
    vocab = inputs.logits.shape[1]
    temperature = float(params.temperature[row])
    top_k, top_p, min_p = int(params.top_k[row]), float(params.top_p[row]), float(params.min_p[row])
    uniform = float(params.uniform[row])
    best = z.max()
    if best == float("-inf"):
        return -1
    if temperature == 0:
        return int(z.argmax())
    scaled = (z - best) / temperature
    if vocab > RANK_ORDER and not top_k and top_p >= 1 and min_p <= 0:
        return _draw_by_id(scaled.exp_(), uniform)
    kept, values = _kept(scaled, vocab, top_k, top_p, min_p)
    if kept <= RANK_ORDER:
        values, ids = _top(scaled, kept)
        mass = values.double().exp().cumsum(0)
        return int(ids[int((mass <= uniform * mass[-1]).sum().clamp(max=kept - 1))])
    cut = values[kept - 1]
    ties = (scaled == cut).nonzero()[: kept - int((values > cut).sum()), 0]
    weights = scaled.exp()
    weights[scaled <= cut] = 0
    weights[ties] = cut.exp()
    return _draw_by_id(weights, uniform)


def _kept(scaled: Tensor, vocab: int, top_k: int, top_p: float, min_p: float) -> tuple[int, Tensor]:
    """How many of the best tokens the filters keep, and at least that many best values in descending order.

    A short prefix usually settles it; only a very flat distribution is sorted whole.
    """
    limit = min(top_k or vocab, vocab)
    total = scaled.exp().sum(dtype=torch.float64) if not top_k and top_p < 1 else None
    for stage in (*_STAGES, limit):
        size = min(stage, limit) if not top_k else limit
        values = scaled.topk(size).values
        mass = values.double().exp()
        kept = int((values > float("-inf")).sum())
        if top_p < 1:
            cumulative = mass.cumsum(0)
            kept = min(kept, 1 + int((cumulative < top_p * (cumulative[-1] if total is None else total)).sum()))
        if min_p > 0:
            kept = min(kept, int((mass >= min_p * mass[0]).sum()))
        if kept < size or size == limit:
            break
    return min(kept, size), values


def _draw_by_id(weights: Tensor, uniform: float) -> int:
    """Inverse CDF in ascending id order, in two levels. weights float32 [padded] >= 0, not all 0."""
    groups = weights.view(-1, GROUP)
    mass = groups.sum(1, dtype=torch.float64)
    cumulative = mass.cumsum(0)
    target = uniform * cumulative[-1]
    # Rounding may point past the last token with mass: never draw one without.
    group = min(int((cumulative <= target).sum()), int(mass.nonzero()[-1]))
    inner = groups[group].double()
    target = target - (cumulative[group] - mass[group])
    token = min(int((inner.cumsum(0) <= target).sum()), int(inner.nonzero()[-1]))
    return group * GROUP + token


def _top(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of z [padded] in (value descending, id ascending) order -> values float32 [k], ids int64 [k]."""
    groups = z.view(-1, GROUP)
    count = len(groups)
    chosen = torch.arange(count)
    if k < count:
        chosen = _ID_MASK - (_key(groups.amax(1), chosen).topk(k).values & _ID_MASK)
    ids = (chosen[:, None] * GROUP + torch.arange(GROUP)).flatten()
    keys = _key(z[ids], ids).topk(k).values
    ids = _ID_MASK - (keys & _ID_MASK)
    return z[ids], ids


def _key(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order (value descending, id ascending) when read from the largest. +0 equals -0."""
    bits = (values + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_ID_MASK - ids)


def _log_mass(z: Tensor) -> Tensor:
    """log sum exp of z [padded], with the same additions in the same order as `_base_statistics`."""
    best = z.max()
    return best + (z - best).exp_().view(-1, GROUP).sum(1).sum().log()


def _empty_record(rows: int, alternatives: int) -> StepRecord:
    """A record of dead rows: every live one overwrites its own."""
    integers = [torch.full((rows,), fill, dtype=torch.int32) for fill in (-1, 0, -1, -1)]
    floats = [torch.zeros(rows) for _ in range(5)]
    top = torch.full((rows, alternatives), -1, dtype=torch.int32)
    return StepRecord._make([*integers, *floats, top, torch.full((rows, alternatives), float("-inf"))])
