"""RESULTS.md from what was measured: each table states its command, its versions and its hardware."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trimtab.steering.config import FitConfig
from trimtab.steering.machine import describe

ROOT = Path(__file__).resolve().parent.parent
POLICY = {"by_kind": {}, "fired": 0.5, "flips": 0.1, "length": 9.0, "open": 0.5, "pass_at_1": 0.6, "truncated": 0.0}
REPORT: dict[str, Any] = {
    "task": "sums",
    "split": "held-out",
    "problems": 200,
    "sampling": {"samples": 2, "seed": 7, "temperature": 0.6, "top_p": 0.95, "max_tokens": 64},
    "interval": "95 %",
    "hardware": "a box (cpu, float32, 1 threads)",
    "correction": "mine",
    "strengths": {"correction": 1.0},
    "tau": 0.5,
    "policies": [{"policy": "base", **POLICY}, {"policy": "correction", **POLICY}],
    "differences": [{"policy": "correction", "against": "base", "mean": 0.1, "low": 0.05, "high": 0.15}],
    "verdict": {"ship": True, "beats": {}, "summary": "+0.100 over the base"},
}
MACHINE = describe() | {"cpu": "Abacus 3000", "architecture": "wood64", "cores": 2, "gpu": None}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/results.py, writing to a folder of the test's."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"Before\n{module.BEGIN}\n{module.END}\nAfter\n")
    return module


def write(results: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["results.py", *arguments])
    results.main()
    text: str = (results.ROOT / "RESULTS.md").read_text()
    return text


@pytest.mark.parametrize(
    ("known", "title"),
    [(0, "on 200 further problems"), (50, "on 200 problems, 50 of them in the fit's own report")],
)
def test_an_eval_is_a_table_of_its_own(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: int, title: str
) -> None:
    run = {"command": "trimtab eval --correction mine --json", "when": "2020-01-01T00:00:00+00:00", **MACHINE}
    facts = {"benchmark": "eval", "model": "tiny", "problems_of_the_fits_report": known, "machine": run}
    (tmp_path / "eval.json").write_text(json.dumps(REPORT | facts) + "\n")
    text = write(results, monkeypatch, str(tmp_path / "eval.json"))
    assert f"## The correction mine {title}\n" in text
    for words in ("`trimtab eval --correction mine --json`", "hardware: Abacus 3000, wood64, 2 cores", "seed: 7"):
        assert f"- {words}\n" in text or f": {words}\n" in text
    assert "| correction - base | +0.100 | [+0.050, +0.150] |" in text


def test_a_fit_states_its_device_and_hardware(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    made = {"config": {"rank": 4, "seed": 7}, "device": "cuda", "dtype": "bfloat16", "threads": 2, "machine": MACHINE}
    fit = {"name": "mine", "base": {"model": "tiny"}, "tier": "head", "rank": 4, "top_k": FitConfig().top_k}
    fit |= {"strength": 1.0, "gate": {"tau": 0.5}, "provenance": made, "report": REPORT}
    (folder / "correction.json").write_text(json.dumps(fit))
    text = write(results, monkeypatch, "--correction", str(folder))
    assert "--rank 4 --seed 7`\n" in text
    assert "- device: cuda, bfloat16, 2 threads\n- hardware: Abacus 3000, wood64, 2 cores\n" in text
    assert f"torch {MACHINE['versions']['torch']}" in text
    assert "correction minus base" in (tmp_path / "README.md").read_text()
