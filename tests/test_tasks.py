"""Task files: errors name the file, the line and the field; splits are disjoint and stable."""

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import TaskError
from trimtab.steering.tasks.tasks import fingerprint, load_task, read_problems


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def lines(count: int, prefix: str = "p") -> list[Any]:
    return [{"id": f"{prefix}{i}", "prompt": f"{prefix}: {i} + 1 =", "answer": i + 1} for i in range(count)]


def test_a_file_is_split_by_hash_and_adding_lines_moves_none(tmp_path: Path) -> None:
    few = load_task(write(tmp_path / "few.jsonl", lines(100)), "exact")
    many = load_task(write(tmp_path / "many.jsonl", lines(200)), "exact")
    train, held_out = few.problems("train", 60), few.problems("held-out", 20)
    assert not {p.id for p in train} & {p.id for p in held_out}
    assert [p.id for p in many.problems("train", 60)] == [p.id for p in train]
    assert [p.id for p in many.problems("held-out", 20)] == [p.id for p in held_out]
    with pytest.raises(TaskError, match=r"few\.jsonl has \d+ held-out problems; 99 are needed"):
        few.problems("held-out", 99)


def test_the_same_prompt_never_stands_in_both_splits(tmp_path: Path) -> None:
    twice = [{**line, "id": line["id"] + suffix} for line in lines(60) for suffix in "ab"]
    with pytest.raises(TaskError, match=r"problem 'p\d+b', to judge on, has the prompt of 'p\d+a': remove one of them"):
        load_task(write(tmp_path / "t.jsonl", twice), "exact")
    held_out = {p.id for p in load_task(write(tmp_path / "u.jsonl", lines(60)), "exact").problems("held-out", 10)}
    some = [line for line in twice if line["id"].strip("ab") not in held_out or line["id"].endswith("a")]
    task = load_task(write(tmp_path / "v.jsonl", some), "exact")
    train = {p.prompt for p in task.problems("train", 70)}
    assert not train & {p.prompt for p in task.problems("held-out", 10)}


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_at_a_newline_only(tmp_path: Path, mark: str) -> None:
    path, prompts = tmp_path / "t.jsonl", [f"one{mark}two", "three"]
    written = [{"id": i, "prompt": prompt, "answer": "1"} for i, prompt in enumerate(prompts)]
    content = "\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in written)  # as some editors do
    path.write_bytes(content.encode())
    assert [problem.prompt for problem in read_problems(path, "exact")] == prompts


def test_a_held_out_file_is_the_other_split(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.jsonl", lines(3)), write(tmp_path / "b.jsonl", lines(4, "q"))
    task = load_task(train, "exact", held_out)
    assert [p.id for p in task.problems("train", 3)] == ["p0", "p1", "p2"]
    assert [p.id for p in task.problems("held-out", 4)] == ["q0", "q1", "q2", "q3"]
    assert task.score(task.problems("held-out", 1)[0], " 1\n") == 1.0
    assert [p.id for p in task.problems("validation", 2)] == ["p2", "p1"]
    assert fingerprint(task.problems("train", 2)) != fingerprint(task.problems("train", 3))
    overlap = write(tmp_path / "c.jsonl", [{**lines(1)[0], "id": "other"}])
    with pytest.raises(TaskError, match=r"c\.jsonl, line 1: problem 'other' has the prompt of a training problem"):
        load_task(train, "exact", overlap)


GOOD = {"id": "x", "messages": [{"role": "user", "content": "Hi"}], "answer": "3"}


@pytest.mark.parametrize(
    ("line", "verifier", "words"),
    [
        ("{", "exact", "is not JSON"),
        ("[]", "exact", "must be a JSON object"),
        ({**GOOD, "colour": 1}, "exact", "colour is not a known field"),
        ({**GOOD, "id": None}, "exact", "id must be"),
        ({**GOOD, "id": "good"}, "exact", "id 'good' was used before"),
        ({"id": "x", "prompt": "a"}, "exact", "answer is missing"),
        ({**GOOD, "prompt": "a"}, "exact", "messages or prompt exactly one"),
        ({"id": "x", "answer": 1}, "exact", "messages or prompt exactly one"),
        ({"id": "x", "answer": 1, "prompt": ""}, "exact", "prompt must be"),
        ({**GOOD, "messages": []}, "exact", "messages must be"),
        ({**GOOD, "messages": [{"role": "user"}]}, "exact", r"messages\[0\] must be"),
        ({**GOOD, "kind": 3}, "exact", "kind must be"),
        ({"id": "x", "prompt": "a \ud800 b", "answer": "3"}, "exact", "prompt holds half a surrogate pair"),
        ({**GOOD, "answer": ["\udc00"]}, "exact", "answer holds half a surrogate pair"),
        ({**GOOD, "answer": "("}, "regex", "answer is not a regular expression"),
        ({**GOOD, "answer": 3}, "regex", "answer must be a string"),
        ({**GOOD, "answer": None}, "math", "answer must be a string or a finite number"),
        ({**GOOD, "answer": ""}, "math", "answer is not a number or formula"),
        ({**GOOD, "answer": True}, "exact", "answer must be a string or a finite number"),
        ({**GOOD, "answer": float("inf")}, "math", "answer must be a string or a finite number"),
        ({**GOOD, "answer": "18 dollars"}, "math", "answer has a word"),
        ({**GOOD, "answer": "["}, "math", "answer is not a number or formula"),
        ({**GOOD, "answer": "\\sqrt"}, "math", "answer is not a number or formula"),
        ({**GOOD, "answer": "$1/2"}, "math", "answer is not a number or formula"),
        ({**GOOD, "answer": "9" * 5000}, "final", "answer must be a number"),
        ({**GOOD, "answer": "1/0"}, "final", "answer must be a number"),
        ({**GOOD, "answer": ""}, "regex", "answer must not be empty"),
        ("[" * 100_000, "exact", "is not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, verifier: str, words: str) -> None:
    good = {"id": "good", "prompt": "a", "answer": "1"}
    path = write(tmp_path / "t.jsonl", [good, "", line])
    with pytest.raises(TaskError, match=rf"t\.jsonl, line 3: {words}"):
        load_task(path, verifier)


@pytest.mark.parametrize(
    "answer",
    [
        "A",
        "x+1",
        "(3,4]",
        "p - q",
        "\\text{Evelyn}",
        "\\frac 59",
        "2 1/2",
        "204_5",
        "12:30",
        "-2,1",
        "90^\\circ",
        "-$5",
    ],
)
def test_what_a_boxed_completion_can_say_is_an_answer_for_math(tmp_path: Path, answer: str) -> None:
    task = load_task(
        write(tmp_path / "t.jsonl", [GOOD]), "math", write(tmp_path / "h.jsonl", [{**lines(1)[0], "answer": answer}])
    )
    assert task.score(task.problems("held-out", 1)[0], f"\\boxed{{{answer}}}") == 1.0


def test_what_is_no_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no file 'gsm'"):
        load_task("gsm")
    with pytest.raises(TaskError, match="needs a verifier"):
        load_task(write(tmp_path / "t.jsonl", lines(2)))
    with pytest.raises(TaskError, match="holds no problems"):
        load_task(write(tmp_path / "empty.jsonl", []), "exact")
    with pytest.raises(TaskError, match="its own verifier"):
        load_task("instructions", "exact")
