"""Rollouts: what was finished survives a kill, and a resumed run ends in the bytes of an undisturbed one."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fitting import Killed
from tiny import tiny_base, tiny_correction
from trimtab.errors import TaskError
from trimtab.server.engine.core import Core
from trimtab.server.engine.request import Steering
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import ContrastCorrection
from trimtab.steering.tasks.problem import Problem, Split
from trimtab.steering.training import rollouts as module
from trimtab.steering.training.journal import Journal, Rollout
from trimtab.steering.training.rollouts import Sampling, collect, open_core

PROBLEMS = [Problem(f"p{i}", None, prompt=f"Problem {i}: ") for i in range(7)]
SAMPLING = Sampling(samples=4, seed=3, temperature=1.0, top_p=0.95, max_tokens=9)


class Counting:
    """A task that notes what it is asked to score, and is killed when it has scored enough."""

    name = "counting"

    def __init__(self, survived: int = 10**6) -> None:
        self.scored: Counter[str] = Counter()
        self._survived = survived

    def problems(self, split: Split, count: int) -> list[Problem]:
        raise NotImplementedError

    def score(self, problem: Problem, completion: str) -> float:
        if self.scored.total() == self._survived:
            raise Killed
        self.scored[problem.id] += 1
        return float(len(completion) % 2)


def core_of(base: Base) -> Core:
    bank = Bank(base.hidden, base.device)
    bank.add(tiny_correction(base))
    return open_core(base, bank, PROBLEMS, SAMPLING.max_tokens, slots=3, threads=1)


def sample(base: Base, folder: Path, task: Counting) -> list[Rollout]:
    return collect(core_of(base), task, PROBLEMS, SAMPLING, folder, "test", Steering("c0"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module", autouse=True)
def _small_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FILE_ROUNDS", 8)
        yield


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def base(request: pytest.FixtureRequest) -> Base:
    return tiny_base(dtype=request.param)


@pytest.fixture(scope="module")
def undisturbed(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    found = sample(base, folder, Counting())
    assert [(r.problem, r.sample) for r in found] == [(p.id, i) for p in PROBLEMS for i in range(4)]
    assert len({tuple(r.tokens) for r in found}) > 20
    assert [p.name for p in sorted(folder.iterdir())] == ["00000.jsonl", "00001.jsonl"], "six problems fill a file"
    return folder


@pytest.mark.parametrize("survived", [0, 1, 9, 23, 24, 27])
def test_what_was_finished_is_kept_and_the_end_is_the_same(
    base: Base, undisturbed: Path, tmp_path: Path, survived: int
) -> None:
    first, second = Counting(survived), Counting()
    with pytest.raises(Killed):
        sample(base, tmp_path, first)
    sample(base, tmp_path, second)
    assert contents(tmp_path) == contents(undisturbed)
    scored = first.scored + second.scored
    assert scored.total() <= 28 + 2, "at most the step's own, of which the kill came before the flush, are scored again"


def test_only_what_is_missing_is_sampled_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    with pytest.raises(Killed):
        sample(base, tmp_path, Counting(13))
    kept = {(r.problem, r.sample) for r in Journal(tmp_path / "00000.jsonl").read()}
    assert 10 <= len(kept) <= 13
    sampled: set[tuple[str, int]] = set()
    run = module._run

    def watch(*arguments: object) -> object:
        for events in run(*arguments):  # type: ignore[arg-type]
            sampled.update((event.request_id, event.index) for event in events)
            yield events

    monkeypatch.setattr(module, "_run", watch)
    sample(base, tmp_path, Counting())
    assert len(sampled) == 28 - len(kept)
    assert not sampled & kept


def test_a_line_that_the_kill_cut_is_dropped_and_a_journal_left_over_goes(undisturbed: Path, tmp_path: Path) -> None:
    lines = (undisturbed / "00000.jsonl").read_bytes().splitlines(keepends=True)
    growing = tmp_path / "00000.journal"
    growing.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    journal = Journal(tmp_path / "00000.jsonl")
    assert [(r.problem, r.sample) for r in journal.read()] == [("p0", 0), ("p0", 1), ("p0", 2), ("p0", 3), ("p1", 0)]
    assert growing.read_bytes() == b"".join(lines[:5])
    journal.append([Rollout("p1", 1, [1], "a\u2028b\n", 0.5, "stop", 1, 1, 0)])
    assert journal.read()[-1].text == "a\u2028b\n"
    journal.path.write_bytes(b"".join(lines))
    assert len(journal.read()) == 24
    assert not growing.exists()


def test_a_file_that_two_runs_wrote_to_is_refused(base: Base, undisturbed: Path, tmp_path: Path) -> None:
    content = (undisturbed / "00000.jsonl").read_bytes()
    (tmp_path / "00000.journal").write_bytes(content + content)
    with pytest.raises(TaskError, match=r"00000\.jsonl does not hold each completion of its problems once"):
        sample(base, tmp_path, Counting())


def test_what_a_contrast_reads_beside_a_problem_takes_none_of_the_answers_room(base: Base) -> None:
    bank = Bank(base.hidden, base.device)
    bank.add(ContrastCorrection(name="plain", prompt="x" * 60))
    core = open_core(base, bank, PROBLEMS, 9, slots=2, threads=1)
    assert core.max_len == 60 + 9
    bank.add(ContrastCorrection(name="long", prompt="x" * base.max_len))
    with pytest.raises(TaskError, match=f"what long reads beside problem 'p6' has {base.max_len} tokens"):
        open_core(base, bank, PROBLEMS, 9, slots=2, threads=1)
