"""Plain text: how likely it is to the base, and to the base under a correction that was made for something else.

The text is read in windows, each token predicted from those before it in its window; what the gate opens and what the
correction changes is computed by the served step itself, whose token is forced to be the text's own next.

Invariant: where the gate is shut, both likelihoods are one float. Figures are nats a token: lower is likelier.

    measured = read_text(base, correction, text, lora)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import InvalidRequest, TaskError
from trimtab.kernels import philox
from trimtab.kernels.companion import Companions, step_with
from trimtab.kernels.dispatch import step_for
from trimtab.kernels.record import FIRED, Corrections, RowParams, StepInputs
from trimtab.server.engine.rule import GATES
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import Correction, HeadCorrection, LoraCorrection
from trimtab.steering.evaluate import bootstrap
from trimtab.steering.gate import Gate
from trimtab.steering.progress import Progress

WINDOW = 512  # tokens
ROWS = 128  # positions a step


class _Read(NamedTuple):
    """A window's predicted positions."""

    base: Tensor  # float32 [n] nats
    corrected: Tensor  # float32 [n] nats
    fired: Tensor  # bool [n]


def read_text(
    base: Base,
    correction: Correction,
    text: str,
    lora: Base | None = None,
    strength: float | None = None,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """lora: the base with a LoraCorrection's adapter on, always. -> JSON values. Raises InvalidRequest for a contrast,
    which needs a prompt to be guided away from; TaskError for a text of less than two windows."""
    if not isinstance(correction, HeadCorrection | LoraCorrection):
        raise InvalidRequest(f"{correction.name} is a {correction.tier}: plain text has no prompt to contrast", "text")
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    length = min(WINDOW, base.max_len)
    windows = [ids[i : i + length] for i in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    if len(windows) < 2:
        raise TaskError(f"the text has {len(ids)} tokens: give {length + 2} or more, for an interval over windows")
    strength = correction.strength if strength is None else strength
    bank = Bank(base.hidden, base.device)
    bank.add(correction)
    heads = bank.tensors()  # none of a LoRA
    found = []
    with Progress("text", len(windows), "windows") as progress:
        for number, window in enumerate(windows):
            found.append(_read(base, heads, window, number, lora, strength, gate or correction.gate))
            progress.add(1)
    return _sum_up(found, correction.name)


@torch.inference_mode()
def _read(
    base: Base,
    heads: Corrections | None,
    window: Sequence[int],
    number: int,
    lora: Base | None,
    strength: float,
    gate: Gate,
) -> _Read:
    """heads: the correction's tensors, if it is one."""
    step = step_for(base.device)
    states = base.states([window])[0][:-1]
    beside = lora.states([window])[0][:-1] if lora is not None else None
    following = torch.tensor(window[1:], dtype=torch.int32, device=base.device)
    parts = []
    for at in torch.split(torch.arange(len(states), device=base.device), ROWS):
        inputs = StepInputs(
            logits=base.logits(states[at]),
            hidden=states[at],
            head=base.head_weight,
            params=_params(following[at], at, number, heads is not None, strength, gate),
            edits=None,
            corrections=heads,
            alternatives=0,
        )
        companions = None
        if lora is not None and beside is not None:
            mix = torch.full((len(at),), strength, device=base.device)
            rows = torch.arange(len(at), device=base.device)
            companions = Companions(rows, lora.logits(beside[at]), mix, capped=False)
        record = step_with(step, inputs, companions)
        parts.append((-record.base_logprob, -record.steered_logprob, (record.status & FIRED) > 0))
    return _Read(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _params(following: Tensor, at: Tensor, number: int, head: bool, strength: float, gate: Gate) -> RowParams:
    """Rows under the gate, whose tokens are known; number: the window's, which seeds a random gate."""
    n, device = len(at), at.device

    def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((n,), value, dtype=dtype, device=device)

    chance = torch.from_numpy(philox.uniform([number] * n, at.tolist(), stream=1)).float().to(device)
    return RowParams(
        temperature=column(0.0),
        top_k=column(0, torch.int32),
        top_p=column(1.0),
        min_p=column(0.0),
        uniform=column(0.5, torch.float64),
        repetition=column(1.0),
        presence=column(0.0),
        frequency=column(0.0),
        steered=column(1, torch.bool),
        gate=column(GATES[gate.kind], torch.int32),
        tau=column(gate.tau),
        ceiling=column(gate.ceiling),
        chance=chance,
        correction=column(0 if head else -1, torch.int32)[:, None],
        weight=column(1.0)[:, None],
        strength=column(strength),
        kl_cap=column(math.inf),
        shadow=column(0, torch.bool),
        forced=following,
    )


def _sum_up(found: Sequence[_Read], name: str) -> dict[str, Any]:
    tokens = sum(len(r.base) for r in found)
    fired = sum(int(r.fired.sum()) for r in found)
    change = np.array([float((r.corrected - r.base).sum(dtype=torch.float64)) for r in found])
    low, high = bootstrap(change, np.array([float(len(r.base)) for r in found]))  # the last window may be short
    both = {"base": [r.base for r in found], "corrected": [r.corrected for r in found]}
    masks = torch.cat([r.fired for r in found])
    means = {which: torch.cat(parts) for which, parts in both.items()}
    return {
        "correction": name,
        "tokens": tokens,
        "windows": len(found),
        "fired": fired / tokens,
        **{which: float(nats.mean()) for which, nats in means.items()},
        **{f"{which}_at_fired": float(nats[masks].mean()) if fired else None for which, nats in means.items()},
        "change": {"mean": float(change.sum()) / tokens, "low": low, "high": high},
    }


def to_markdown(measured: Mapping[str, Any]) -> str:
    """A sentence and its figures."""
    d = measured["change"]
    lines = [
        f"Plain text, {measured['tokens']} tokens in {measured['windows']} windows: the base {measured['base']:.4f} "
        f"nats a token, under {measured['correction']} {measured['corrected']:.4f}: {d['mean']:+.4f} "
        f"[{d['low']:+.4f}, {d['high']:+.4f}], 95 % over windows. It fired at {measured['fired']:.1%} of them",
    ]
    if measured["base_at_fired"] is not None:
        lines.append(f"(there {measured['base_at_fired']:.4f}, and {measured['corrected_at_fired']:.4f}).")
    return " ".join(lines) + "\n"
