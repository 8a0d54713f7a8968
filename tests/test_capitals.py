"""The capitals become a task that eval reads, and whose patterns know an answer."""

import runpy
from pathlib import Path

import pytest

from trimtab.steering.tasks.tasks import load_task

SCRIPT = str(Path(__file__).resolve().parent.parent / "benchmarks" / "capitals.py")


def test_questions_go_both_ways_and_accents_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "capitals.jsonl"
    monkeypatch.setattr("sys.argv", ["capitals.py", "--out", str(out)])
    runpy.run_path(SCRIPT, run_name="__main__")
    task = load_task(str(out), "regex")
    assert len(task.problems("held-out", 72)) == 72
    problems = {problem.id: problem for problem in task.problems("train", 154) + task.problems("held-out", 72)}
    for name, answer, right in (
        ("Cameroon capital", "Yaounde.", True),
        ("Cameroon capital", "It is Yaoundé", True),
        ("Cameroon country", "CAMEROON", True),
        ("Niger country", "Nigeria", False),
        ("Brazil capital", "Rio", False),
    ):
        assert task.score(problems[name], answer) == right, (name, answer)
