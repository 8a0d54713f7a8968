"""The second kernel of a step: one program a row, from the groups' numbers to a finished record.

Invariant: it never guesses. A row whose token needs more than the best few tokens and the groups' masses (edits, or
filters that keep many tokens) is left as a task for `resolve`, with everything that kernel must know. Numbers do not
depend on how many tokens the rest of the batch asks for: sums over tokens are float64, and extra picks are ignored.

Its parts: the gate (gate.py), the best tokens (contest.py), the corrections (tilt.py), the draws (chance.py).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.kernels import record as rules
from trimtab.kernels.chance import RANK_ORDER, draw_grouped, draw_ranked
from trimtab.kernels.contest import find_best
from trimtab.kernels.gate import look, merge, opens
from trimtab.kernels.keys import (
    GROUP,
    INF,
    LOWEST,
    NEG_INF,
    inverse_temperature,
    key_token,
    key_value,
    load_logits,
    to_key,
)
from trimtab.kernels.record import StepInputs, StepRecord
from trimtab.kernels.stats import Groups
from trimtab.kernels.tilt import bound, compose, count_candidates, weigh_rest

OPEN, FIRED, DEAD = tl.constexpr(rules.OPEN), tl.constexpr(rules.FIRED), tl.constexpr(rules.DEAD)
PENDING = tl.constexpr(1)  # task bits: the row has no token yet
APPLIED = tl.constexpr(2)  # ... and its draw starts from the corrected logits
LAUNCH: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}  # bits must not hang on what is contracted
MAX_CANDIDATES = 64  # of a correction: more would not fit the registers
TILE_BYTES = 16384  # of the head's rows in a program's tile of products: a larger one spills


class Tasks(NamedTuple):
    """What `resolve` must know of each row."""

    task: Tensor  # int32 [rows, 2]: bits, and how many candidates were corrected
    steered: Tensor  # int64 [rows, slots]: keys of the corrected candidates
    norms: Tensor  # float32 [rows, 4]: best logit and log-mass above it, of z and of z'


@triton.jit(do_not_specialize=["mix", "rank", "alternatives"])
def finish_kernel(
    logits, logits_stride, vocab, group_peak, group_mass, group_moment, group_spread, group_tempered, stride,
    temperature, top_k, top_p, min_p, uniform,
    steered, gate, tau, ceiling, chance, correction, weight, mix, strength, kl_cap, shadow, edit_spans,
    hidden, hidden_stride, size, head, head_stride, A, B, b, cap, silu, correction_top_k, rank, alternatives,
    amended, ranked, task, steered_keys, norms,
    token_out, status_out, base_token_out, steered_token_out, entropy_out, base_logprob_out, steered_logprob_out,
    base_token_logprob_out, steered_token_logprob_out, statistic_out, kl_out, applied_strength_out,
    top_ids_out, top_logprobs_out,
    HAS_EDITS: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows). SLOTS holds the best tokens of a row, GROUPS all its groups, RANK a correction's rank."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    slot = tl.arange(0, SLOTS)
    group = tl.arange(0, GROUPS)
    at = row * stride + group
    exists = group * GROUP < vocab
    peak = tl.load(group_peak + at, mask=exists, other=NEG_INF)
    best = tl.max(peak, axis=0)
    if (best == INF) | (best == NEG_INF):
        tl.store(task + row * 2, 0)
        tl.store(token_out + row, -1)
        tl.store(status_out + row, DEAD)
        tl.store(base_token_out + row, -1)
        tl.store(steered_token_out + row, -1)
        tl.store(entropy_out + row, 0.0)
        tl.store(base_logprob_out + row, 0.0)
        tl.store(steered_logprob_out + row, 0.0)
        tl.store(base_token_logprob_out + row, 0.0)
        tl.store(steered_token_logprob_out + row, 0.0)
        tl.store(statistic_out + row, 0.0)
        tl.store(kl_out + row, 0.0)
        tl.store(applied_strength_out + row, 0.0)
        tl.store(top_ids_out + row * alternatives + slot, -1, mask=slot < alternatives)
        tl.store(top_logprobs_out + row * alternatives + slot, NEG_INF, mask=slot < alternatives)
        return

    mass1 = tl.load(group_mass + at, mask=exists, other=0.0)
    mass, log_mass, mean = merge(peak, mass1, tl.load(group_moment + at, mask=exists, other=0.0), best)
    entropy = tl.maximum(log_mass - mean, 0.0)
    kind = tl.load(gate + row)
    moment, spread = group_moment + row * stride, group_spread + row * stride
    statistic = look(kind, entropy, chance + row, logits, vocab, peak, mass1, moment, spread, group, best, mass, mean)
    opened = (tl.load(steered + row) != 0) & opens(kind, statistic, tl.load(tau + row), tl.load(ceiling + row))
    force = tl.load(strength + row)
    fired = opened & (force != 0.0)
    candidates = tl.full([], 0, tl.int32)
    if fired:
        candidates = count_candidates(correction + row * mix, mix, correction_top_k, vocab)
    acts = candidates > 0
    applied = acts & (tl.load(shadow + row) == 0)
    force = tl.where(fired, force, 0.0)

    t = tl.load(temperature + row)
    inverse = inverse_temperature(t)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    least = tl.load(min_p + row)
    edited = False
    if HAS_EDITS:
        edited = tl.load(edit_spans + row * 2 + 1) > tl.load(edit_spans + row * 2)
    filtered = (k > 0) | (p < 1.0) | (least > 0.0) | (vocab <= RANK_ORDER)
    ranks = filtered & (t > 0.0) & (edited == 0)  # this kernel may draw in rank order
    limit = tl.where(k > 0, tl.minimum(k, vocab), vocab)
    tempered = mass1
    if inverse != 1.0:
        tempered = tl.load(group_tempered + at, mask=exists, other=0.0)
    mass_t = tl.sum((tempered * tl.exp((peak - best) * inverse)).to(tl.float64), axis=0)

    # Enough of the best tokens to settle the row; the alternatives may ask for more.
    own = tl.where(acts, candidates + 1, 1)
    own = tl.where(ranks, tl.maximum(own, tl.minimum(candidates + limit, RANK_ORDER)), own)
    own = tl.minimum(tl.minimum(own, vocab), SLOTS)
    wanted = alternatives + tl.where(applied, candidates, 0)
    early = ranks & (k <= 0) & (applied == 0)  # may stop as soon as the nucleus closes
    keys, picks, beyond, touched = find_best(
        logits, vocab, peak, group, slot, candidates, own, wanted, early, best, inverse, mass_t, p, least, SLOTS
    )
    held = slot < picks
    tokens = key_token(keys)
    values = key_value(keys)
    base_token = tl.max(tl.where(slot == 0, tokens, -1), axis=0)

    # The corrections. Where they did not fire nothing of them is read, and z' is z bit for bit.
    member = slot < candidates
    lowest = tl.max(tl.where(slot == candidates - 1, keys, LOWEST), axis=0)  # the last candidate's key
    lifted = values  # z'
    kl = tl.full([], 0.0, tl.float32)
    steered_token = base_token
    steered_best = best
    steered_log_mass = log_mass
    start_best = best  # of the distribution that is sampled from
    start_log_mass = log_mass
    order = keys  # of its best tokens
    known = held
    if acts:
        delta = compose(
            correction + row * mix, weight + row * mix, mix, tokens, slot, vocab, hidden + row * hidden_stride, size,
            head, head_stride, A, B, b, cap, silu, correction_top_k, rank, SLOTS, RANK, BLOCK,
        )  # fmt: skip
        # Groups that hold candidates are summed again: what is left of each, which may lie deep under the candidates.
        home = tl.where(member, tokens // GROUP, -1)
        same = home[:, None] == home[None, :]
        leader = member & (tl.sum((same & (slot[None, :] < slot[:, None])).to(tl.int32), axis=1) == 0)
        peak_left = tl.max(tl.where(slot == candidates, values, NEG_INF), axis=0)
        shift = tl.where(peak_left == NEG_INF, best, peak_left)
        left = weigh_rest(logits, vocab, home, leader, lowest, shift, 1.0).to(tl.float64)
        far = tl.where(touched, NEG_INF, peak - shift)
        rest = tl.sum((mass1 * tl.exp(far)).to(tl.float64), axis=0) + tl.sum(left, axis=0)
        log_z = best.to(tl.float64) + log_mass
        log_rest = tl.where(rest > 0.0, tl.log(tl.maximum(rest, 1e-300)), NEG_INF) + (shift - log_z)
        log_share = tl.where(member, values.to(tl.float64) - log_z, NEG_INF)
        force, kl, gain = bound(log_share, delta, log_rest, force, tl.load(kl_cap + row))
        lifted = tl.where(member, values + force * delta, values) + 0.0
        steered_order = tl.where(held, to_key(lifted, tokens), LOWEST)
        tl.store(steered_keys + row * SLOTS + slot, steered_order)
        first = tl.max(steered_order, axis=0)
        steered_token = key_token(first)
        steered_best = key_value(first)
        steered_log_mass = (log_z - steered_best + gain).to(tl.float32)
        if applied:
            left = weigh_rest(logits, vocab, home, leader, lowest, steered_best, inverse).to(tl.float64)
            moved = tl.exp(tl.where(member, lifted - steered_best, NEG_INF) * inverse)
            away = tl.where(touched, NEG_INF, peak - steered_best)
            far_mass = tl.sum((tempered * tl.exp(away * inverse)).to(tl.float64), axis=0)
            mass_t = far_mass + tl.sum(left + moved.to(tl.float64), axis=0)
            joined = left.to(tl.float32) + tl.sum(tl.where(same, moved[None, :], 0.0), axis=1)
            tl.store(amended + row * stride + home, joined, mask=leader)
            # The order after the correction, through memory: ranks are a permutation of the held slots.
            place = tl.sum((steered_order[None, :] > steered_order[:, None]).to(tl.int32), axis=1)
            tl.store(ranked + row * SLOTS + place, steered_order, mask=held)
            tl.debug_barrier()
            order = tl.load(ranked + row * SLOTS + slot, mask=held, other=LOWEST)
            known = held & (key_value(order) > beyond)  # a demoted candidate's rank is unknown
            start_best = steered_best
            start_log_mass = steered_log_mass

    u = tl.load(uniform + row)
    token = tl.full([], -1, tl.int32)
    if edited == 0:
        if t <= 0.0:
            token = tl.where(applied, steered_token, base_token)
        elif filtered:
            token = draw_ranked(order, known, start_best, inverse, u, mass_t, beyond, limit, k > 0, p, least, slot)
        else:
            w = (tempered * tl.exp((peak - start_best) * inverse)).to(tl.float64)
            if applied:
                away2 = tl.where(touched, NEG_INF, peak - start_best)
                w = (tempered * tl.exp(away2 * inverse)).to(tl.float64)
                w += tl.load(amended + at, mask=touched, other=0.0).to(tl.float64)
            token = draw_grouped(logits, vocab, w, group, tokens, lifted, lowest, applied, start_best, inverse, u)

    tl.store(task + row * 2, tl.where(token < 0, PENDING + tl.where(applied, APPLIED, 0), 0))
    tl.store(task + row * 2 + 1, candidates)
    tl.store(norms + row * 4, best)
    tl.store(norms + row * 4 + 1, log_mass)
    tl.store(norms + row * 4 + 2, steered_best)
    tl.store(norms + row * 4 + 3, steered_log_mass)
    base_logit = load_logits(logits, tl.maximum(token, 0), vocab)
    corrected = (tokens == token) & member
    steered_logit = tl.max(tl.where(corrected, lifted, NEG_INF), axis=0)
    steered_logit = tl.where(tl.sum(corrected.to(tl.int32), axis=0) > 0, steered_logit, base_logit)
    tl.store(token_out + row, token)
    tl.store(status_out + row, tl.where(opened, OPEN, 0) + tl.where(fired, FIRED, 0))
    tl.store(base_token_out + row, base_token)
    tl.store(steered_token_out + row, steered_token)
    tl.store(entropy_out + row, entropy)
    tl.store(base_logprob_out + row, base_logit - best - log_mass)
    tl.store(steered_logprob_out + row, steered_logit - steered_best - steered_log_mass)
    tl.store(base_token_logprob_out + row, -log_mass)
    tl.store(steered_token_logprob_out + row, -steered_log_mass)
    tl.store(statistic_out + row, statistic)
    tl.store(kl_out + row, kl)
    tl.store(applied_strength_out + row, force)
    top = row * alternatives + slot
    tl.store(top_ids_out + top, key_token(order), mask=slot < alternatives)
    tl.store(top_logprobs_out + top, key_value(order) - start_best - start_log_mass, mask=slot < alternatives)


def slots_for(most: int, alternatives: int) -> int:
    """How many best tokens a row may need: its candidates, and at least one that is not."""
    assert most <= MAX_CANDIDATES
    assert alternatives <= rules.MAX_ALTERNATIVES
    return int(triton.next_power_of_2(max(most + max(alternatives, 1), RANK_ORDER.value)))


def block_for(slots: int, rank: int, itemsize: int) -> int:
    """How many hidden dimensions a program multiplies at once; itemsize: bytes of an element of the head."""
    return max(16, TILE_BYTES // (itemsize * max(slots, rank)))


def finish_rows(inputs: StepInputs, groups: Groups, record: StepRecord) -> Tasks:
    """Fill the record of every row whose token can be told from `groups`; -> what is left to do."""
    rows, vocab = inputs.logits.shape
    params, bank = inputs.params, inputs.corrections
    device = inputs.logits.device
    slots = slots_for(bank.max_top_k if bank else 0, inputs.alternatives)
    rank = bank.A.shape[1] if bank else 0
    unread = params.tau  # stands for a bank's tensors where no row has one of its corrections: then the mix is none
    tables = (
        (bank.A, bank.B, bank.b, bank.cap, bank.silu.view(torch.int8), bank.top_k)
        if bank
        else (*(unread,) * 4, params.shadow.view(torch.int8), params.top_k)
    )
    padded_rank = triton.next_power_of_2(max(rank, 1))
    stride = groups.peak.stride(0)
    tasks = Tasks(
        torch.empty(rows, 2, dtype=torch.int32, device=device),
        torch.empty(rows, slots, dtype=torch.int64, device=device),
        torch.empty(rows, 4, dtype=torch.float32, device=device),
    )
    amended = torch.empty_like(groups.peak)
    ranked = torch.empty_like(tasks.steered)
    finish_kernel[rows,](
        inputs.logits, inputs.logits.stride(0), vocab, *groups, stride,
        params.temperature, params.top_k, params.top_p, params.min_p, params.uniform,
        params.steered.view(torch.int8), params.gate, params.tau, params.ceiling, params.chance,
        params.correction, params.weight, params.correction.shape[1] if bank else 0,
        params.strength, params.kl_cap, params.shadow.view(torch.int8),
        inputs.edits.spans if inputs.edits else params.top_k,
        inputs.hidden, inputs.hidden.stride(0), inputs.hidden.shape[1], inputs.head, inputs.head.stride(0),
        *tables, rank, inputs.alternatives, amended, ranked, *tasks, *record,
        HAS_EDITS=inputs.edits is not None, SLOTS=slots, GROUPS=triton.next_power_of_2(stride), RANK=padded_rank,
        BLOCK=block_for(slots, padded_rank, inputs.head.itemsize), **LAUNCH,
    )  # fmt: skip
    return tasks
