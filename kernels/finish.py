"""The second kernel of a step: one program a row, from the groups' numbers to the record of the base.

Invariant: it never guesses. A row whose token needs more than the best few tokens and the groups' masses (edits, a
mask, or filters that keep many tokens) is left as a task for `resolve`, with everything that kernel must know; one that
a correction of the bank steers, for `tilt`. Numbers do not depend on how many tokens the rest of the batch asks for:
sums over tokens are float64, and tokens beyond those a row needs for itself are ignored.

Its parts: the gate (gate.py), the best tokens (selection.py), the draws (chance.py).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from typing import Any

import torch
import triton
import triton.language as tl

from trimtab.kernels import record as rules
from trimtab.kernels.chance import FEW, count_own, draw_best, draw_group, draw_within
from trimtab.kernels.delta import count_candidates
from trimtab.kernels.gate import look, merge, opens
from trimtab.kernels.keys import (
    COLUMNS,
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
from trimtab.kernels.selection import NOTHING, WORST, best_groups, best_token, best_tokens, from_rank, to_rank
from trimtab.kernels.stats import Groups
from trimtab.kernels.tasks import DEAD, FIRED, OPEN, PENDING, State, Tasks, new_tasks, slots_for

LAUNCH: dict[str, Any] = {
    "num_warps": 8,
    "maxnreg": 255,  # all that there are: for sm_80 the compiler would rather spill
    "enable_fp_fusion": False,  # bits must not hang on what is contracted
}
ROWS = 16  # groups that are read at once: Triton 3.6 spills with more
FIRST = tl.constexpr(16)  # tokens that are looked at first where a nucleus may close
SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # bits of a float32 that such a logit leaves 0


@triton.jit(do_not_specialize=["mix", "alternatives"], do_not_specialize_on_alignment=COLUMNS)
def finish_kernel(
    logits, logits_stride, vocab, group_peak, group_mass, group_moment, group_spread, group_tempered, stride,
    temperature, top_k, top_p, min_p, noise,
    steered, gate, tau, ceiling, chance, correction, mix, strength, shadow, forced, edit_spans, mask_row,
    correction_top_k, alternatives, state, chosen, pool, ranked, task, norms,
    token_out, status_out, base_token_out, steered_token_out, entropy_out, base_logprob_out, steered_logprob_out,
    base_token_logprob_out, steered_token_logprob_out, statistic_out, kl_out, applied_strength_out,
    top_ids_out, top_logprobs_out,
    HAS_EDITS: tl.constexpr, HAS_MASKS: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (rows). SLOTS holds the best tokens of a row, GROUPS all its groups."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    POOL: tl.constexpr = 2 * SLOTS
    slot = tl.arange(0, SLOTS)
    group = tl.arange(0, GROUPS)
    group_peak += row * stride
    group_mass += row * stride
    group_moment += row * stride
    group_tempered += row * stride
    exists = group < stride  # those past the vocabulary weigh nothing; a multiple of so many is read widely
    # Everything that every row reads, at once: a read costs more than most of what is done with it.
    peak = tl.load(group_peak + group, mask=exists, other=NEG_INF)
    mass1 = tl.load(group_mass + group, mask=exists, other=0.0)
    moment = tl.load(group_moment + group, mask=exists, other=0.0)
    steers = tl.load(steered + row) != 0
    kind = tl.load(gate + row)
    low_end = tl.load(tau + row)
    high_end = tl.load(ceiling + row)
    force = tl.load(strength + row)
    silent = tl.load(shadow + row) != 0
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
    if tl.load(forced + row) >= 0:  # as a greedy row without edits, whose token is another
        t = 0.0
        edited = False
    most = count_candidates(correction + row * mix, mix, correction_top_k, vocab)
    inverse = inverse_temperature(t)
    tempered = mass1
    if inverse != 1.0:
        tempered = tl.load(group_tempered + group, mask=exists, other=0.0)

    best = tl.max(peak, axis=0)
    if (best == INF) | (best == NEG_INF):
        tl.store(state + row * 4, 0)
        tl.store(task + row * 2, 0)
        tl.store(task + row * 2 + 1, 0)  # which steer.py reads of every row
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

    mass, log_mass, mean = merge(peak, mass1, moment, best)
    entropy = tl.maximum(log_mass - mean, 0.0)
    statistic = look(
        kind, entropy, chance + row, logits, vocab, peak, mass1, group_moment, group_spread + row * stride, group,
        best, mass, mean,
    )  # fmt: skip
    opened = steers & opens(kind, statistic, low_end, high_end)
    fired = opened & (force != 0.0)
    candidates = tl.where(fired, most, 0)
    acts = candidates > 0  # a correction of the bank does
    applied = acts & (silent == 0)
    filtered = (k > 0) | (p < 1.0) | (least > 0.0)
    ranks = filtered & (t > 0.0) & (edited == 0)  # may be drawn from the best tokens, here or in `tilt`
    limit = tl.where(k > 0, tl.minimum(k, vocab), vocab)
    mass_t = tl.sum((tempered * tl.exp((peak - best) * inverse)).to(tl.float64), axis=0)

    # The best tokens: `own` of them settle the row, the alternatives may ask for more.
    enough = tl.where(acts, candidates + 1, 1)
    own = count_own(candidates, ranks, limit, vocab, SLOTS)
    wanted = tl.minimum(alternatives + tl.where(applied, candidates, 0), vocab)
    end = tl.maximum(own, wanted)
    held = tl.full([], 1, tl.int32)
    found = tl.full([], 0, tl.int32)
    outside = tl.full([], NOTHING, tl.int32)
    chosen += row * SLOTS
    pool += row * POOL
    ranked += row * POOL
    only = tl.full([], LOWEST, tl.int64)
    selects = acts | (end > 1)
    if selects:
        top = to_rank(best)
        early = ranks & (k <= 0) & (applied == 0)  # a nucleus usually closes within the first few
        goal = tl.where(early, tl.minimum(end, tl.maximum(tl.maximum(enough, wanted), FIRST)), end)
        again = True
        while again:
            none = goal >> 16  # which the compiler cannot know: it would keep all addresses in registers from the start
            few = tl.minimum(goal, tl.cdiv(vocab, GROUP))
            low, found, other = best_groups(
                group_peak + none, vocab + none, top, few, chosen + none, SLOTS, GROUPS, SHIFT
            )
            low = tl.where(few < goal, WORST >> SHIFT, low)
            held, outside = best_tokens(
                logits + none, vocab + none, chosen + none, found, top, low, goal, pool + none, ranked + none,
                POOL, ROWS, SHIFT,
            )  # fmt: skip
            outside = tl.maximum(outside, other)
            again = goal < end
            if again:
                known = slot < held
                key = tl.load(ranked + slot, mask=known, other=LOWEST)
                e = tl.where(known, tl.exp(tl.where(known, (key_value(key) - best) * inverse, 0.0)), 0.0)
                reached = (p < 1.0) & (tl.sum(e.to(tl.float64), axis=0) >= mass_t * p)
                again = (reached == 0) & (tl.min(tl.where(known, e, INF), axis=0) >= least) & (held < own)
                own = tl.where(again, own, tl.minimum(held, tl.maximum(enough, FEW)))
                goal = end
                tl.debug_barrier()
    else:
        only = to_key(best, best_token(logits, vocab, group_peak, best, GROUPS))
    keys = tl.load(ranked + slot, mask=slot < tl.where(selects, held, 0), other=LOWEST)
    keys = tl.where(slot == 0, tl.maximum(keys, only), keys)
    tokens = key_token(keys)
    base_token = tl.max(tl.where(slot == 0, tokens, -1), axis=0)
    beyond = tl.where(own < held, key_value(tl.load(ranked + own, mask=own < held, other=LOWEST)), from_rank(outside))

    token = tl.full([], -1, tl.int32)
    if (edited == 0) & (applied == 0):
        if t <= 0.0:
            asked = tl.load(forced + row)
            token = tl.where(asked >= 0, asked, base_token)
        elif filtered:
            token = draw_best(
                keys, slot < own, best, inverse, own_noise, mass_t, beyond, limit, k > 0, p, least, slot, ranked
            )
        else:
            # Read again: neither would have fitted beside a tile of logits.
            peak = tl.load(group_peak + group, mask=exists, other=NEG_INF)
            mass1 = tl.load(group_mass + group, mask=exists, other=0.0)
            tempered = mass1
            if inverse != 1.0:
                tempered = tl.load(group_tempered + group, mask=exists, other=0.0)
            w = (tempered * tl.exp((peak - best) * inverse)).to(tl.float64)
            home = draw_group(w, group, own_noise)
            z = load_logits(logits, home * GROUP + tl.arange(0, GROUP), vocab)
            token = draw_within(tl.exp((z - best) * inverse).to(tl.float64), home, own_noise)
    tl.store(state + row * 4, candidates)
    tl.store(state + row * 4 + 1, found)
    tl.store(state + row * 4 + 2, held)
    tl.store(state + row * 4 + 3, outside)

    tl.store(task + row * 2, tl.where(token < 0, PENDING, 0))
    tl.store(task + row * 2 + 1, 0)
    tl.store(norms + row * 4, best)
    tl.store(norms + row * 4 + 1, log_mass)
    tl.store(norms + row * 4 + 2, best)
    tl.store(norms + row * 4 + 3, log_mass)
    base_logit = load_logits(logits, tl.maximum(token, 0), vocab)
    base_logprob = base_logit - best - log_mass
    tl.store(token_out + row, token)
    tl.store(status_out + row, tl.where(opened, OPEN, 0) + tl.where(fired, FIRED, 0))
    tl.store(base_token_out + row, base_token)
    tl.store(steered_token_out + row, base_token)
    tl.store(entropy_out + row, entropy)
    tl.store(base_logprob_out + row, base_logprob)
    tl.store(steered_logprob_out + row, base_logprob)
    tl.store(base_token_logprob_out + row, -log_mass)
    tl.store(steered_token_logprob_out + row, -log_mass)
    tl.store(statistic_out + row, statistic)
    tl.store(kl_out + row, 0.0)
    tl.store(applied_strength_out + row, tl.where(fired, force, 0.0))
    top = row * alternatives + slot
    tl.store(top_ids_out + top, tokens, mask=slot < alternatives)
    tl.store(top_logprobs_out + top, key_value(keys) - best - log_mass, mask=slot < alternatives)


def finish_rows(inputs: StepInputs, groups: Groups, record: StepRecord) -> tuple[Tasks, State]:
    """Fill the record of every row, as if no correction had fired; -> what is left to do."""
    rows, vocab = inputs.logits.shape
    params, bank = inputs.params, inputs.corrections
    assert inputs.alternatives <= rules.MAX_ALTERNATIVES
    slots = slots_for(bank.max_top_k if bank else 0)
    stride = groups.peak.stride(0)
    tasks, state = new_tasks(rows, slots, inputs.logits.device)
    finish_kernel[rows,](
        inputs.logits, inputs.logits.stride(0), vocab, *groups, stride,
        params.temperature, params.top_k, params.top_p, params.min_p, params.noise,
        params.steered.view(torch.int8), params.gate, params.tau, params.ceiling, params.chance,
        params.correction, params.correction.shape[1] if bank else 0, params.strength, params.shadow.view(torch.int8),
        params.forced, inputs.edits.spans if inputs.edits else params.top_k,
        inputs.mask.row if inputs.mask else params.top_k, bank.top_k if bank else params.top_k,
        inputs.alternatives, *state, tasks.task, tasks.norms, *record,
        HAS_EDITS=inputs.edits is not None, HAS_MASKS=inputs.mask is not None, SLOTS=slots,
        GROUPS=triton.next_power_of_2(stride), SHIFT=SHIFTS[inputs.logits.dtype], ROWS=ROWS, **LAUNCH,
    )  # fmt: skip
    return tasks, state
