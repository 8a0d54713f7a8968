"""The last kernel of a step: rows that `finish` could not settle, edited, masked, or whose filters keep many tokens.

Invariant: exact, up to the rounding of a mass, for any filter and any vocabulary, without a sort; a row that has its
token returns at once, so the launch needs no word from the host. The row's logits, corrected, edited and masked, are
written out once, and cut as cut.py does.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from typing import Any

import torch
import triton
import triton.language as tl

from trimtab.kernels.chance import FIRST_GROUP, draw_bits, draw_within, first_of, speeds
from trimtab.kernels.cut import HIGHEST, NO_LOGIT, count_and_weigh, cut, cut_listed, list_likely, row_keys, tempered
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
)
from trimtab.kernels.record import StepInputs, StepRecord
from trimtab.kernels.tasks import APPLIED, DEAD, Tasks

BLOCK = 8192  # tokens a pass reads at once: its loads in flight hide their latency
RACE = tl.constexpr(2048)  # ... but for a draw, whose float64 would not fit the registers
LISTED = 4096  # tokens of which a nucleus is cut without passes over the row
LAUNCH: dict[str, Any] = {"num_warps": 16, "enable_fp_fusion": False}


@triton.jit
def weights(z, start, vocab, floor, best, inverse, BLOCK: tl.constexpr):
    key = row_keys(z, start, vocab, BLOCK)
    return tl.where(key >= floor, tempered(key, best, inverse), 0.0).to(tl.float64)


@triton.jit
def draw(z, vocab, floor, best, inverse, noise):
    """The races of the tokens at or above `floor`: of their groups, then of the winner's."""
    fastest, winner = tl.full([], 0.0, tl.float64), 0
    for start in range(0, vocab, RACE):
        w = weights(z, start, vocab, floor, best, inverse, RACE)
        group = start // GROUP + tl.arange(0, RACE // GROUP)
        bits = draw_bits(noise, group.to(tl.int64) + FIRST_GROUP)
        speed = speeds(tl.sum(tl.reshape(w, [RACE // GROUP, GROUP]), axis=1), bits)
        here = tl.max(speed, axis=0)
        winner = tl.where(here > fastest, first_of(speed, group), winner)
        fastest = tl.maximum(fastest, here)
    return draw_within(weights(z, winner * GROUP, vocab, floor, best, inverse, GROUP), winner, noise)


@triton.jit(do_not_specialize=["alternatives", "words"], do_not_specialize_on_alignment=COLUMNS)
def resolve_kernel(
    logits, logits_stride, vocab, temperature, top_k, top_p, min_p, noise, repetition, presence, frequency,
    edit_spans, edit_token, edit_count, edit_bias, mask_row, mask_words, words,
    task, steered_keys, norms, scratch, likely, alternatives,
    token_out, status_out, base_token_out, steered_token_out, entropy_out, base_logprob_out, steered_logprob_out,
    base_token_logprob_out, steered_token_logprob_out, statistic_out, kl_out, applied_strength_out,
    top_ids_out, top_logprobs_out,
    HAS_EDITS: tl.constexpr, HAS_MASKS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    bits = tl.load(task + row * 2)
    if bits == 0:
        return
    logits += row * logits_stride
    z = scratch + row * vocab
    likely += row * LISTED

    # z or z', then the edits and the mask, written where any thread may read them.
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(z + token, load_logits(logits, token, vocab), mask=token < vocab)
    tl.debug_barrier()
    slot = tl.arange(0, SLOTS)
    member = slot < tl.load(task + row * 2 + 1)
    steered = tl.load(steered_keys + row * SLOTS + slot, mask=member, other=LOWEST)
    if (bits & APPLIED) != 0:
        tl.store(z + key_token(steered), key_value(steered), mask=member)
    tl.debug_barrier()
    if HAS_EDITS:
        repeat = tl.load(repetition + row)
        often = tl.load(frequency + row)
        present = tl.load(presence + row)
        stop = tl.load(edit_spans + row * 2 + 1)
        for start in range(tl.load(edit_spans + row * 2), stop, 128):
            entry = start + tl.arange(0, 128)
            listed = entry < stop
            token = tl.load(edit_token + entry, mask=listed, other=0)
            listed = listed & (token < vocab)
            count = tl.load(edit_count + entry, mask=listed, other=0)
            value = tl.load(z + token, mask=listed, other=0.0)
            value = tl.where(count < 0, value, tl.where(value > 0.0, tl.div_rn(value, repeat), value * repeat))
            value -= often * tl.maximum(count, 0).to(tl.float32)
            value -= tl.where(count > 0, present, 0.0)
            value += tl.load(edit_bias + entry, mask=listed, other=0.0)
            tl.store(z + token, value + 0.0, mask=listed)
        tl.debug_barrier()
    if HAS_MASKS:
        line = tl.load(mask_row + row)
        if line >= 0:
            legal = mask_words + line.to(tl.int64) * words
            for start in range(0, vocab, BLOCK):
                token = start + tl.arange(0, BLOCK)
                inside = token < vocab
                word = tl.load(legal + token // 32, mask=inside, other=0)
                tl.store(z + token, NEG_INF, mask=inside & (((word >> (token % 32)) & 1) == 0))
            tl.debug_barrier()

    highest = tl.full([BLOCK], LOWEST, tl.int64)
    for start in range(0, vocab, BLOCK):
        highest = tl.maximum(highest, row_keys(z, start, vocab, BLOCK))
    first = tl.max(highest, axis=0)
    best = key_value(first)
    if (tl.abs(best) < INF) == 0:  # the edits or the mask forbade every token, or the edits made one infinite
        tl.store(status_out + row, tl.load(status_out + row) | DEAD)
        tl.store(base_token_out + row, -1)
        tl.store(steered_token_out + row, -1)
        tl.store(base_logprob_out + row, 0.0)
        tl.store(steered_logprob_out + row, 0.0)
        tl.store(base_token_logprob_out + row, 0.0)
        tl.store(steered_token_logprob_out + row, 0.0)
        tl.store(top_ids_out + row * alternatives + slot, -1, mask=slot < alternatives)
        tl.store(top_logprobs_out + row * alternatives + slot, NEG_INF, mask=slot < alternatives)
        return

    t = tl.load(temperature + row)
    token = key_token(first)
    if t > 0.0:
        inverse = inverse_temperature(t)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        least = tl.load(min_p + row)
        own_noise = tl.load(noise + row)
        floor = tl.full([], NO_LOGIT, tl.int64)
        kept, mass = count_and_weigh(z, vocab, floor, best, inverse, BLOCK)
        if (k > 0) & (k < kept):
            floor = cut(z, vocab, floor, kept, k, 0.0, best, inverse, BLOCK)
            kept, mass = count_and_weigh(z, vocab, floor, best, inverse, BLOCK)
        if p < 1.0:
            share = (0.5 * (1.0 - p) * mass / kept).to(tl.float32)  # all that are less likely: half of the rest at most
            found = list_likely(z, vocab, floor, share, best, inverse, likely, LISTED)
            if found <= LISTED:
                item = tl.arange(0, LISTED)
                keys = tl.load(likely + item, mask=item < found, other=LOWEST)
                floor = cut_listed(keys, found, mass * p, best, inverse)
            else:
                floor = cut(z, vocab, floor, kept, 1, mass * p, best, inverse, BLOCK)
        if least > 0.0:
            lowest = tl.full([BLOCK], HIGHEST, tl.int64)
            for start in range(0, vocab, BLOCK):
                key = row_keys(z, start, vocab, BLOCK)
                lowest = tl.minimum(lowest, tl.where(tempered(key, best, inverse) >= least, key, HIGHEST))
            floor = tl.maximum(floor, tl.min(lowest, axis=0))
        token = draw(z, vocab, floor, best, inverse, own_noise)

    base_logit = load_logits(logits, token, vocab)
    hit = (key_token(steered) == token) & member
    steered_logit = tl.max(tl.where(hit, key_value(steered), NEG_INF), axis=0)
    steered_logit = tl.where(tl.sum(hit.to(tl.int32), axis=0) > 0, steered_logit, base_logit)
    tl.store(token_out + row, token)
    best_of, log_mass = tl.load(norms + row * 4), tl.load(norms + row * 4 + 1)
    tl.store(base_logprob_out + row, base_logit - best_of - log_mass)
    best_of, log_mass = tl.load(norms + row * 4 + 2), tl.load(norms + row * 4 + 3)
    tl.store(steered_logprob_out + row, steered_logit - best_of - log_mass)


def resolve_rows(inputs: StepInputs, tasks: Tasks, record: StepRecord) -> None:
    """Give every row that `finish_rows` left its token."""
    rows, vocab = inputs.logits.shape
    params, edits, mask = inputs.params, inputs.edits, inputs.mask
    scratch = torch.empty(rows, vocab, dtype=torch.float32, device=inputs.logits.device)
    likely = torch.empty(rows, LISTED, dtype=torch.int64, device=inputs.logits.device)
    resolve_kernel[rows,](
        inputs.logits, inputs.logits.stride(0), vocab,
        params.temperature, params.top_k, params.top_p, params.min_p, params.noise,
        params.repetition, params.presence, params.frequency,
        *(edits or (params.top_k, params.top_k, params.top_k, params.tau)),
        *(mask or (params.top_k, params.top_k)), mask.words.shape[1] if mask else 0,
        *tasks, scratch, likely, inputs.alternatives, *record,
        HAS_EDITS=edits is not None, HAS_MASKS=mask is not None, SLOTS=tasks.steered.shape[1], BLOCK=BLOCK,
        LISTED=LISTED, **LAUNCH,
    )  # fmt: skip
