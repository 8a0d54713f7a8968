"""The token study: shares that add up, rules that take what they say, and gains that are told apart from the base."""

import dataclasses
import json
from pathlib import Path

import pytest

from fitting import Odd
from tiny import tiny_base, tiny_correction, tiny_lora
from trimtab.errors import InvalidRequest
from trimtab.server.engine.core import Core
from trimtab.server.engine.event import Receipt
from trimtab.server.engine.request import Steering
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import ContrastCorrection, HeadCorrection
from trimtab.steering.evaluation.analyze import Tuned, analyze, count, mark, place
from trimtab.steering.evaluation.analyze_report import to_markdown
from trimtab.steering.evaluation.lockstep import Turn
from trimtab.steering.evaluation.report import ENOUGH
from trimtab.steering.gate import Gate
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.training.journal import Journal, Rollout
from trimtab.steering.training.rollouts import Exam, Sampling, collect, open_core

PROBLEMS = [Problem(str(i), None, prompt=f"Problem {i}:") for i in range(6)]
EXAM = Exam(Odd(), PROBLEMS, Sampling(2, 0, 1.0, 0.95, 16), 4, 1)


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base(eos_token_id=list(range(8)))


def receipt(best: int, entropy: float, steered: int) -> Receipt:
    return Receipt(entropy, True, False, best, steered, 0.0, 0.0, 0.0, 0.0, entropy, 0.0, 0.0)


def turn(best: int, entropy: float = 1.0, token: int = 0, other: int = 0) -> Turn:
    """The base ranks 0, 1, 2, ...; the tuned model likes `best` most."""
    return Turn(7, 0, 0, token, other, tuple(range(20)), receipt(0, entropy, 0), receipt(best, 0.0, best))


def test_a_token_is_placed_by_the_bases_ranking() -> None:
    assert [place(turn(best)) for best in (0, 1, 4, 5, 99)] == ["unshifted", *["reranked"] * 2, *["shifted"] * 2]


def test_marks_add_up_to_shares_and_means() -> None:
    turns = [turn(0, 1.0, 0, 1), turn(1, 3.0), turn(3, 5.0), turn(9, 2.0), turn(50, 9.0)]
    marks = mark([(t, False) for t in turns], lambda t: True)
    rollouts = [Rollout("p", 0, [0] * 5, "", 0.0, "stop", 0, 0, 0, 0.0, marks)]
    found = count(rollouts)
    assert (found["unshifted"], found["reranked"], found["shifted"]) == pytest.approx((0.2, 0.4, 0.4))
    assert found["mean_rank"] == pytest.approx((2 + 4 + 10) / 3), "of those among the known ranks"
    assert (found["entropy"], found["entropy_reranked"], found["entropy_ratio"]) == (4.0, 4.0, 1.0)
    assert found["drawn_differently"] == pytest.approx(0.2)
    unheeded = count([rollouts[0]._replace(marks=mark([(t, False) for t in turns], lambda t: False))])
    assert (unheeded["unshifted"], unheeded["entropy_reranked"], unheeded["mean_rank"]) == (1.0, None, None)


@pytest.mark.parametrize("kind", ["head", "lora", "gated lora", "model"])
def test_rules_take_what_they_say(base: Base, tmp_path: Path, kind: str) -> None:
    tuned = {
        "head": Tuned("mine", base, tiny_correction(base, "mine", tau=3.0)),
        "lora": Tuned("lora", base, tiny_lora(base, gate=Gate("always"), size=0.1)),
        "gated lora": Tuned("lora", base, tiny_lora(base, gate=Gate(tau=3.0), size=0.1)),
        "model": Tuned("other", tiny_base(seed=4, eos_token_id=list(range(8)))),
    }[kind]
    study = json.loads(json.dumps(analyze(EXAM, base, tuned, Gate(), [3.2], tmp_path), allow_nan=False))
    rules = {rule["policy"]: rule for rule in study["rules"]}
    assert list(rules) == ["base", "tuned", "oracle", "random", "entropy > 3.2"]
    assert rules["base"]["fired"] == rules["base"]["flips"] == 0
    assert 0 < rules["oracle"]["fired"] < 1
    assert rules["random"]["fired"] == pytest.approx(rules["oracle"]["fired"], abs=0.25)
    assert 0 < rules["entropy > 3.2"]["fired"] < 1
    if kind in ("lora", "model"):
        assert rules["tuned"]["fired"] == 1.0
    for tokens in study["tokens"].values():
        assert tokens["unshifted"] + tokens["reranked"] + tokens["shifted"] == pytest.approx(1)
        assert tokens["reranked"] > 0
    shown = to_markdown(study)
    for words in ("| completions of | positions | unshifted |", "| oracle | ", "| entropy > 3.2 | "):
        assert words in shown
    assert shown.endswith(f"- {len(PROBLEMS)} problems are few: their intervals are too narrow.\n")
    assert "are few" not in to_markdown(study | {"problems": ENOUGH})


@pytest.mark.parametrize("kind", ["lora", "head"])
def test_as_many_are_drawn_at_random_of_the_steps_at_which_it_acts(base: Base, tmp_path: Path, kind: str) -> None:
    gate = Gate(tau=3.0)
    made = tiny_lora(base, gate=gate, size=0.1) if kind == "lora" else tiny_correction(base, "mine", tau=3.0)
    tuned = Tuned(made.name, base, made)
    analyze(EXAM._replace(problems=PROBLEMS[:3]), base, tuned, gate, [], tmp_path)
    oracle = Journal(tmp_path / "oracle" / "00000.jsonl").read()
    opened = sum(r.open for r in oracle)
    assert 0 < opened < sum(len(r.tokens) for r in oracle)
    assert (tmp_path / f"random-{sum(r.fired for r in oracle) / opened:.6f}").is_dir()


def test_the_tuned_rule_writes_what_is_served(base: Base, tmp_path: Path) -> None:
    """A gated LoRA is served with a companion row; here its gate is heeded by the rule."""
    lora = tiny_lora(base, gate=Gate(tau=3.0), size=0.1)
    analyze(EXAM, base, Tuned("lora", base, lora), Gate(), [], tmp_path / "study")
    bank = Bank(base.hidden, base.device)
    bank.add(lora)
    core = open_core(base, bank, PROBLEMS, 16, 4, 1)
    served = collect(core, EXAM.task, PROBLEMS, EXAM.sampling, tmp_path / "served", "served", Steering("lora"))
    lines = (tmp_path / "study" / "tuned" / "00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [r.tokens for r in served]


def test_a_finished_study_samples_nothing_and_another_is_refused(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Tuned("mine", base, tiny_correction(base, "mine", tau=3.0))
    first = analyze(EXAM, base, tuned, Gate(), [3.2], tmp_path)
    monkeypatch.setattr(Core, "step", None)
    assert analyze(EXAM, base, tuned, Gate(), [3.2], tmp_path) == first
    mine = tuned.correction
    assert isinstance(mine, HeadCorrection)
    reseeded = dataclasses.replace(tiny_correction(base, "mine", seed=2), gate=Gate(tau=3.0))
    for other in (reseeded, dataclasses.replace(mine, strength=0.5), dataclasses.replace(mine, cap=mine.cap / 2)):
        with pytest.raises(InvalidRequest, match="made with correction = "):
            analyze(EXAM, base, tuned._replace(correction=other), Gate(), [3.2], tmp_path)


def test_what_has_no_tuned_model_is_refused(base: Base, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="away is a contrast"):
        analyze(EXAM, base, Tuned("away", base, ContrastCorrection(name="away")), Gate(), [], tmp_path)
    tuned = Tuned("mine", base, tiny_correction(base, "mine"))
    for kind in ("random", "always"):
        with pytest.raises(InvalidRequest, match=f"gate must be entropy, varentropy or margin: {kind} has no"):
            analyze(EXAM, base, tuned, Gate(kind), [0.5], tmp_path)
    with pytest.raises(InvalidRequest, match=r"taus must be finite numbers, not 0\.5, nan"):
        analyze(EXAM, base, tuned, Gate(), [0.5, float("nan")], tmp_path)
    with pytest.raises(InvalidRequest, match=r"taus must be of -1 to 0, for margin, not 0\.5"):
        analyze(EXAM, base, tuned, Gate("margin"), [0.5], tmp_path)
    lora = tiny_lora(base, gate=Gate("margin", tau=-0.5))
    with pytest.raises(InvalidRequest, match="has a gate of the kind margin"):
        analyze(EXAM, base, Tuned("lora", base, lora), Gate(), [], tmp_path)
