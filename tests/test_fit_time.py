"""benchmarks/fit_time.py: what it calls the positions of a fit."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_neither_held_out_nor_random_positions_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    learned = runpy.run_path(str(BENCHMARKS / "fit_time.py"), run_name="fit_time")["learned"]
    gated, held_out = torch.tensor([True, True, True, False]), torch.tensor([False, True, False, False])
    assert learned(SimpleNamespace(gated=gated, held_out=held_out)) == 2
