"""The fit: AdamW on cached features under a trust region, one pass with a snapshot at each KL budget.

Invariant: each snapshot's KL(base || corrected), measured on held-out problems at the positions where it would act, is
below its budget (but see `overshoot`). Equal features, config and seed give equal tensors.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from trimtab.errors import Diverged, TaskError
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.features import Features
from trimtab.steering.training.head import Head
from trimtab.steering.training.objective import Change, change_by, loss
from trimtab.steering.training.progress import Progress, say
from trimtab.steering.training.strength import Divergence

CHECK_EVERY = 8  # steps between measurements of held-out KL, or a 32nd of those done; the first steps are all measured
MEASURE_ROWS = 1024  # positions at a time: their candidates' rows are [positions, top_k, hidden]


class Snapshot(NamedTuple):
    """A head and the trust region it stayed in."""

    head: Head
    budget: float
    kl: float  # held-out
    steps: int  # of AdamW
    reached: bool  # False: the epochs ran out before the budget did


def fit(
    features: Features,
    rows: Tensor,
    budgets: Sequence[float],
    config: FitConfig,
    learned: Tensor | None = None,
    stage: str = "fit",
    overshoot: bool = False,
) -> list[Snapshot]:
    """features: at gated and random positions; rows: the LM head's weight [vocab, hidden], on the features' device;
    learned: which positions to learn from (default: the gated ones; held-out problems never are).
    overshoot: where the first step already leaves every budget, keep it, for one who will set its strength.
    Raises TaskError when there is nothing to learn from; Diverged when no snapshot is within the budgets, too."""
    training = features.at((features.gated if learned is None else learned) & ~features.held_out)
    measured = features.at(features.acts & features.held_out)
    if not len(training.h) or not len(measured.h):
        raise TaskError(
            f"no position to learn from ({len(training.h)} fitted, {len(measured.h)} held out): the model is seldom "
            f"above tau {config.tau:g}; lower --tau"
        )
    head = start(training, rows, config)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(config.seed)
    waiting = sorted(budgets)
    last = Snapshot(copy.deepcopy(head), waiting[0], 0.0, 0, True)
    taken: list[Snapshot] = []
    due = 0  # the step at which it is measured next
    steps_an_epoch = -(-len(training.h) // config.batch)
    with Progress(stage, steps_an_epoch * config.epochs, "steps") as progress:
        for step, batch in enumerate(_batches(training, config, order), start=1):
            change = _change(head, batch, rows, config)
            objective = loss(change, batch.advantage, config.ratio_clip, config.kl_weight)
            optimizer.zero_grad()
            objective.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.add(1, f"held-out KL {last.kl:.3f}")
            if step > CHECK_EVERY and step < due and step != steps_an_epoch * config.epochs:
                continue
            due = step + max(CHECK_EVERY, step // 32)
            kl = measure(head, measured, rows, config)
            if not math.isfinite(kl):
                raise Diverged(f"the loss is no number by step {step}: lower --learning-rate")
            while waiting and kl >= waiting[0]:
                taken.append(last._replace(budget=waiting.pop(0)))
            if not waiting:
                if overshoot and step == 1:
                    taken.append(Snapshot(head, max(budgets), kl, step, True))
                break
            last = Snapshot(copy.deepcopy(head), waiting[0], kl, step, True)
    if waiting:  # the largest budgets were never reached: they would all be this one
        taken.append(last._replace(budget=waiting[0], reached=False))
    taken = [s for s in taken if s.steps]
    if not taken:
        raise Diverged("the first step leaves every KL budget: lower --learning-rate or raise --kl-budgets")
    for s in taken:
        end = "" if s.reached else "; the epochs ended first"
        say(stage, f"budget {s.budget:g}: held-out KL {s.kl:.3f} after {s.steps} steps{end}")
    return taken


def measure(head: Head, measured: Features, rows: Tensor, config: FitConfig, strength: float = 1.0) -> float:
    """Mean KL(base || corrected) over the positions."""
    parts = torch.split(torch.arange(len(measured.h), device=measured.h.device), MEASURE_ROWS)
    with torch.no_grad():
        kl = [_change(head, measured.at(at), rows, config, strength).kl for at in parts]
    return float(torch.cat(kl).mean())


def divergence_of(head: Head, features: Features, rows: Tensor, config: FitConfig) -> Divergence:
    """`measure` at the held-out positions where the head acts, of a strength."""
    measured = features.at(features.acts & features.held_out)
    return lambda strength: measure(head, measured, rows, config, strength)


def start(training: Features, rows: Tensor, config: FitConfig) -> Head:
    """A head that does nothing yet, with the scales of this data."""
    hidden_scale = float(training.h.float().pow(2).mean().sqrt())
    used, counts = torch.unique(training.ids[:, : config.top_k], return_counts=True)
    norms = rows[used.long()].float().pow(2).sum(1)  # squared, of each candidate's row
    row_scale = float(((norms * counts).sum() / counts.sum()).sqrt())
    shape = (rows.shape[1], config.rank, config.cap, hidden_scale, row_scale, config.seed, config.activation)
    return Head(*shape).to(rows.device)


def _change(head: Head, batch: Features, rows: Tensor, config: FitConfig, strength: float = 1.0) -> Change:
    delta = head(batch.h, embedding(batch.ids[:, : config.top_k].long(), rows))  # indexing would take twice as long
    return change_by(batch, strength * delta, config.temperature)


def _batches(training: Features, config: FitConfig, order: torch.Generator) -> Iterator[Features]:
    for _ in range(config.epochs):
        for at in torch.split(torch.randperm(len(training.h), generator=order), config.batch):
            yield training.at(at.to(training.h.device))
