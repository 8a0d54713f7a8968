"""What goes into one decode step and what comes out: the only data that crosses to and from the step kernel.

Invariant: everything here is a function of one row alone, so a row's record never depends on who shares its batch.
Semantics that both implementations (`reference.py`, `step.py`) share, row by row:

1.  entropy H of softmax(z), z the base logits at temperature 1, nats, before penalties, masks and filters
    statistic = what the row's gate looks at: H (GATE_ENTROPY, and GATE_ALWAYS, which needs none); the variance of
    -log p, nats squared (GATE_VARENTROPY); p2 - p1 of the two most likely tokens, p2 = 0 in a vocabulary of one
    (GATE_MARGIN); the row's `chance` (GATE_RANDOM)
2.  open   = steered, and tau < statistic <= ceiling or the gate is GATE_ALWAYS, and the row is alive (it has a finite
    logit and no NaN or +inf)
    fired  = open and strength != 0
3.  candidates of a correction = the base's `top_k` best tokens of that correction in (z descending, id ascending) order
    delta  = the sum over the row's corrections, in their order, of weight * their delta, each on its own candidates
    steered logits z' = z + a * delta on the candidates where fired, and z elsewhere. The applied strength a is
    strength * f, f the largest multiple of 2**-HALVINGS in [0, 1] with KL(softmax z || softmax z') <= kl_cap: 1 where
    the cap allows it, else found by halving the interval HALVINGS times, as the divergence grows with f
4.  the sampled distribution starts from z' where fired and not shadow, else from z: bit for bit
5.  edits, in this order, on tokens listed for the row: repetition penalty (seen in prompt or output: divide if
    positive, else multiply), minus frequency * count, minus presence * (count > 0), plus bias
5b. mask: in a row that has one, a token whose bit is not set is forbidden, as by a bias of -inf; all that follows
    (temperature, filters, draw) knows the legal tokens alone
6.  temperature 0: the best token in (value descending, id ascending) order. Otherwise divide by the temperature and
    keep the first n tokens of that order: n = top_k if set; then the shortest prefix whose mass, renormalised over the
    kept, reaches top_p; then those with probability >= min_p times the best token's
7.  draw by two exponential races (race.py): one of the groups of 128 tokens, each by the mass of what it keeps, then
    one of the tokens that the winner keeps. Where the row's `forced` is a token, that is the record's: 5 to 7 are not
    done, everything else is
8.  log-probabilities and the divergence are of z (base) and z' (steered), at temperature 1, before edits and filters
9.  a row whose edits or mask forbid every token, or whose edits make a legal one infinite, is DEAD too: it keeps what
    the gate saw and did, and reports no token

A row that is steered by no correction of the bank (all of its `correction` are -1) has z' = z: so it is with the tiers
whose correction acts inside the network, before the step (companion.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_ALTERNATIVES = 20
HALVINGS = 20  # of the strength's share, where kl_cap bounds it: to one in a million

GATE_ENTROPY, GATE_VARENTROPY, GATE_MARGIN, GATE_RANDOM, GATE_ALWAYS = range(5)
OPEN, FIRED, DEAD = 1, 2, 4  # bits of a status

FIELDS = 12  # of a record, before its alternatives: 4 integers a row, then floats


class RowParams(NamedTuple):
    """What each row asks of the step. Every tensor is [rows], but for `correction` and `weight`, [rows, mix]."""

    temperature: Tensor  # float32; 0 is greedy
    top_k: Tensor  # int32; 0 is off
    top_p: Tensor  # float32 in (0, 1]; 1 is off
    min_p: Tensor  # float32 in [0, 1]; 0 is off
    noise: Tensor  # int64: philox.noise(seed, position), the key of the row's races
    repetition: Tensor  # float32; 1 is off
    presence: Tensor  # float32; 0 is off
    frequency: Tensor  # float32; 0 is off
    steered: Tensor  # bool: a correction of any tier was chosen; the gate stays shut where it is False
    gate: Tensor  # int32: GATE_...
    tau: Tensor  # float32; the gate opens where tau < statistic <= ceiling
    ceiling: Tensor  # float32; inf is off
    chance: Tensor  # float32 in (0, 1), read for GATE_RANDOM only: philox.uniform(seed, position, stream=1)
    correction: Tensor  # int32 [rows, mix] indices into the bank, which act together; -1 pads
    weight: Tensor  # float32 [rows, mix]; 1 unless composed
    strength: Tensor  # float32; 0 is the base
    kl_cap: Tensor  # float32 nats >= 0; inf is off
    shadow: Tensor  # bool: compute and report, apply nothing
    forced: Tensor  # int32: the token is this one, not drawn; -1 draws


class Edits(NamedTuple):
    """Sparse per-token changes of the logits. A token stands at most once in a row."""

    spans: Tensor  # int32 [rows, 2]: where a row's entries begin and end; so rows are chosen without the host
    token: Tensor  # int32 [entries]
    counts: Tensor  # int32 [entries]: times in the output; 0 in the prompt only; -1 not seen (bias alone)
    bias: Tensor  # float32 [entries]; -inf forbids


class Masks(NamedTuple):
    """Which tokens are legal, in the rows that have a mask. The others cost nothing; rows are chosen as in Edits."""

    row: Tensor  # int32 [rows]: its line in `words`; -1 has none
    words: Tensor  # int32 [lines, ceil(vocab / 32)]: token i is legal where bit i % 32 of word i // 32 is set


class Corrections(NamedTuple):
    """Head-tier corrections of one base, stacked. Ranks are padded with zeros; scales are folded in (steering/bank.py).

    delta_c = cap * tanh( w_c . (B act(A h) + b) / cap ), w_c the LM head's row of candidate c, all in float32;
    act is SiLU or nothing. The rank may be 0: then b alone acts. A delta that is not a number adds nothing.
    """

    A: Tensor  # float32 [corrections, rank, hidden]
    B: Tensor  # float32 [corrections, hidden, rank]
    b: Tensor  # float32 [corrections, hidden]
    cap: Tensor  # float32 [corrections]
    silu: Tensor  # bool [corrections]: act
    top_k: Tensor  # int32 [corrections]
    max_top_k: int  # the largest top_k: known on the host, so that launching needs no sync


class StepInputs(NamedTuple):
    """One decode step. The LM head's weight is shared by all corrections."""

    logits: Tensor  # [rows, vocab] bf16, fp16 or fp32: base logits, after the model's own soft-cap or scale
    hidden: Tensor  # [rows, hidden]: h, after the last norm
    head: Tensor  # [vocab, hidden]: the LM head's weight
    params: RowParams
    edits: Edits | None  # None when no row has any
    corrections: Corrections | None  # None when no row has one of them
    alternatives: int  # most likely tokens to report, 0..MAX_ALTERNATIVES
    mask: Masks | None = None  # None when no row has one


class StepRecord(NamedTuple):
    """What one step reports, a row each. Integers are int32, the rest float32."""

    token: Tensor  # [rows]; -1 for a dead row
    status: Tensor  # [rows] bit field: OPEN, FIRED, DEAD
    base_token: Tensor  # [rows] argmax of z
    steered_token: Tensor  # [rows] argmax of z'
    entropy: Tensor  # [rows] nats
    base_logprob: Tensor  # [rows] log softmax(z)[token]
    steered_logprob: Tensor  # [rows] log softmax(z')[token]; equals base_logprob bit for bit where not fired
    base_token_logprob: Tensor  # [rows] log softmax(z)[base_token]
    steered_token_logprob: Tensor  # [rows] log softmax(z')[steered_token]
    statistic: Tensor  # [rows] of the gate's kind
    kl: Tensor  # [rows] KL(softmax z || softmax z'), nats: 0 where not fired; in shadow, of what apply would have done
    applied_strength: Tensor  # [rows] after kl_cap; 0 where not fired
    top_ids: Tensor  # [rows, alternatives] int32, of the sampled distribution's start (4), descending
    top_logprobs: Tensor  # [rows, alternatives]


def new_record(rows: int, alternatives: int, device: torch.device) -> StepRecord:
    """Unwritten, and of one piece, which `pack` need not copy."""
    size = rows * (FIELDS + 2 * alternatives)
    return unpack(torch.empty(size, dtype=torch.int32, device=device), rows)


def pack(record: StepRecord) -> Tensor:
    """-> int32 [rows * (FIELDS + 2 * alternatives)]: field by field in one tensor, so that one copy brings it home."""
    fields = [field for field in record if field.numel()]
    size = sum(field.numel() for field in fields)
    if _adjoin(fields) and record.token.untyped_storage().nbytes() == 4 * size:
        return record.token.as_strided((size,), (1,))
    return torch.cat([field.reshape(-1).view(torch.int32) for field in fields])


def unpack(packed: Tensor, rows: int) -> StepRecord:
    """The inverse of `pack`, as views on the packed tensor."""
    size = rows * FIELDS
    integers = packed[: 4 * rows].view(4, rows).unbind()
    floats = packed[4 * rows : size].view(torch.float32).view(FIELDS - 4, rows).unbind()
    top_ids, top_logprobs = packed[size:].view(2, rows, (len(packed) - size) // (2 * rows)).unbind()
    return StepRecord._make([*integers, *floats, top_ids, top_logprobs.view(torch.float32)])


def _adjoin(fields: list[Tensor]) -> bool:
    """Whether each begins where the one before it ends."""
    at = fields[0].data_ptr()
    for field in fields:
        if field.data_ptr() != at or not field.is_contiguous():
            return False
        at += field.nbytes
    return True
