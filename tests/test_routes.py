"""The routes with a teacher, from rollouts to a correction's folder; a killed run ends in the same one."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tiny import tiny_base
from trimtab.errors import InvalidRequest, TaskError
from trimtab.server.model.base import Base
from trimtab.steering import atomic, pipeline
from trimtab.steering.config import FitConfig
from trimtab.steering.correction import Correction, check
from trimtab.steering.evaluate import Difference
from trimtab.steering.folder import load
from trimtab.steering.problem import Problem, Split
from trimtab.steering.report import judge
from trimtab.steering.teacher import adapt


@dataclasses.dataclass(frozen=True)
class Vowels:
    """Rewards about half of what a random model over bytes writes."""

    name: str = "vowels"

    def problems(self, split: Split, count: int) -> list[Problem]:
        return [Problem(f"{split}-{i}", None, prompt=f"{split} {i}: ", kind="ab"[i % 2]) for i in range(count)]

    def score(self, problem: Problem, completion: str) -> float:
        return float(sum(map(ord, completion)) % 2)

    def extract(self, completion: str) -> None: ...


CONFIG = FitConfig(
    name="tiny",
    via="lora",
    problems=20,
    samples=4,
    max_tokens=6,
    temperature=1.0,
    rank=4,
    top_k=40,
    batch=32,
    epochs=5,
    learning_rate=0.01,
    lora_targets=("down_proj",),
    lora_rate=0.02,
    lora_kl_limit=0.0,
    lora_batch=4,
    teacher_samples=2,
    strengths=(1.0, 2.0),
    validation_problems=3,
    validation_samples=2,
    test_problems=9,
    slots=8,
)


@pytest.fixture(scope="module")
def base() -> Base:
    torch.set_num_threads(1)
    return tiny_base()


@pytest.fixture(scope="module")
def finished(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        replace = os.replace
        patch.setattr(atomic.os, "replace", lambda *names: (WRITTEN.append(names[1]), replace(*names)))
        pipeline.run(CONFIG, out, base, Vowels())
    return out


WRITTEN: list[str] = []  # files of the undisturbed run, in order


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".tmp" and p.name != "timings.json"  # left by a kill; told by no two runs alike
    }


def test_via_lora_ships_the_head_the_controls_and_the_adapter(base: Base, finished: Path) -> None:
    correction = load(finished)
    check(correction, base.identity)
    fit = correction.provenance["fit"]
    assert fit["teacher_kl"] < 0.75 * fit["teacher_base_kl"], "on held-out problems the head is nearer to its teacher"
    assert correction.strength == fit["strength"]
    assert fit["validation"].keys() == {"base", "x1", "x2"}
    assert "LoRA" in correction.provenance["method"]
    assert correction.report is not None
    names = [policy["policy"] for policy in correction.report["policies"]]
    assert names[4:] == ["shuffled-rewards", "random-positions", "teacher"]
    pairs = {(d["policy"], d["against"]) for d in correction.report["differences"]}
    assert {("correction", "teacher"), ("teacher", "base"), ("correction", "shuffled-rewards")} <= pairs
    for kind in ("shuffled-rewards", "random-positions"):
        control = load(finished / "controls" / kind)
        assert control.provenance["kl"] == pytest.approx(fit["kl"], rel=0.05)
    tuned, h = adapt(base, finished / "lora"), base.states([[5, 6, 7]])[0]
    assert not torch.allclose(tuned.states([[5, 6, 7]])[0], h, atol=1e-3)


def test_the_shuffled_control_is_the_route_again_from_other_rewards(finished: Path) -> None:
    work = finished / "run"
    ours, shuffled = (contents(folder / "lora")["adapter_model.safetensors"] for folder in (work, work / "shuffled"))
    assert ours != shuffled
    assert contents(work / "teacher" / "rollouts") != contents(work / "shuffled" / "teacher" / "rollouts")
    assert not (work / "shuffled" / "features").exists(), "it learns from the same completions"


class Killed(BaseException):
    """As a SIGKILL: nothing may catch it."""


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45, 0.6, 0.8])
def test_a_killed_run_ends_as_an_undisturbed_one(
    base: Base, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    survived = int(share * len(WRITTEN))
    replace, done = os.replace, []

    def replace_until_killed(source: str, target: str) -> None:
        if len(done) == survived:
            raise Killed
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", replace_until_killed)
        with pytest.raises(Killed):
            pipeline.run(CONFIG, tmp_path, base, Vowels())
    assert not (tmp_path / "correction.json").exists()
    pipeline.run(CONFIG, tmp_path, base, Vowels())
    assert contents(tmp_path) == contents(finished)


def distilled(base: Base, out: Path, teacher: Base) -> Correction:
    config = dataclasses.replace(CONFIG, via="teacher", teacher="tuned")
    return pipeline.run(config, out, base, Vowels(), teacher)


def test_a_teacher_that_is_given_needs_no_rewards_to_learn_from(base: Base, finished: Path, tmp_path: Path) -> None:
    class Never(Vowels):
        def score(self, problem: Problem, completion: str) -> float:
            return 0.0

        def extract(self, completion: str) -> None: ...

    config = dataclasses.replace(CONFIG, via="teacher", teacher="tuned")
    tuned = adapt(base, finished / "lora")
    correction = pipeline.run(config, tmp_path, base, Never(), tuned)
    assert correction.report is not None
    names = [policy["policy"] for policy in correction.report["policies"]]
    assert names[4:] == ["shuffled-teacher", "random-positions", "teacher"]
    fit = correction.provenance["fit"]
    assert fit["teacher_kl"] < 0.75 * fit["teacher_base_kl"]
    assert load(tmp_path / "controls" / "shuffled-teacher").provenance["kl"] == pytest.approx(fit["kl"], rel=0.05)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["made_with"]["teacher"] == tuned.identity.fingerprint
    assert not (tmp_path / "lora").exists()


def test_a_resumed_run_with_another_teacher_is_refused(base: Base, finished: Path, tmp_path: Path) -> None:
    distilled(base, tmp_path, adapt(base, finished / "lora"))
    with pytest.raises(InvalidRequest, match="begun with teacher = "):
        distilled(base, tmp_path, tiny_base(seed=1))


def test_a_teacher_that_is_the_base_teaches_nothing(base: Base, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no epoch brought the head nearer"):
        distilled(base, tmp_path, base)
    assert not (tmp_path / "correction.json").exists()


def test_a_correction_must_beat_its_shuffled_teacher_to_ship() -> None:
    def verdict(gains: Mapping[str, float]) -> bool:
        differences = [Difference("correction", name, gain, gain - 0.1, gain + 0.1) for name, gain in gains.items()]
        return bool(judge(differences, [])["ship"])

    assert verdict({"base": 0.2, "shuffled-teacher": 0.2})
    assert not verdict({"base": 0.2, "shuffled-teacher": 0.05})
    assert not verdict({"base": 0.05, "shuffled-teacher": 0.2})
    assert not verdict({"base": 0.2})
