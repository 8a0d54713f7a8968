"""benchmarks/stopped.py: a stopped fit is reported as what it had chosen."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from tiny import tiny_base, tiny_correction
from trimtab.steering.folder import digest, save

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_the_candidate_is_the_one_that_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    chosen = runpy.run_path(str(BENCHMARKS / "stopped.py"), run_name="stopped")["chosen"]
    one, other = (tiny_correction(tiny_base(), name, seed) for seed, name in enumerate(("one", "other")))
    candidates = [one, dataclasses.replace(one, name="one-stronger", strength=2.0), other]
    for candidate in candidates:
        save(candidate, tmp_path / "candidates" / candidate.name)
    (tmp_path / "candidates.json").write_text(json.dumps([candidate.name for candidate in candidates]))
    policy = tmp_path / "report" / "correction" / "policy.json"
    policy.parent.mkdir(parents=True)
    for candidate in candidates:
        policy.write_text(json.dumps({"correction": digest(candidate), "strength": candidate.strength}))
        assert chosen(tmp_path).name == candidate.name
