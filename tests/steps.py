"""Random step inputs for the tests of both implementations."""

import math
import random
from typing import Any

import torch

from trimtab.kernels.record import GATE_ENTROPY, Corrections, Edits, Masks, RowParams, StepInputs

HIDDEN, RANK = 24, 4

OFF: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "noise": 0,
    "repetition": 1.0,
    "presence": 0.0,
    "frequency": 0.0,
    "steered": None,  # whether it has a correction
    "gate": GATE_ENTROPY,
    "tau": 0.0,
    "ceiling": math.inf,
    "chance": 0.5,
    "correction": -1,  # or a mapping of those that act together to their weights
    "strength": 1.0,
    "kl_cap": math.inf,
    "shadow": False,
    "forced": -1,
}
_DTYPES = {
    **dict.fromkeys(("top_k", "gate", "correction", "forced"), torch.int32),
    **dict.fromkeys(("steered", "shadow"), torch.bool),
    "noise": torch.int64,
}


def make_params(rows: list[dict[str, Any]]) -> RowParams:
    """One row for each dict; what it leaves out is off."""
    filled = [{**OFF, **row} for row in rows]
    width = max(1, *(len(_mix(row)) for row in filled))
    for row in filled:
        mix = [*_mix(row).items(), *[(-1, 1.0)] * width][:width]
        if row["steered"] is None:
            row["steered"] = bool(_mix(row))
        row["correction"], row["weight"] = ([*column] for column in zip(*mix, strict=True))
    return RowParams(
        *(torch.tensor([row[f] for row in filled], dtype=_DTYPES.get(f, torch.float32)) for f in RowParams._fields)
    )


def _mix(row: dict[str, Any]) -> dict[int, float]:
    """Its corrections -> their weights."""
    chosen = row["correction"]
    if isinstance(chosen, dict):
        return chosen
    return {chosen: 1.0} if chosen >= 0 else {}


def noise_for(item: int) -> int:
    """The key of the race that this item wins over any of up to 2^50 times its mass: its output is 2^64 - 1."""
    z = 2**64 - 1
    z ^= z >> 31 ^ z >> 62
    z = z * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    z ^= z >> 27 ^ z >> 54
    z = z * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    z ^= z >> 30 ^ z >> 60
    key = (z - (item + 1) * 0x9E3779B97F4A7C15) % 2**64
    return key - 2**64 * (key >= 2**63)


def make_edits(rows: list[dict[int, tuple[int, float]]]) -> Edits | None:
    """token -> (count, bias) for each row."""
    if not any(rows):
        return None
    entries = [(token, count, bias) for row in rows for token, (count, bias) in row.items()]
    token, counts, bias = zip(*entries, strict=True)
    ends = torch.tensor([len(row) for row in rows]).cumsum(0)
    spans = torch.stack([ends - ends.diff(prepend=ends.new_zeros(1)), ends], 1).int()
    integers = [torch.tensor(column, dtype=torch.int32) for column in (token, counts)]
    return Edits(spans, *integers, torch.tensor(bias, dtype=torch.float32))


def make_mask(rows: list[set[int] | None], vocab: int) -> Masks | None:
    """The legal tokens of each row; None has no mask."""
    masked = [row for row in rows if row is not None]
    if not masked:
        return None
    lines = iter(range(len(masked)))
    bits = torch.zeros(len(masked), -(-vocab // 32) * 32, dtype=torch.int64)
    for line, legal in enumerate(masked):
        bits[line, list(legal)] = 1
    words = (bits.view(len(masked), -1, 32) << torch.arange(32)).sum(2)
    row = torch.tensor([-1 if legal is None else next(lines) for legal in rows], dtype=torch.int32)
    return Masks(row, words.to(torch.int32))  # the highest bit is its sign


def random_mask(seed: int, vocab: int) -> set[int] | None:
    """From none over a few legal tokens to nearly all; sometimes nothing is legal."""
    r = random.Random(seed)
    share = r.choice([None, None, 0.0, 0.02, 0.3, 0.97])
    if share is None:
        return None
    legal = {token for token in range(vocab) if r.random() < share}
    return legal | ({r.randrange(vocab)} if share else set())


def make_inputs(
    rows: list[dict[str, Any]],
    vocab: int,
    seed: int = 0,
    spread: float = 2.0,
    ties: bool = False,
    dtype: torch.dtype = torch.float32,
    edits: list[dict[int, tuple[int, float]]] | None = None,
    top_k: tuple[int, ...] = (5, 20),
    alternatives: int = 0,
    masks: list[set[int] | None] | None = None,
) -> StepInputs:
    """Random logits (quantised with `ties`), and a random correction for each of top_k.

    Every second has SiLU, every third the rank 0.
    """
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), vocab, generator=g) * spread
    if ties:
        logits = (logits * 2).round() / 2
    n = len(top_k)
    ranked = (torch.arange(n) % 3 != 2)[:, None, None]
    corrections = Corrections(
        A=ranked * torch.randn(n, RANK, HIDDEN, generator=g) / HIDDEN**0.5,
        B=torch.randn(n, HIDDEN, RANK, generator=g),
        b=torch.randn(n, HIDDEN, generator=g) * 0.2,
        cap=torch.full((n,), 3.0),
        silu=torch.arange(n) % 2 == 1,
        top_k=torch.tensor([min(k, vocab) for k in top_k], dtype=torch.int32),
        max_top_k=min(max(top_k), vocab),
    )
    return StepInputs(
        logits=logits.to(dtype),
        hidden=torch.randn(len(rows), HIDDEN, generator=g).to(dtype),
        head=(torch.randn(vocab, HIDDEN, generator=g) / HIDDEN**0.5).to(dtype),
        params=make_params(rows),
        edits=make_edits(edits or [{} for _ in rows]),
        corrections=corrections,
        alternatives=alternatives,
        mask=make_mask(masks or [], vocab),
    )
