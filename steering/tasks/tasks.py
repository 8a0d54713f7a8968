"""Tasks: problems in three splits, and a score for a completion.

A task is the built-in `instructions`, or a JSONL file with a verifier. A file's line is an object with `id`, `answer`
and either `messages` (chat messages) or `prompt` (text that goes to the model as it stands).

Invariant: what is held out shares no id and no prompt with the rest. Without a held-out file, a line is held out by a
hash of its prompt, so that adding lines moves none across. Of a file, `validation` is `train` from its other end: who
takes some of both sees that they do not meet (begin.py).

    task = load_task("problems.jsonl", verifier="math");  task.problems("train", 128);  task.score(problem, text)
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from trimtab.errors import TaskError, TooFew
from trimtab.steering.tasks.instructions import Instructions
from trimtab.steering.tasks.problem import Extract, Problem, Split
from trimtab.steering.tasks.verifiers import Verifier, check_answer, load_extractor, load_verifier

HELD_OUT_SHARE = 0.3  # of a file's lines, when there is no held-out file


class Task(Protocol):
    """What the trainer needs of a task."""

    @property
    def name(self) -> str: ...

    def problems(self, split: Split, count: int) -> list[Problem]:
        """The first `count` problems of the split; the first n of m are always the same. Raises TaskError if short."""
        ...

    def score(self, problem: Problem, completion: str) -> float:
        """A reward from 0 to 1."""
        ...

    def extract(self, completion: str) -> Extract | None:
        """The answer it gives, right or wrong; None where it gives none, or answers of this task cannot be read."""
        ...


def load_task(name: str, verifier: str | None = None, held_out: str | None = None, seed: int = 0) -> Task:
    """`instructions` or a JSONL file's path. Raises TaskError."""
    if name == "instructions":
        if verifier or held_out:
            raise TaskError(
                "the task instructions brings its own verifier and held-out problems: leave both options out"
            )
        return Instructions(seed)
    if not Path(name).is_file():
        raise TaskError(f"task must be instructions or a JSONL file; there is no file {name!r}")
    if verifier is None:
        raise TaskError(f"the task {name} needs a verifier: math, final, exact, regex or module:function")
    return FileTask(Path(name), verifier, Path(held_out) if held_out else None)


class FileTask:
    """Problems from one JSONL file, or from two: the second is the held-out split."""

    def __init__(self, path: Path, verifier: str, held_out: Path | None = None) -> None:
        self.name = path.name if held_out is None else f"{path.name} + {held_out.name}"
        self._verify: Verifier = load_verifier(verifier)
        self._extract = load_extractor(verifier)
        lines = read_problems(path, verifier)
        if held_out is None:
            self._splits = _split_by_hash(lines)
        else:
            self._splits = {"train": lines, "held-out": read_problems(held_out, verifier)}
            _refuse_overlap(self._splits["train"], self._splits["held-out"])
        _refuse_doubles(self._splits["held-out"])
        self._splits["validation"] = self._splits["train"][::-1]

    def problems(self, split: Split, count: int) -> list[Problem]:
        """In the file's order; for validation, from its end."""
        found = self._splits[split]
        if count > len(found):
            raise TooFew(
                f"{self.name} has {len(found)} {split} problems; {count} are needed: ask for {len(found)} or fewer, "
                "or add lines",
                len(found),
            )
        return found[:count]

    def score(self, problem: Problem, completion: str) -> float:
        """By the task's verifier."""
        return self._verify(completion, problem.answer)

    def extract(self, completion: str) -> Extract | None:
        """By the verifier's extractor, if it has one."""
        return self._extract(completion) if self._extract else None


def read_problems(path: Path, verifier: str) -> list[Problem]:
    """All lines of a JSONL file. Raises TaskError naming the file, the line, the field and the fix."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read: {error}") from error
    problems: dict[str, Problem] = {}
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028, which JSON may hold
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        problem = _read_line(line, where, verifier)
        if problem.id in problems:
            raise TaskError(f"{where}: id {problem.id!r} was used before: make ids unique")
        problems[problem.id] = problem
    if not problems:
        raise TaskError(f"{path}: holds no problems")
    return list(problems.values())


def fingerprint(problems: Sequence[Problem]) -> str:
    """A digest of the problems a run uses, so that a resumed run notices an edited file."""
    content = json.dumps([[p.id, p.answer, text_of(p)] for p in problems], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def is_unicode(value: Any) -> bool:
    """Whether the texts in a JSON value are text: JSON can escape half a character, which no file takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_line(line: str, where: str, verifier: str) -> Problem:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise TaskError(f"{where}: must be a JSON object with id, answer and messages or prompt")
    unknown = sorted(set(fields) - {"id", "answer", "messages", "prompt", "kind"})
    _require(not unknown, where, ", ".join(unknown), "is not a known field: use id, answer, messages or prompt, kind")
    for name, value in fields.items():
        _require(is_unicode(value), where, name, "holds half a surrogate pair, such as \\ud83d alone: remove it")
    identity = fields.get("id")
    _require(isinstance(identity, str | int) and str(identity) != "", where, "id", "must be a string or an integer")
    _require("answer" in fields, where, "answer", "is missing")
    wrong = check_answer(verifier, fields["answer"])
    _require(wrong is None, where, "answer", str(wrong))
    _require(("messages" in fields) != ("prompt" in fields), where, "messages or prompt", "exactly one must be given")
    kind = fields.get("kind", "")
    _require(isinstance(kind, str), where, "kind", "must be a string")
    if "prompt" in fields:
        _require(isinstance(fields["prompt"], str) and fields["prompt"] != "", where, "prompt", "must be a text")
        return Problem(str(identity), fields["answer"], prompt=fields["prompt"], kind=kind, where=where)
    messages = fields["messages"]
    _require(isinstance(messages, list) and len(messages) > 0, where, "messages", "must be a list of chat messages")
    for i, message in enumerate(messages):
        fine = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        _require(fine, where, f"messages[{i}]", "must be an object with the texts role and content")
    return Problem(str(identity), fields["answer"], messages=tuple(messages), kind=kind, where=where)


def _require(holds: bool, where: str, field: str, words: str) -> None:
    if not holds:
        raise TaskError(f"{where}: {field} {words}")


def text_of(problem: Problem) -> str:
    """What it asks: equal for problems that are the same to a model."""
    return problem.prompt if problem.prompt is not None else json.dumps(problem.messages, sort_keys=True)


def digest_of(problem: Problem) -> str:
    """Of what it asks: 12 hex digits, by which a correction knows what it was fitted on."""
    return hashlib.sha256(text_of(problem).encode()).hexdigest()[:12]


def _split_by_hash(problems: list[Problem]) -> dict[str, list[Problem]]:
    splits: dict[str, list[Problem]] = {"train": [], "held-out": []}
    for problem in problems:
        share = int(digest_of(problem)[:8], 16) / 2**32
        splits["held-out" if share < HELD_OUT_SHARE else "train"].append(problem)
    return splits


def _refuse_doubles(held_out: list[Problem]) -> None:
    """Judged on one problem twice, an interval is narrower than what is known."""
    first: dict[str, Problem] = {}
    for problem in held_out:
        if first.setdefault(text_of(problem), problem) is not problem:
            other = first[text_of(problem)].id
            raise TaskError(f"{problem.label}, to judge on, has the prompt of {other!r}: remove one of them")


def _refuse_overlap(train: list[Problem], held_out: list[Problem]) -> None:
    """A held-out problem seen in training would make the report a lie."""
    for what, key in (("id", lambda p: p.id), ("prompt", text_of)):
        described: Callable[[Problem], Any] = key
        known = {described(p) for p in train}
        shared = [p.label for p in held_out if described(p) in known]
        if shared:
            raise TaskError(f"{shared[0]} has the {what} of a training problem: remove one of them")
