"""The third kernel of a step: the head tier, for the rows that it steers.

Invariant: a row that did not fire returns at once and reads nothing of a correction. The tokens that no correction
touches count as one mass, weighed above the best of them: no peak that a correction demotes can round it to 0. A group
is weighed anew only if it holds a candidate, so nothing hangs on what else `finish` read for the rest of the batch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from typing import Any

import torch
import triton
import triton.language as tl

from trimtab.kernels.chance import count_own, draw_best, draw_group, draw_within
from trimtab.kernels.delta import bound, compose
from trimtab.kernels.keys import (
    COLUMNS,
    GROUP,
    LOWEST,
    NEG_INF,
    inverse_temperature,
    key_token,
    key_value,
    load_logits,
    to_key,
)
from trimtab.kernels.record import StepInputs, StepRecord
from trimtab.kernels.selection import TURN, from_rank, places, weigh_rest
from trimtab.kernels.stats import Groups
from trimtab.kernels.tasks import APPLIED, PENDING, State, Tasks

LAUNCH: dict[str, Any] = {"num_warps": 8, "maxnreg": 128, "enable_fp_fusion": False}  # two programs a multiprocessor
ROWS = 16  # groups that are read at once
DOWN_TILE = 4096  # elements of a program's tile of A or B
HEAD_TILE = 8192  # ... and of the head's rows, where those have two bytes


@triton.jit(do_not_specialize=["mix", "alternatives"], do_not_specialize_on_alignment=COLUMNS)
def tilt_kernel(
    logits, logits_stride, vocab, group_peak, group_mass, group_tempered, stride,
    temperature, top_k, top_p, min_p, noise, correction, weight, mix, strength, kl_cap, shadow, forced,
    edit_spans, mask_row,
    hidden, hidden_stride, size, head, head_stride, A, B, b, cap, silu, correction_top_k, rank, alternatives,
    state, chosen, scratch, ranked, moves, rests, warm_rests, shifts, task, steered_keys, norms,
    token_out, steered_token_out, base_logprob_out, steered_logprob_out, steered_token_logprob_out,
    kl_out, applied_strength_out, top_ids_out, top_logprobs_out,
    HAS_EDITS: tl.constexpr, HAS_MASKS: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    CANDIDATES: tl.constexpr, RANK: tl.constexpr, DOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    candidates = tl.load(state + row * 4)
    if candidates == 0:
        return
    logits += row * logits_stride
    POOL: tl.constexpr = 2 * SLOTS
    chosen += row * SLOTS
    ranked += row * POOL
    group_peak += row * stride
    group_mass += row * stride
    group_tempered += row * stride
    moves += row * SLOTS
    rests += row * stride
    warm_rests += row * stride
    steered_keys += row * SLOTS
    scratch += row * (2 * POOL)
    slot = tl.arange(0, SLOTS)
    c = tl.arange(0, CANDIDATES)
    of_candidate = tl.load(ranked + c, mask=c < candidates, other=LOWEST)
    delta = compose(
        correction + row * mix, weight + row * mix, mix, key_token(of_candidate), vocab, hidden + row * hidden_stride,
        size, head, head_stride, A, B, b, cap, silu, correction_top_k, rank, shifts + row * size,
        CANDIDATES, RANK, DOWN, BLOCK,
    )  # fmt: skip
    tl.store(moves + c, delta, mask=c < candidates)
    tl.debug_barrier()

    found = tl.load(state + row * 4 + 1)
    held = tl.load(state + row * 4 + 2)
    outside = tl.load(state + row * 4 + 3)
    best = tl.load(norms + row * 4)
    log_mass = tl.load(norms + row * 4 + 1)
    force = tl.load(strength + row)
    applied = tl.load(shadow + row) == 0
    t = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    least = tl.load(min_p + row)
    own_noise = tl.load(noise + row)
    edited = False
    if HAS_EDITS:
        edited = tl.load(edit_spans + row * 2 + 1) > tl.load(edit_spans + row * 2)
    if HAS_MASKS:
        edited = edited | (tl.load(mask_row + row) >= 0)
    if tl.load(forced + row) >= 0:  # as in `finish`
        t = 0.0
        edited = False
    most = tl.load(kl_cap + row)

    # The mass of all other tokens, above the best of them: by group, through memory, and at the row's temperature too.
    lowest = tl.load(ranked + candidates - 1)
    next_key = tl.load(ranked + candidates, mask=candidates < held, other=LOWEST)
    ceiling = tl.where(candidates < held, key_value(next_key), from_rank(outside))
    shift = tl.where(ceiling == NEG_INF, 0.0, ceiling)
    inverse = inverse_temperature(t)
    group = tl.arange(0, GROUPS)
    exists = group * GROUP < vocab
    above = tl.load(group_peak + group, mask=exists, other=NEG_INF) - shift
    mass1 = tl.load(group_mass + group, mask=exists, other=0.0)
    tempered = mass1
    if inverse != 1.0:
        tempered = tl.load(group_tempered + group, mask=exists, other=0.0)
    tl.store(rests + group, mass1 * tl.exp(above), mask=exists)
    tl.store(warm_rests + group, tempered * tl.exp(above * inverse), mask=exists)
    tl.debug_barrier()
    weigh_rest(logits, vocab, chosen, found, lowest, shift, inverse, rests, warm_rests, ROWS)
    tl.debug_barrier()
    rest_mass = tl.sum(tl.load(rests + group, mask=exists, other=0.0).to(tl.float64), axis=0)

    # The strength, as far as the cap allows; then the candidates' new logits, and the best of all.
    keys = tl.load(ranked + slot, mask=slot < held, other=LOWEST)
    in_play = slot < tl.minimum(held, SLOTS)
    member = slot < candidates
    tokens = key_token(keys)
    values = key_value(keys)
    delta = tl.load(moves + slot, mask=member, other=0.0)
    log_z = best.to(tl.float64) + log_mass
    log_share = tl.where(member, values.to(tl.float64) - log_z, NEG_INF)
    log_rest = tl.where(rest_mass > 0.0, tl.log(tl.maximum(rest_mass, 1e-300)), NEG_INF) + (shift - log_z)
    force, kl, gain = bound(log_share, delta, log_rest, force, most)
    steered = tl.where(member, values + force * delta, values) + 0.0
    steered_order = tl.where(in_play, to_key(steered, tokens), LOWEST)
    tl.store(steered_keys + slot, steered_order)
    first = tl.max(steered_order, axis=0)
    steered_token = key_token(first)
    steered_best = key_value(first)
    steered_log_mass = (log_z - steered_best + gain).to(tl.float32)
    tl.store(norms + row * 4 + 2, steered_best)
    tl.store(norms + row * 4 + 3, steered_log_mass)
    tl.store(steered_token_out + row, steered_token)
    tl.store(steered_token_logprob_out + row, -steered_log_mass)
    tl.store(kl_out + row, kl)
    tl.store(applied_strength_out + row, force)
    tl.store(task + row * 2 + 1, candidates)

    token = tl.load(token_out + row)  # in shadow
    if applied:
        scale = tl.exp((ceiling - steered_best) * inverse)
        moved = tl.exp(tl.where(member, steered - steered_best, NEG_INF) * inverse)
        limit = tl.where(k > 0, tl.minimum(k, vocab), vocab)
        filtered = (k > 0) | (p < 1.0) | (least > 0.0)
        own = count_own(candidates, filtered & (t > 0.0) & (edited == 0), limit, vocab, SLOTS)
        other = tl.load(ranked + own, mask=own < held, other=LOWEST)
        beyond = tl.where(own < held, key_value(other), from_rank(outside))
        # The order after the correction, through memory.
        tl.debug_barrier()
        place = places(steered_order, steered_keys, tl.minimum(held, SLOTS), SLOTS)
        tl.store(ranked + place, steered_order, mask=in_play)
        tl.debug_barrier()
        order = tl.load(ranked + slot, mask=in_play, other=LOWEST)
        token = tl.full([], -1, tl.int32)
        if edited == 0:
            if t <= 0.0:
                asked = tl.load(forced + row)
                token = tl.where(asked >= 0, asked, steered_token)
            elif filtered:
                warm = tl.load(warm_rests + group, mask=exists, other=0.0).to(tl.float64)
                mass_t = tl.sum(warm, axis=0) * scale.to(tl.float64) + tl.sum(moved.to(tl.float64), axis=0)
                known = in_play & (key_value(order) > beyond)  # a demoted candidate's rank is unknown
                token = draw_best(
                    order, known, steered_best, inverse, own_noise, mass_t, beyond, limit, k > 0, p, least, slot, ranked
                )
            else:
                # To the rest of each group, the candidates that it holds.
                tl.store(moves + slot, moved)
                tl.debug_barrier()
                home = tl.load(chosen + slot, mask=slot < found, other=-1)
                new = tl.zeros([SLOTS, TURN], tl.float32)
                for start in range(0, candidates, TURN):
                    item = start + tl.arange(0, TURN)
                    listed = tl.load(steered_keys + item, mask=item < candidates, other=LOWEST)
                    theirs = tl.load(moves + item, mask=item < candidates, other=0.0)
                    new += tl.where(home[:, None] == (key_token(listed) // GROUP)[None, :], theirs[None, :], 0.0)
                left = tl.load(warm_rests + home, mask=slot < found, other=0.0) * scale
                w = tl.load(warm_rests + group, mask=exists, other=0.0) * scale
                tl.store(rests + group, w, mask=exists)
                tl.debug_barrier()
                tl.store(rests + home, left + tl.sum(new, axis=1), mask=slot < found)
                tl.debug_barrier()
                w = tl.load(rests + group, mask=exists, other=0.0)
                drawn = draw_group(w.to(tl.float64), group, own_noise)
                inner = tl.arange(0, GROUP)
                tl.store(scratch + inner, load_logits(logits, drawn * GROUP + inner, vocab))
                tl.debug_barrier()
                tl.store(scratch + tokens % GROUP, steered, mask=member & (tokens // GROUP == drawn))
                tl.debug_barrier()
                z = tl.load(scratch + inner)
                token = draw_within(tl.exp((z - steered_best) * inverse).to(tl.float64), drawn, own_noise)
        tl.store(token_out + row, token)
        tl.store(task + row * 2, tl.where(token < 0, PENDING | APPLIED, 0))
        top = row * alternatives + slot
        tl.store(top_ids_out + top, key_token(order), mask=slot < alternatives)
        ahead = key_value(order) - steered_best - steered_log_mass
        tl.store(top_logprobs_out + top, ahead, mask=slot < alternatives)
    base_logit = load_logits(logits, tl.maximum(token, 0), vocab)
    hit = (tokens == token) & member
    steered_logit = tl.max(tl.where(hit, steered, NEG_INF), axis=0)
    steered_logit = tl.where(tl.sum(hit.to(tl.int32), axis=0) > 0, steered_logit, base_logit)
    tl.store(base_logprob_out + row, base_logit - best - log_mass)
    tl.store(steered_logprob_out + row, steered_logit - steered_best - steered_log_mass)


def tiles(most: int, rank: int, itemsize: int) -> dict[str, int]:
    """The shapes of a correction's products; itemsize: bytes of an element of the head."""
    candidates, padded = max(16, triton.next_power_of_2(most)), triton.next_power_of_2(max(rank, 1))
    down = max(16, DOWN_TILE // padded)
    block = max(16, HEAD_TILE * 2 // itemsize // candidates)
    return {"CANDIDATES": candidates, "RANK": padded, "DOWN": down, "BLOCK": block}


def tilt_rows(inputs: StepInputs, groups: Groups, tasks: Tasks, state: State, record: StepRecord) -> None:
    """Correct the rows that fired."""
    bank, params = inputs.corrections, inputs.params
    if bank is None:
        return
    rows, vocab = inputs.logits.shape
    size, rank = inputs.hidden.shape[1], bank.A.shape[1]
    shape = tiles(bank.max_top_k, rank, inputs.head.itemsize)
    stride = groups.peak.stride(0)
    moves = torch.empty(state.chosen.shape, dtype=torch.float32, device=inputs.logits.device)
    rests, warm_rests = torch.empty(2, rows, stride, dtype=torch.float32, device=inputs.logits.device).unbind(0)
    shifts = torch.empty(rows, size, dtype=torch.float32, device=inputs.logits.device)
    tilt_kernel[rows,](
        inputs.logits, inputs.logits.stride(0), vocab, groups.peak, groups.mass, groups.tempered, stride,
        params.temperature, params.top_k, params.top_p, params.min_p, params.noise,
        params.correction, params.weight, params.correction.shape[1],
        params.strength, params.kl_cap, params.shadow.view(torch.int8), params.forced,
        inputs.edits.spans if inputs.edits else params.top_k, inputs.mask.row if inputs.mask else params.top_k,
        inputs.hidden, inputs.hidden.stride(0), size, inputs.head, inputs.head.stride(0),
        bank.A, bank.B, bank.b, bank.cap, bank.silu.view(torch.int8), bank.top_k, rank, inputs.alternatives,
        state.state, state.chosen, state.pool.view(torch.float32), state.ranked, moves, rests, warm_rests,
        shifts, *tasks,
        record.token, record.steered_token, record.base_logprob, record.steered_logprob, record.steered_token_logprob,
        record.kl, record.applied_strength, record.top_ids, record.top_logprobs,
        HAS_EDITS=inputs.edits is not None, HAS_MASKS=inputs.mask is not None, SLOTS=state.chosen.shape[1],
        GROUPS=triton.next_power_of_2(stride), ROWS=ROWS, **shape, **LAUNCH,
    )  # fmt: skip
