"""The routes with a teacher, from rollouts to a correction's folder; a killed run ends in the same one."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fitting import VIA_LORA, Killed, Odd, contents, writing
from tiny import read_states, tiny_base
from trimtab.errors import InvalidRequest, TaskError
from trimtab.server.model.base import Base
from trimtab.steering.commands import pipeline
from trimtab.steering.correction import Correction, check
from trimtab.steering.evaluation.evaluate import Difference
from trimtab.steering.evaluation.report import judge
from trimtab.steering.folder import load
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.training.teacher import adapt


@pytest.fixture(scope="module")
def finished(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    with writing(WRITTEN):
        pipeline.run(VIA_LORA, out, base, Odd())
    return out


WRITTEN: list[str] = []  # files of the undisturbed run, in order


@pytest.mark.parametrize("route", [{}, {"tier": "lora", "via": "direct", "rank": None, "strengths": (1.0,)}])
def test_a_gate_that_never_opens_is_told_before_anything_is_learned(
    base: Base, tmp_path: Path, route: dict[str, Any]
) -> None:
    config = dataclasses.replace(VIA_LORA, tau=20.0, **route)
    with pytest.raises(TaskError, match=r"no position to learn from \(0 fitted, 0 held out\)"):
        pipeline.run(config, tmp_path / "shut", base, Odd())
    assert not (tmp_path / "shut" / "run" / "lora").exists()


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
    tuned, h = adapt(base, finished / "lora"), read_states(base, [5, 6, 7])
    assert not torch.allclose(read_states(tuned, [5, 6, 7]), h, atol=1e-3)


def test_the_shuffled_control_is_the_route_again_from_other_rewards(finished: Path) -> None:
    work = finished / "run"
    ours, shuffled = (contents(folder / "lora")["adapter_model.safetensors"] for folder in (work, work / "shuffled"))
    assert ours != shuffled
    assert contents(work / "teacher" / "rollouts") != contents(work / "shuffled" / "teacher" / "rollouts")
    assert not (work / "shuffled" / "features").exists(), "it learns from the same completions"


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45, 0.6, 0.8])
def test_a_killed_run_ends_as_an_undisturbed_one(base: Base, finished: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(Killed), writing([], int(share * len(WRITTEN))):
        pipeline.run(VIA_LORA, tmp_path, base, Odd())
    assert not (tmp_path / "correction.json").exists()
    pipeline.run(VIA_LORA, tmp_path, base, Odd())
    assert contents(tmp_path) == contents(finished)


def distilled(base: Base, out: Path, teacher: Base) -> Correction:
    config = dataclasses.replace(VIA_LORA, via="teacher", teacher="tuned")
    return pipeline.run(config, out, base, Odd(), teacher)


def test_a_teacher_that_is_given_needs_no_rewards_to_learn_from(base: Base, finished: Path, tmp_path: Path) -> None:
    class Never(Odd):
        def score(self, problem: Problem, completion: str) -> float:
            return 0.0

    config = dataclasses.replace(VIA_LORA, via="teacher", teacher="tuned")
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
