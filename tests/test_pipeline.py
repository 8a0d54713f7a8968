"""The whole trainer on a tiny random model: it ends in a correction's folder, and a killed run ends in the same one."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fitting import SMALL, Killed, Odd, contents, writing
from tiny import tiny_base
from trimtab.errors import Diverged, InvalidRequest, TaskError
from trimtab.server.model.base import Base
from trimtab.steering.commands import pipeline
from trimtab.steering.correction import Correction, check
from trimtab.steering.folder import load, save
from trimtab.steering.gate import Gate
from trimtab.steering.machine import describe
from trimtab.steering.tasks.problem import Problem, Split
from trimtab.steering.training import routes
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.lock import hold

CONFIG = FitConfig(**SMALL, rank=2, top_k=5, epochs=3, kl_budgets=(0.01, 0.03))


@pytest.fixture(scope="module")
def finished(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    with writing(WRITTEN):
        pipeline.run(CONFIG, out, base, Odd())
    return out


WRITTEN: list[str] = []  # files of the undisturbed run, in order


def test_a_run_leaves_a_loadable_correction_with_report_and_controls(base: Base, finished: Path) -> None:
    correction = load(finished)
    check(correction, base.identity)
    assert correction.name == "tiny"
    report = correction.report
    assert report is not None
    names = ["base", "base-greedy", "correction", "correction-greedy", "shuffled-rewards", "random-positions"]
    assert [policy["policy"] for policy in report["policies"]] == names
    assert set(report["verdict"]["beats"]) == {"base", "shuffled-rewards", "random-positions"}
    assert report["policies"][2]["fired"] > 0.5
    assert report["policies"][0]["fired"] == 0
    fit = correction.provenance["fit"]
    assert 0 < fit["kl"] < fit["kl_budget"]
    assert fit["validation"].keys() == {"base", "kl-0.01", "kl-0.03"}
    made = correction.provenance
    assert (made["dtype"], made["device"], made["threads"], made["machine"]) == ("float32", "cpu", 1, describe())
    for kind in ("shuffled-rewards", "random-positions"):
        control = load(finished / "controls" / kind)
        check(control, base.identity)
        assert control.provenance["kl_wanted"] == fit["kl"]
        assert report["strengths"][kind] == control.strength
    assert "Verdict" in (finished / "report.md").read_text()
    assert not list(finished.rglob("*.tmp"))


def ids(out: Path, stage: str) -> set[str]:
    """Of the problems that a stage sampled."""
    files = list((out / "run" / stage).rglob("*.jsonl"))
    return {json.loads(line)["problem"] for file in files for line in file.read_text().split("\n") if line}


def test_each_stage_samples_problems_of_its_own(finished: Path) -> None:
    assert ids(finished, "rollouts") == {f"train-{i}" for i in range(20)}
    assert ids(finished, "validation") == {f"validation-{i}" for i in range(3)}
    assert ids(finished, "report") == {f"held-out-{i}" for i in range(9)}


def resulting(out: Path, part: str) -> list[Path]:
    """Finished files of a stage. (A fit takes seconds: its stage alone is done again as a whole.)"""
    return [p for p in (out / "run").rglob("*") if p.is_file() and part in p.parts and p.suffix != ".tmp"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_killed_run_resumes_and_ends_as_an_undisturbed_one(
    base: Base, finished: Path, tmp_path: Path, share: float
) -> None:
    with pytest.raises(Killed), writing([], int(share * len(WRITTEN))):
        pipeline.run(CONFIG, tmp_path, base, Odd())
    assert not (tmp_path / "correction.json").exists()
    kept = [
        p for part in ("run.json", "rollouts", "features", "validation", "report") for p in resulting(tmp_path, part)
    ]
    before = {path: path.stat().st_mtime_ns for path in kept if path.suffix != ".journal"}
    pipeline.run(CONFIG, tmp_path, base, Odd())
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was finished is not done again"
    assert contents(tmp_path) == contents(finished)


def test_a_control_that_cannot_be_learned_ends_no_fit(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def learn(kind: str, *_: object) -> Correction:
        tried.append(kind)
        raise Diverged("the loss is no number by step 1: lower --learning-rate")

    monkeypatch.setattr(routes, "fit_control", learn)
    for _ in range(2):  # the second finds all that the first left, but for the artefact
        report = pipeline.run(CONFIG, tmp_path, base, Odd()).report
        assert report is not None
        assert [policy["policy"] for policy in report["policies"]][2:] == ["correction", "correction-greedy"]
        for kind in ("shuffled-rewards", "random-positions"):
            assert f"{kind} could not be made (the loss is no number by step 1" in report["verdict"]["summary"]
        assert not report["verdict"]["ship"]
        (tmp_path / "correction.json").unlink()
    assert tried == ["shuffled-rewards", "random-positions"], "what cannot be made is not tried again"
    failed = tmp_path / "run" / "controls" / "shuffled-rewards.json"
    assert json.loads(failed.read_text())["why"].startswith("the loss is no number")
    failed.write_text('"as it was written once"')
    pipeline.run(CONFIG, tmp_path, base, Odd())
    assert len(tried) == 3, "but where it is not known at which KL that was"


def to_choose_again(finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Correction:
    """A copy of the finished run that has still to choose, and will take another candidate. -> what it chose before."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    first = load(folder)
    for name in ("correction.json", "correction.safetensors", "report.md"):
        (folder / name).unlink()
    shutil.rmtree(folder / "run" / "report")

    def choose_the_other(*choices: Any) -> Correction:
        (other,) = (one for one in choices[-1] if one.provenance["kl"] != first.provenance["fit"]["kl"])
        return dataclasses.replace(other, provenance=dict(other.provenance))

    monkeypatch.setattr(pipeline, "_choose", choose_the_other)
    return first


def test_controls_of_another_candidate_are_made_anew(
    base: Base, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation scored otherwise, as by a verifier that was changed, may choose another one."""
    first = to_choose_again(finished, tmp_path, monkeypatch)
    second = pipeline.run(CONFIG, tmp_path, base, Odd())
    assert second.provenance["fit"]["kl"] != first.provenance["fit"]["kl"]
    for kind in ("shuffled-rewards", "random-positions"):
        control = load(tmp_path / "controls" / kind)
        assert control.provenance["kl_wanted"] == second.provenance["fit"]["kl"]
        assert second.report is not None
        assert second.report["strengths"][kind] == control.strength


def test_a_control_that_a_kill_leaves_half_replaced_is_made_anew(
    base: Base, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    to_choose_again(finished, undisturbed, monkeypatch)
    written: list[str] = []
    with writing(written):
        pipeline.run(CONFIG, undisturbed, base, Odd())
    first = next(i for i, path in enumerate(written) if Path(path).parent.name == "shuffled-rewards")
    to_choose_again(finished, killed, monkeypatch)
    with pytest.raises(Killed), writing([], first + 1):
        pipeline.run(CONFIG, killed, base, Odd())
    pipeline.run(CONFIG, killed, base, Odd())
    assert contents(killed) == contents(undisturbed)


def test_a_resumed_run_with_another_config_is_refused_by_field(base: Base, finished: Path) -> None:
    for change in ({"rank": 3}, {"kl_budgets": (0.01, 0.02)}, {"seed": 1}, {"slots": 5}):
        (field,) = change
        with pytest.raises(InvalidRequest, match=f"begun with {field} = ") as caught:
            pipeline.run(dataclasses.replace(CONFIG, **change), finished, base, Odd())
        assert caught.value.field == field
    with pytest.raises(InvalidRequest, match="fingerprint"):
        pipeline.run(CONFIG, finished, tiny_base(seed=1), Odd())


def test_a_run_of_another_config_may_keep_the_rollouts_if_they_are_its_own(
    base: Base, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "other", dataclasses.replace(CONFIG, rank=3, name="")
    shutil.copytree(finished / "run" / "rollouts", out / "run" / "rollouts")
    with pytest.raises(InvalidRequest, match="holds completions made with sampling"):
        pipeline.run(dataclasses.replace(config, temperature=0.9), out, base, Odd())
    (out / "run" / "run.json").unlink()
    pipeline.run(config, out, base, Odd())
    undisturbed = pipeline.run(config, tmp_path / "fresh" / "other", base, Odd())
    assert contents(out) == contents(tmp_path / "fresh" / "other")
    assert undisturbed.name == "other"


def test_a_finished_fit_run_again_keeps_what_calibrate_set(base: Base, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    calibrated = dataclasses.replace(load(tmp_path), gate=Gate(tau=0.25, calibration=((0.5, 0.25),)), report=None)
    save(calibrated, tmp_path)
    before = contents(tmp_path)
    again = pipeline.run(CONFIG, tmp_path, base, Odd())
    assert again.gate == calibrated.gate
    assert contents(tmp_path) == before


def test_two_fits_do_not_write_to_one_folder(base: Base, tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(InvalidRequest, match="another process writes to"):
        pipeline.run(CONFIG, tmp_path, base, Odd())
    assert not list(tmp_path.iterdir())


def test_validation_problems_that_are_trained_on_are_refused(base: Base, tmp_path: Path) -> None:
    class Short(Odd):
        def problems(self, split: Split, count: int) -> list[Problem]:
            lines = super().problems("train", 22)
            return (lines[::-1] if split == "validation" else lines)[:count]

    with pytest.raises(TaskError, match=r"odd has 22 train problems; 23 are needed \(20 to learn from, 3 to choose on"):
        pipeline.run(CONFIG, tmp_path, base, Short())


def test_a_finished_correction_without_its_run_is_not_overwritten(base: Base, finished: Path, tmp_path: Path) -> None:
    for name in ("correction.json", "correction.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    with pytest.raises(InvalidRequest, match="holds a finished correction"):
        pipeline.run(CONFIG, tmp_path, base, Odd())
