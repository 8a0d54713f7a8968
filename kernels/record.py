"""What goes into one decode step and what comes out: the only data that crosses to and from the step kernel.

Invariant: everything here is a function of one row alone, so a row's record never depends on who shares its batch.
Semantics that both implementations (`reference.py`, `step.py`) share, row by row:

1.  entropy H of softmax(z), z the base logits at temperature 1, nats, before penalties, masks and filters
2.  open   = correction >= 0 and H > tau, and the row is alive (it has a finite logit and no NaN or +inf)
    fired  = open and strength != 0
3.  candidates = the base's `top_k` best tokens of that correction in (z descending, id ascending) order;
    steered logits z' = z + strength * delta on the candidates where fired, and z elsewhere
4.  the sampled distribution starts from z' where fired and not shadow, else from z: bit for bit
5.  edits, in this order, on tokens listed for the row: repetition penalty (seen in prompt or output: divide if
    positive, else multiply), minus frequency * count, minus presence * (count > 0), plus bias
6.  temperature 0: the best token in (value descending, id ascending) order. Otherwise divide by the temperature and
    keep the first n tokens of that order: n = top_k if set; then the shortest prefix whose mass, renormalised over the
    kept, reaches top_p; then those with probability >= min_p times the best token's
7.  draw with one uniform u in (0, 1) by inverse CDF: in that same order if n <= RANK_ORDER, else over the kept
    tokens in ascending id order (as an unfiltered row's always are where vocab > RANK_ORDER)
8.  log-probabilities are of z (base) and z' (steered), at temperature 1, before edits and filters
9.  a row whose edits forbid every token is DEAD too: it keeps its entropy and status, and reports no token
"""

from typing import NamedTuple

import torch
from torch import Tensor

RANK_ORDER = 64  # nuclei of up to this many tokens are drawn in rank order: it couples paired seeds best
MAX_ALTERNATIVES = 20

FIELDS = 9  # leading int32 columns of a packed record; see `pack`


class RowParams(NamedTuple):
    """What each row asks of the step. Every tensor is [rows]."""

    temperature: Tensor  # float32; 0 is greedy
    top_k: Tensor  # int32; 0 is off
    top_p: Tensor  # float32 in (0, 1]; 1 is off
    min_p: Tensor  # float32 in [0, 1]; 0 is off
    uniform: Tensor  # float64 in (0, 1): philox.uniform(seed, position)
    repetition: Tensor  # float32; 1 is off
    presence: Tensor  # float32; 0 is off
    frequency: Tensor  # float32; 0 is off
    correction: Tensor  # int32 index into the bank; -1 is none
    strength: Tensor  # float32; 0 is the base
    tau: Tensor  # float32 nats; the gate opens where H > tau
    shadow: Tensor  # bool: compute and report, apply nothing


class Edits(NamedTuple):
    """Sparse per-token changes of the logits, as CSR over rows. A token stands at most once in a row."""

    offsets: Tensor  # int32 [rows + 1]
    token: Tensor  # int32 [entries]
    counts: Tensor  # int32 [entries]: times in the output; 0 in the prompt only; -1 not seen (bias alone)
    bias: Tensor  # float32 [entries]; -inf forbids


class Corrections(NamedTuple):
    """Head-tier corrections of one base, stacked. Ranks are padded with zeros; scales are folded in (steering/bank.py).

    delta_c = cap * tanh( w_c . (B (A h) + b) / cap ), w_c the LM head's row of candidate c, all in float32.
    """

    A: Tensor  # float32 [corrections, rank, hidden]
    B: Tensor  # float32 [corrections, hidden, rank]
    b: Tensor  # float32 [corrections, hidden]
    cap: Tensor  # float32 [corrections]
    top_k: Tensor  # int32 [corrections]
    max_top_k: int  # the largest top_k: known on the host, so that launching needs no sync


class StepInputs(NamedTuple):
    """One decode step. The LM head's weight is shared by all corrections."""

    logits: Tensor  # [rows, vocab] bf16, fp16 or fp32: base logits, after the model's own soft-cap or scale
    hidden: Tensor  # [rows, hidden]: h, after the last norm
    head: Tensor  # [vocab, hidden]: the LM head's weight
    params: RowParams
    edits: Edits | None  # None when no row has any
    corrections: Corrections | None  # None when no row is steered
    alternatives: int  # most likely tokens to report, 0..MAX_ALTERNATIVES


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
    top_ids: Tensor  # [rows, alternatives] int32, of the sampled distribution's start (4), descending
    top_logprobs: Tensor  # [rows, alternatives]


OPEN, FIRED, DEAD = 1, 2, 4


def pack(record: StepRecord) -> Tensor:
    """-> int32 [rows, FIELDS + 2 * alternatives]: one tensor, so that one copy brings a step home."""
    integers = (record.token, record.status, record.base_token, record.steered_token)
    floats = (
        record.entropy,
        record.base_logprob,
        record.steered_logprob,
        record.base_token_logprob,
        record.steered_token_logprob,
    )
    columns = [t[:, None] for t in integers] + [t[:, None].view(torch.int32) for t in floats]
    return torch.cat([*columns, record.top_ids, record.top_logprobs.view(torch.int32)], dim=1)


def unpack(packed: Tensor) -> StepRecord:
    """The inverse of `pack`, as views on the packed tensor."""
    n = (packed.shape[1] - FIELDS) // 2
    integers = [packed[:, i] for i in range(4)]
    floats = [packed[:, i].contiguous().view(torch.float32) for i in range(4, FIELDS)]
    top = packed[:, FIELDS + n :].contiguous().view(torch.float32)
    return StepRecord._make([*integers, *floats, packed[:, FIELDS : FIELDS + n], top])
