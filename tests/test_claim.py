"""A folder of completions: of one run only, and scored by the verifier of today."""

from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_base
from trimtab.errors import InvalidRequest
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.tasks.problem import Problem, Split
from trimtab.steering.training.claim import claim, describe_run, score_again
from trimtab.steering.training.journal import Journal, Rollout
from trimtab.steering.training.rollouts import Sampling

PROBLEMS = [Problem(name, None, prompt=name) for name in ("short", "long")]


class Wants:
    """A verifier that its author changes his mind about."""

    name = "wants"

    def __init__(self, length: int) -> None:
        self._length = length

    def problems(self, split: Split, count: int) -> list[Problem]:
        raise NotImplementedError

    def score(self, problem: Problem, completion: str) -> float:
        return float(len(completion) == self._length)

    def extract(self, completion: str) -> None: ...


def written(problem: str, sample: int, text: str) -> Rollout:
    return Rollout(problem, sample, [1], text, float(len(text) == 1), "stop", 1, 1, 0, 0.5, {"steps": 1.0})


def test_a_folder_holds_completions_of_one_policy_only(tmp_path: Path) -> None:
    claim(tmp_path, {"strength": 1.0, "samples": 2})
    claim(tmp_path, {"samples": 2, "strength": 1.0})
    with pytest.raises(InvalidRequest, match=r"strength = 1\.0, and this run has 1\.5: .* another --out"):
        claim(tmp_path, {"strength": 1.5, "samples": 2})
    claim(tmp_path / "other", {"problems": "a3c5"})
    with pytest.raises(InvalidRequest, match="holds completions of other problems: give the task and the number"):
        claim(tmp_path / "other", {"problems": "b4d6"})


def test_a_run_is_of_its_prompts_as_the_model_reads_them_and_of_its_ends(tmp_path: Path) -> None:
    problems = [Problem("a", None, messages=({"role": "user", "content": "hi"},))]
    sampling = Sampling(1, 0, 1.0, 1.0, 4)

    def facts(base: Base) -> dict[str, Any]:
        core = Core(base, Bank(base.hidden, base.device), EngineConfig(slots=1, max_model_len=64))
        return describe_run(core, problems, sampling)

    base = tiny_base()
    older = {name: fact for name, fact in facts(base).items() if name != "eos"}
    claim(tmp_path / "older", older)
    with pytest.raises(InvalidRequest, match="of an earlier version of trimtab, which did not note their eos"):
        claim(tmp_path / "older", facts(base))
    claim(tmp_path, facts(base))
    claim(tmp_path, facts(base))
    base.tokenizer.chat_template = "Be brief. " + base.tokenizer.chat_template
    with pytest.raises(InvalidRequest, match="as another chat template wrote them"):
        claim(tmp_path, facts(base))
    other = tiny_base()
    other.eos = frozenset({7})
    with pytest.raises(InvalidRequest, match=r"eos = .*, and this run has \[7\]"):
        claim(tmp_path, facts(other))


def test_what_is_kept_is_scored_again_whether_its_file_is_whole_or_growing(tmp_path: Path) -> None:
    whole, growing = Journal(tmp_path / "00000.jsonl"), Journal(tmp_path / "00001.jsonl")
    whole.append([written("short", 0, "a"), written("short", 1, "aaa")])
    whole.finish(PROBLEMS)
    growing.append([written("long", 0, "aaa")])
    score_again(Wants(3), PROBLEMS, tmp_path)
    assert [[r.reward for r in journal.read()] for journal in (whole, growing)] == [[0.0, 1.0], [1.0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.jsonl", "00001.journal"]
    score_again(Wants(1), PROBLEMS, tmp_path)
    assert whole.read() == [written("short", 0, "a"), written("short", 1, "aaa")], "nothing else was changed"
