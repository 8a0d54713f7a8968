"""Random step inputs for the tests of both implementations."""

from typing import Any

import torch

from trimtab.kernels.record import Corrections, Edits, RowParams, StepInputs

HIDDEN, RANK = 24, 4

OFF: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "uniform": 0.5,
    "repetition": 1.0,
    "presence": 0.0,
    "frequency": 0.0,
    "correction": -1,
    "strength": 1.0,
    "tau": 0.0,
    "shadow": False,
}
_DTYPES = RowParams(
    *([torch.float32, torch.int32] + [torch.float32] * 2 + [torch.float64] + [torch.float32] * 3),
    *([torch.int32] + [torch.float32] * 2 + [torch.bool]),
)


def make_params(rows: list[dict[str, Any]]) -> RowParams:
    """One row for each dict; what it leaves out is off."""
    filled = [{**OFF, **row} for row in rows]
    return RowParams(
        *(torch.tensor([row[f] for row in filled], dtype=d) for f, d in zip(RowParams._fields, _DTYPES, strict=True))
    )


def make_edits(rows: list[dict[int, tuple[int, float]]]) -> Edits | None:
    """token -> (count, bias) for each row."""
    if not any(rows):
        return None
    entries = [(token, count, bias) for row in rows for token, (count, bias) in row.items()]
    token, counts, bias = zip(*entries, strict=True)
    offsets = torch.tensor([0] + [len(row) for row in rows]).cumsum(0).int()
    integers = [torch.tensor(column, dtype=torch.int32) for column in (token, counts)]
    return Edits(offsets, *integers, torch.tensor(bias, dtype=torch.float32))


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
) -> StepInputs:
    """Random logits (quantised with `ties`), and one random correction for each entry of top_k."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), vocab, generator=g) * spread
    if ties:
        logits = (logits * 2).round() / 2
    n = len(top_k)
    corrections = Corrections(
        A=torch.randn(n, RANK, HIDDEN, generator=g) / HIDDEN**0.5,
        B=torch.randn(n, HIDDEN, RANK, generator=g),
        b=torch.randn(n, HIDDEN, generator=g) * 0.2,
        cap=torch.full((n,), 3.0),
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
    )
