"""GSM8K's lines become a task that the trainer reads; examples are the same in both splits and no problems."""

import json
import runpy
from pathlib import Path

import pytest

from trimtab.steering.tasks.tasks import load_task

SCRIPT = str(Path(__file__).resolve().parent.parent / "benchmarks" / "gsm8k.py")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["gsm8k.py", *map(str, arguments)])
    runpy.run_path(SCRIPT, run_name="__main__")


def write(path: Path, name: str, count: int) -> Path:
    lines = [
        {"question": f"{name} {i}?", "answer": f"{i} + 1000 = <<{i}+1000={i + 1000}>>{i + 1000}\n#### 1,{i:03d}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    return path


def test_both_splits_show_the_same_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = write(tmp_path / "train.jsonl", "Train", 20), write(tmp_path / "test.jsonl", "Test", 6)
    run(monkeypatch, train, "--out", tmp_path / "a.jsonl", "--shots", 2)
    run(monkeypatch, test, "--shots-from", train, "--out", tmp_path / "b.jsonl", "--shots", 2, "--text", tmp_path / "b")
    assert (tmp_path / "b").read_text().startswith("Test 0?\n0 + 1000 = 1000\n#### 1000\n\nTest 1?\n")
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["problems"], facts["shots"], len(facts["task_sha256"])) == (6, 2, 64)
    task = load_task(str(tmp_path / "a.jsonl"), "final", str(tmp_path / "b.jsonl"))
    trained, held_out = task.problems("train", 18), task.problems("held-out", 6)
    shown = {json.dumps((p.messages or ())[:4]) for p in [*trained, *held_out]}
    assert len(shown) == 1, "every problem stands after the same two examples"
    (before,) = (json.loads(one) for one in shown)
    assert [m["role"] for m in before] == ["user", "assistant"] * 2
    assert "<<" not in before[1]["content"]
    assert before[1]["content"].splitlines()[-1].startswith("#### 10")
    asked = {(p.messages or ())[-1]["content"] for p in trained}
    assert not asked & {before[0]["content"], before[2]["content"]}
    assert task.score(held_out[0], f"so\n#### {held_out[0].answer}") == 1.0


@pytest.mark.parametrize("line", ['{"question": "Why?", "answer": "42"}', "[1]", "Why?"])
def test_a_line_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    (tmp_path / "x.jsonl").write_text("\n" + line)
    with pytest.raises(SystemExit, match=r"x\.jsonl, line 2: "):
        run(monkeypatch, tmp_path / "x.jsonl", "--out", tmp_path / "y.jsonl")


def test_math500_is_a_task_to_judge_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"id": f"m/{i}", "problem": f"{i} + 1?", "answer": str(i + 1), "level": 1 + i % 2} for i in range(6)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.syspath_prepend(str(Path(SCRIPT).parent))
    monkeypatch.setattr("sys.argv", ["math500.py", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "task.jsonl")])
    runpy.run_path(str(Path(SCRIPT).with_name("math500.py")), run_name="__main__")
    (tmp_path / "train.jsonl").write_text('{"id": "t", "prompt": "1 + 1?", "answer": "2"}\n')
    task = load_task(str(tmp_path / "train.jsonl"), "math", str(tmp_path / "task.jsonl"))
    assert task.name == "train.jsonl + task.jsonl"
    problems = task.problems("held-out", 6)
    assert {problem.kind for problem in problems} == {"level 1", "level 2"}
    assert all(task.score(problem, f"So \\boxed{{{problem.answer}}}.") == 1.0 for problem in problems)
