"""The loss of a LoRA that learns: from advantages, or from what a teacher would do.

    found = objective(tuned, lessons);  (found.likelihood + config.lora_kl * found.anchor).backward()

lora.py has the formula. Invariant: how many positions' logits exist at once changes neither the loss nor its gradient,
but for rounding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from trimtab.server.model.base import read_logits

BLOCK = 1024  # positions whose logits exist at once
LEAST_REST = 1e-7  # probability beyond the candidates: rounding may leave less than none


class Target(NamedTuple):
    """A teacher's log-probabilities of some tokens at a completion's open positions, on the CPU."""

    ids: Tensor  # int32 [open, CANDIDATES]
    log_p: Tensor  # float32 [open, CANDIDATES]


class Lesson(NamedTuple):
    """One completion to learn from."""

    prompt: tuple[int, ...]
    tokens: Sequence[int]
    open: list[bool]  # a token: the base's gate was open before it
    advantage: float
    target: Target | None = None  # what to imitate; None: the advantage says what to make likelier


class Objective(NamedTuple):
    """The two parts of the loss, summed over completions."""

    likelihood: Tensor  # or the divergence from the teacher
    anchor: Tensor


def objective(tuned: Any, batch: Sequence[Lesson]) -> Objective:
    """The loss's parts of a few completions: all taught by advantage, or all by a teacher."""
    spots = [(i, t) for i, lesson in enumerate(batch) for t in range(len(lesson.tokens))]
    opened = [(i, t) for i, t in spots if batch[i].open[t]]
    closed = [(i, t) for i, t in spots if not batch[i].open[t]]
    counts = [sum(lesson.open) for lesson in batch]

    def place(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=tuned.device)

    states = _states(tuned, batch, opened + closed)
    at_open, elsewhere = states[: len(opened)], states[len(opened) :]
    if batch[0].target is None:
        sampled = torch.tensor([batch[i].tokens[t] for i, t in opened], dtype=torch.long, device=tuned.device)
        weight = place([-batch[i].advantage / counts[i] for i, _ in opened])

        def first(rows: slice) -> Tensor:
            log_pi = _log_probabilities(tuned, at_open[rows])
            return weight[rows] @ log_pi.gather(1, sampled[rows, None])[:, 0]
    else:
        target = _join([one.target for one in batch], tuned.device)
        weight = place([1 / counts[i] for i, _ in opened])

        def first(rows: slice) -> Tensor:
            log_pi = _log_probabilities(tuned, at_open[rows])
            return weight[rows] @ _divergence(log_pi, Target(target.ids[rows], target.log_p[rows]))

    with torch.no_grad(), tuned.disable_adapter():
        of_base = _states(tuned, batch, closed)
    share = place([1 / (len(batch[i].open) - counts[i]) for i, _ in closed])

    def anchor(rows: slice) -> Tensor:
        with torch.no_grad(), tuned.disable_adapter():
            log_p = _log_probabilities(tuned, of_base[rows])
        return share[rows] @ (log_p.exp() * (log_p - _log_probabilities(tuned, elsewhere[rows]))).sum(1)

    return Objective(_in_blocks(first, len(opened)), _in_blocks(anchor, len(closed)))


def _in_blocks(part: Callable[[slice], Tensor], count: int) -> Tensor:
    """The sum of `part` over `count` positions. Several blocks are computed again in the backward pass.

    So the logits of two at most exist at a time: of a thousand positions and 150,000 tokens, 0.6 GB several times."""
    blocks = [slice(start, start + BLOCK) for start in range(0, max(count, 1), BLOCK)]
    if len(blocks) == 1:
        return part(blocks[0])
    again = functools.partial(recompute, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([again(part, block) for block in blocks]).sum()


def _join(targets: Sequence[Target | None], device: torch.device) -> Target:
    given = [target for target in targets if target is not None]
    assert len(given) == len(targets), "a batch has one kind of lesson"
    return Target(*(torch.cat(column).to(device) for column in zip(*given, strict=True)))


def _divergence(log_pi: Tensor, target: Target) -> Tensor:
    """KL(teacher || pi) [rows], tokens without a target counted as one; log_pi [rows, vocab]."""
    mine = log_pi.gather(1, target.ids.long())
    pi, p = mine.exp(), target.log_p.exp()
    rest, rest_of_teacher = ((1 - q.sum(1)).clamp(min=LEAST_REST) for q in (pi, p))
    return (p * (target.log_p - mine)).sum(1) + rest_of_teacher * (rest_of_teacher / rest).log()


def _log_probabilities(tuned: Any, states: Tensor) -> Tensor:
    """log pi of every token, [rows, vocab] in float32, from the last hidden states [rows, hidden]."""
    log_pi: Tensor = read_logits(tuned.get_base_model(), states).float().log_softmax(-1)
    return log_pi


def _states(tuned: Any, batch: Sequence[Lesson], spots: Sequence[tuple[int, int]]) -> Tensor:
    """The last hidden state before token t of completion i, [spots, hidden]."""
    sequences = [[*lesson.prompt, *lesson.tokens[:-1]] for lesson in batch]
    length = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (length - len(s)) for s in sequences], device=tuned.device)
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences], device=tuned.device)
    decoder = tuned.get_base_model().get_decoder()
    states: Tensor = decoder(ids, attention_mask=mask, use_cache=False).last_hidden_state
    at = torch.tensor([i * length + len(batch[i].prompt) - 1 + t for i, t in spots], dtype=torch.long)
    return states.flatten(0, 1)[at.to(tuned.device)]
