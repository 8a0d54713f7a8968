"""From the sequences that sample in this step to the tensors that the step kernel reads.

Invariant: of its rows' parameters only what a step changes travels to the device, in one copy; the keys of its draws go
with those of some steps to come (slate.py), and edits and masks where there are any.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.kernels import philox
from trimtab.kernels.record import Corrections, Edits, Masks, RowParams, StepInputs
from trimtab.server.engine.sequence import Sequence
from trimtab.server.engine.slate import Slate, Slots
from trimtab.server.model.staging import stage


class Sampling(NamedTuple):
    """The choices that sample in this step, a row each; or those whose prompts are scored, a row for each token."""

    sequences: list[Sequence]
    slots: Slots  # of their own rows
    lengths: Slots  # their own rows' tokens; for a scored one, as if those before it had been sampled
    forced: npt.NDArray[np.int32] | None = None  # the tokens that are scored
    allowed: npt.NDArray[np.bool_] | None = None  # where a correction may act on them


def build_inputs(
    sampling: Sampling, slate: Slate, logits: Tensor, hidden: Tensor, head: Tensor, corrections: Corrections | None
) -> StepInputs:
    """logits [rows, vocab], hidden [rows, hidden]; tensors land on logits' device."""
    standing = slate.gather(sampling.slots, logits.device)
    positions = standing.positions(sampling.lengths)
    steered = standing.steered
    changed: dict[str, npt.NDArray[Any]] = {}
    mask = None
    if sampling.forced is not None:
        changed["forced"] = sampling.forced
        if sampling.allowed is not None:
            changed["steered"] = steered = steered & sampling.allowed
    elif bounded := slate.bounded[sampling.slots].nonzero()[0].tolist():
        mask = _mask(sampling, slate, logits)  # first: a row with one legal token is not steered
        shut = [row for row in bounded if not sampling.sequences[row].steered]
        if steered[shut].any():
            changed["steered"] = steered = steered.copy()
            steered[shut] = False
    if standing.random:
        changed["chance"] = philox.uniform(standing.seeds, positions, stream=1).astype(np.float32)
    params = standing.params | dict(zip(changed, stage(list(changed.values()), logits.device), strict=True))
    acting = bool((steered & standing.headed).any())
    return StepInputs(
        logits=logits,
        hidden=hidden,
        head=head,
        params=RowParams(noise=standing.noise(positions), **params),
        edits=_edits(sampling, slate, logits.device) if sampling.forced is None else None,
        corrections=corrections if acting else None,
        alternatives=_alternatives(sampling, slate),
        mask=mask,
    )


def _alternatives(sampling: Sampling, slate: Slate) -> int:
    if sampling.forced is None:
        return int(slate.alternatives[sampling.slots].max())
    return max(sequence.request.score_alternatives for sequence in sampling.sequences)


def _mask(sampling: Sampling, slate: Slate, logits: Tensor) -> Masks | None:
    constrained = slate.constrained[sampling.slots].nonzero()[0].tolist()
    held = [(row, found) for row in constrained if (found := sampling.sequences[row].constraint) and found.holds]
    if not held:
        return None
    lines = np.full(len(sampling.slots), -1, dtype=np.int32)
    words = np.empty((len(held), -(-logits.shape[1] // 32)), dtype=np.int32)
    for line, (row, constraint) in enumerate(held):
        lines[row] = line
        constraint.fill(words[line], sampling.sequences[row].barred)
    return Masks(*stage([lines, words], logits.device))


def _edits(sampling: Sampling, slate: Slate, device: torch.device) -> Edits | None:
    edited = slate.edited[sampling.slots].nonzero()[0]
    listed = [sampling.sequences[row].edits for row in edited]
    counts = np.zeros(len(sampling.slots), dtype=np.int32)
    counts[edited] = [len(one.token) for one in listed]
    if not counts.any():
        return None
    ends = counts.cumsum(dtype=np.int32)
    columns = [np.stack([ends - counts, ends], axis=1), *map(np.concatenate, zip(*listed, strict=True))]
    return Edits(*stage(columns, device))
