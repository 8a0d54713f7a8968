"""Plain text: how likely it is to the base, and to the base under a correction that was made for something else.

The text is read in windows, each token predicted from those before it in its window. A window is a prompt whose tokens
the engine scores, so what the gate opens and what the correction changes there is what a served request would be told.

Invariant: where the gate is shut, both likelihoods are one float. Figures are nats a token: lower is likelier.

    measured = read_text(base, correction, text)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.errors import EngineFailure, InvalidRequest, TaskError
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.event import Receipt
from trimtab.server.engine.request import Budget, Request, SamplingParams
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import Correction, HeadCorrection, LoraCorrection
from trimtab.steering.evaluation.evaluate import Policy, bootstrap
from trimtab.steering.gate import Gate
from trimtab.steering.training.progress import Progress

WINDOW = 512  # tokens
SLOTS = 2  # a window's, and its companion's


class _Read(NamedTuple):
    """A window's predicted positions."""

    base: npt.NDArray[np.float64]  # [n] nats
    corrected: npt.NDArray[np.float64]  # [n] nats
    fired: npt.NDArray[np.bool_]  # [n]


def cut(base: Base, correction: Correction, text: str) -> list[list[int]]:
    """Windows of token ids, at least two. Raises as read_text does, before anything is computed."""
    if not isinstance(correction, HeadCorrection | LoraCorrection):
        raise InvalidRequest(f"{correction.name} is a {correction.tier}: plain text has no prompt to contrast", "text")
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    length = min(WINDOW, base.max_len)
    windows = [ids[i : i + length] for i in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    if len(windows) < 2:
        raise TaskError(f"the text has {len(ids)} tokens: give {length + 2} or more, for an interval over windows")
    return windows


def read_text(
    base: Base,
    correction: Correction,
    text: str,
    strength: float | None = None,
    gate: Gate | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """strength, gate: in place of the correction's own. -> JSON values. Raises InvalidRequest for a contrast, which
    needs a prompt to be guided away from; TaskError for a text of less than two windows; EngineFailure."""
    windows = cut(base, correction, text)
    bank = Bank(base.hidden, base.device)
    bank.add(correction)
    core = Core(base, bank, EngineConfig(slots=SLOTS, max_model_len=len(windows[0]), graphs=False, threads=threads))
    policy = Policy("text", correction.name, strength=strength).under(gate or correction.gate)
    steering = replace(policy.steering, budget=Budget(spans=()))  # the text's own markers shut no gate
    found = []
    with Progress("text", len(windows), "windows") as progress:
        for number, window in enumerate(windows):  # which also seeds a random gate
            sampling = SamplingParams(max_tokens=0, seed=number)
            found.append(_read(core, Request(str(number), tuple(window), sampling, steering, score_from=1)))
            progress.add(1)
    return _sum_up(found, correction.name)


def _read(core: Core, asked: Request) -> _Read:
    receipts: list[Receipt] = []
    for event in core.run([asked]):
        if event.error is not None:
            raise EngineFailure(f"window {asked.id} of the text cannot be read: {event.error}")
        if event.scored and event.receipt is not None:
            receipts.append(event.receipt)
    return _Read(
        np.array([-receipt.base_logprob for receipt in receipts]),
        np.array([-receipt.steered_logprob for receipt in receipts]),
        np.array([receipt.fired for receipt in receipts]),
    )


def _sum_up(found: Sequence[_Read], name: str) -> dict[str, Any]:
    fired = np.concatenate([read.fired for read in found])
    means = {which: np.concatenate([getattr(read, which) for read in found]) for which in ("base", "corrected")}
    change = np.array([float((read.corrected - read.base).sum()) for read in found])
    low, high = bootstrap(change, np.array([float(len(read.base)) for read in found]))  # the last window may be short
    return {
        "correction": name,
        "tokens": len(fired),
        "windows": len(found),
        "fired": float(fired.mean()),
        **{which: float(nats.mean()) for which, nats in means.items()},
        **{f"{which}_at_fired": float(nats[fired].mean()) if fired.any() else None for which, nats in means.items()},
        "change": {"mean": float(change.sum()) / len(fired), "low": low, "high": high},
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
