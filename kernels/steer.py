"""The corrected logits themselves, for an engine that draws by itself (server/vllm_plugin).

    steered = steer_for(device)(inputs)         # dispatch.py
    rewrite(logits, steered)                    # z becomes z' where a row fired and is no shadow

Invariant: gate, candidates and z' are those of the device's step, bit for bit, as the same code computes them. What
has changed a logit since (a mask, a bias, a penalty) stays changed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.record import StepInputs, StepRecord

_LOW_WORD = 0xFFFFFFFF  # as keys.py packs a token


class Candidates(NamedTuple):
    """What the corrections made of a step's rows."""

    found: Tensor  # int64 [rows]: how many were corrected, 0 where nothing fired
    ids: Tensor  # int64 [rows, k]; whatever past the count
    logits: Tensor  # float32 [rows, k]: z'


class Steered(NamedTuple):
    """k is the bank's largest top_k. A row's place past its candidates repeats its first; an unsteered row moves none.

    So what is written twice is the same twice.
    """

    record: StepRecord
    ids: Tensor  # int64 [rows, k]
    base: Tensor  # float32 [rows, k]: z
    logits: Tensor  # float32 [rows, k]: z' where it is to be drawn from, else z


@torch.inference_mode()
def steer(find: Callable[[StepInputs], tuple[StepRecord, Candidates]], inputs: StepInputs) -> Steered:
    """Gate and correct; `find` is the device's. The record's token is the draw of inputs.params: best be greedy."""
    record, candidates = find(inputs)
    count = torch.where(inputs.params.shadow, 0, candidates.found)[:, None]
    place = torch.arange(candidates.ids.shape[1], device=count.device)
    place = torch.where(place < count, place, 0)
    ids = torch.where(count > 0, candidates.ids.gather(1, place), 0)
    base = inputs.logits.gather(1, ids).float()
    return Steered(record, ids, base, torch.where(count > 0, candidates.logits.gather(1, place), base))


def rewrite(logits: Tensor, steered: Steered) -> None:
    """Write z' into float32 logits [rows, vocab], in place."""
    now = logits.gather(1, steered.ids)
    moved = torch.where(now == steered.base, steered.logits, now + (steered.logits - steered.base))
    logits.scatter_(1, steered.ids, moved)


def find_on_cpu(inputs: StepInputs) -> tuple[StepRecord, Candidates]:
    """Of the reference."""
    from trimtab.kernels.reference import run

    record, changed = run(inputs)
    shape = len(inputs.logits), _most(inputs)
    found = Candidates(
        torch.zeros(shape[0], dtype=torch.int64), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    )
    for row, change in changed.items():
        found.found[row], found.ids[row] = len(change.ids), change.ids
        found.logits[row] = change.steered
    return record, found


def find_on_gpu(inputs: StepInputs) -> tuple[StepRecord, Candidates]:
    """Of the kernels, without a word to the host."""
    from trimtab.kernels.step import run

    record, tasks = run(inputs)
    return record, read_keys(tasks.task[:, 1].long(), tasks.steered[:, : _most(inputs)])


def read_keys(count: Tensor, keys: Tensor) -> Candidates:
    """keys int64 [rows, k] as keys.py packs them, of which each row wrote its count."""
    keys = torch.where(torch.arange(keys.shape[1], device=keys.device) < count[:, None], keys, _LOW_WORD)
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return Candidates(count, _LOW_WORD - (keys & _LOW_WORD), bits.view(torch.float32))


def _most(inputs: StepInputs) -> int:
    assert inputs.corrections is not None, "without a correction there is nothing to steer"
    return min(inputs.corrections.max_top_k, inputs.logits.shape[1])
