"""The ladder: its rows, what they are held against, what is kept of a killed one, and what is said of it."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from fitting import Odd
from tiny import tiny_base, tiny_correction, tiny_lora
from trimtab.errors import InvalidRequest
from trimtab.server.engine.core import Core
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import ContrastCorrection
from trimtab.steering.evaluation.evaluate import Difference, Policy
from trimtab.steering.evaluation.ladder import Climbed, Entrants, Row, climb
from trimtab.steering.evaluation.ladder_report import build, judge, to_markdown, to_svg
from trimtab.steering.evaluation.match import Matched, match_kl
from trimtab.steering.gate import Gate
from trimtab.steering.tasks.problem import Problem, Split
from trimtab.steering.tasks.verifiers import Extract
from trimtab.steering.training.rollouts import Exam, Sampling, open_core


class Chats(Odd):
    """Its problems are chats, those to learn from long, and the answer is the first letter."""

    def problems(self, split: Split, count: int) -> list[Problem]:
        text = "A long story. " * 8 if split == "train" else ""
        return [
            Problem(f"{split}-{i}", None, messages=({"role": "user", "content": f"{text}{split} {i}"},))
            for i in range(count)
        ]

    def extract(self, completion: str) -> Extract | None:
        return Extract(completion[0], completion[0].isalpha()) if completion else None


EXAM = Exam(Chats(), Chats().problems("held-out", 8), Sampling(2, 0, 1.0, 0.95, 16), 8, 1)
ROWS = {
    "base": "base",
    **dict.fromkeys(("base-t0.67", "base-t0.5", "base-greedy"), "sharpening"),
    **dict.fromkeys(("base-prompted", "base-few-shot"), "format"),
    "base-open-t0.5": "sharpening",
    **dict.fromkeys(("contrast", "head", "head-greedy", "other"), "tier"),
    **dict.fromkeys(("lora-gated", "lora-always", "lora-always-greedy"), "tier"),
    **dict.fromkeys(("shuffled-rewards", "random-gate", "random-gate-matched"), "control"),
}


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base(eos_token_id=list(range(48)))  # ends now and then


@pytest.fixture(scope="module")
def entrants(base: Base) -> Entrants:
    return Entrants(
        correction=tiny_correction(base, "mine", tau=3.0),
        controls=[tiny_correction(base, "shuffled-rewards", seed=3, tau=3.0)],
        lora=tiny_lora(base, "adapter"),
        others=[tiny_correction(base, "other", seed=5, tau=2.0)],
        system="Be odd.",
        few_shot=1,
        strength=0.5,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ladder")


@pytest.fixture(scope="module")
def climbed(base: Base, entrants: Entrants, folder: Path) -> Climbed:
    return climb(base, EXAM, entrants, folder)


def test_every_row_answers_every_problem_once_a_sample(climbed: Climbed) -> None:
    assert {row.policy.name: row.role for row in climbed.rows} == ROWS
    for row in climbed.rows:
        found = climbed.found[row.policy.name]
        samples = 1 if row.policy.greedy else 2
        wanted = [(problem.id, i) for problem in EXAM.problems for i in range(samples)]
        assert [(r.problem, r.sample) for r in found] == wanted


def test_the_rows_act_where_they_say(climbed: Climbed) -> None:
    def total(name: str, field: str) -> float:
        return float(sum(getattr(r, field) for r in climbed.found[name]))

    steps = {name: sum(len(r.tokens) for r in found) for name, found in climbed.found.items()}
    assert total("base", "open") == total("base-greedy", "open") == 0
    for name in ("head", "contrast", "lora-gated", "shuffled-rewards", "base-open-t0.5"):
        assert 0 < total(name, "fired") < steps[name]
    assert total("lora-always", "fired") == steps["lora-always"]
    share = total("head", "fired") / steps["head"]
    assert total("random-gate", "fired") / steps["random-gate"] == pytest.approx(share, abs=0.15)
    assert all(total(name, "kl") > 0 for name in ("head", "contrast", "lora-gated", "shuffled-rewards"))


def test_a_control_pushes_as_hard_as_the_correction(climbed: Climbed) -> None:
    assert [matched.control for matched in climbed.matched] == ["shuffled-rewards", "random-gate-matched"]
    for matched in climbed.matched:
        assert matched.kl == pytest.approx(matched.wanted, rel=0.03)


def test_a_ladder_that_was_killed_goes_on_and_one_that_is_finished_samples_nothing(
    base: Base, entrants: Entrants, folder: Path, climbed: Climbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = folder / "head" / "00000.jsonl"
    before = lost.read_bytes()
    lost.unlink()
    assert climb(base, EXAM, entrants, folder).found == climbed.found
    assert lost.read_bytes() == before

    def never(core: Core) -> None:
        raise AssertionError("nothing is left to sample")

    monkeypatch.setattr(Core, "step", never)
    assert climb(base, EXAM, entrants, folder).found == climbed.found
    with pytest.raises(InvalidRequest, match=r"strength = 0\.5, and this run has 0\.6"):
        climb(base, EXAM, entrants._replace(strength=0.6), folder)
    with pytest.raises(InvalidRequest, match=r"control_prompt = 'Be odd\.', and this run has 'Be even\.'"):
        climb(base, EXAM, entrants._replace(system="Be even."), folder)
    with pytest.raises(InvalidRequest, match="few_shot = 1, and this run has 2"):
        climb(base, EXAM, entrants._replace(few_shot=2), folder)


def test_rows_of_one_name_are_refused(base: Base, entrants: Entrants, tmp_path: Path) -> None:
    twins = entrants._replace(others=[tiny_correction(base, "base-greedy")])
    with pytest.raises(InvalidRequest, match="two rows would be called base-greedy"):
        climb(base, EXAM, twins, tmp_path)


def test_rows_may_be_left_out_but_those_that_all_are_compared_with(
    base: Base, entrants: Entrants, folder: Path, climbed: Climbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Core, "step", None)
    without = frozenset({"contrast", "base-few-shot", "base-open-t0.5", "shuffled-rewards", "random-gate"})
    without |= {"random-gate-matched"}
    fewer = climb(base, EXAM, entrants._replace(without=without), folder)
    assert [row.policy.name for row in fewer.rows] == [name for name in ROWS if name not in without]
    assert to_markdown(build(base, EXAM, entrants, fewer))
    for name, words in {"base": "base must stay", "head": "head must stay", "tail": "there is no row tail"}.items():
        with pytest.raises(InvalidRequest, match=words):
            climb(base, EXAM, entrants._replace(without=frozenset({name})), folder)


def test_a_lora_may_be_judged_beside_another(base: Base, tmp_path: Path) -> None:
    entrants = Entrants(tiny_lora(base, "adapter", gate=Gate(tau=3.0)), lora=tiny_lora(base, "lora", seed=1))
    without = frozenset({"contrast", "base-t0.67", "base-t0.5", "base-open-t0.5", "random-gate", "random-gate-matched"})
    found = climb(base, EXAM._replace(problems=EXAM.problems[:2]), entrants._replace(without=without), tmp_path)
    tiers = {row.policy.name for row in found.rows if row.role == "tier"}
    assert {"lora-gated", "lora-always", "other-lora-gated", "other-lora-always"} < tiers


def test_a_lora_alone_is_compared_gated_and_always(base: Base, tmp_path: Path) -> None:
    exam = EXAM._replace(problems=EXAM.problems[:2])
    control = tiny_lora(base, "shuffled-rewards", seed=1)
    entrants = Entrants(tiny_lora(base, "adapter", gate=Gate(tau=3.0)), [control], strength=0.25)
    without = frozenset({"base-t0.67", "base-t0.5", "base-open-t0.5"})
    found = climb(base, exam, entrants._replace(without=without), tmp_path)
    tiers = [row.policy.name for row in found.rows if row.role == "tier"]
    assert tiers == ["contrast", "lora-gated", "lora-always", "lora-always-greedy"]
    assert [row.of for row in found.rows if row.role == "control"] == ["lora-gated"] * 3
    asked = {row.policy.name: row.policy.strength for row in found.rows}
    assert {asked[name] for name in tiers if name != "contrast"} == {asked["random-gate"]} == {0.25}


def test_the_report_has_every_figure_and_a_sentence_for_each_tier(
    base: Base, entrants: Entrants, climbed: Climbed
) -> None:
    report = json.loads(json.dumps(build(base, EXAM, entrants, climbed), allow_nan=False))
    assert [row["policy"] for row in report["rows"]] == [row.policy.name for row in climbed.rows]
    *sentences, few = report["verdict"]
    assert len(sentences) == sum(role == "tier" for role in ROWS.values())
    assert few == f"{len(EXAM.problems)} problems are few: their intervals are too narrow"
    pairs = {(d["policy"], d["against"]) for d in report["differences"]}
    assert {("head", "shuffled-rewards"), ("head", "random-gate"), ("head", "lora-always")} <= pairs
    assert {("head", "base-prompted"), ("lora-gated", "lora-always"), ("head-greedy", "base-greedy")} <= pairs
    assert ("lora-gated", "shuffled-rewards") not in pairs, "a control controls what it was made for"
    shown = to_markdown(report)
    assert "| policy | pass@1 | gain | pass@2 | majority | marked | tokens | truncated | fired | KL fired |" in shown
    for row in climbed.rows:
        assert f"| {row.policy.name} | " in shown
        assert f"- {row.policy.name}: {row.what}" in shown
    assert "- the system message: Be odd." in shown
    assert "- head: mine, gate entropy > 3 nats, strength 0.5" in shown
    assert report["strength"] == 0.5
    assert "- shuffled-rewards was matched at strength" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("| lora-always |"))
    assert line.endswith(" |  |  |  |"), "without a base row nothing tells how far it is from the base"


def test_a_push_too_weak_to_be_measured_is_not_called_matched(
    base: Base, entrants: Entrants, climbed: Climbed, tmp_path: Path
) -> None:
    exam = EXAM._replace(problems=EXAM.problems[:2])
    bank = Bank(base.hidden, base.device)
    for one in (entrants.correction, *entrants.controls):
        bank.add(one)
    core = open_core(base, bank, exam.problems, exam.sampling.max_tokens, exam.slots, exam.threads)
    weak = Policy("head", "mine", strength=1e-4)
    control = weak._replace(name="shuffled-rewards", correction="shuffled-rewards")
    matched = match_kl(core, exam, weak, control, tmp_path)
    assert (matched.wanted, matched.measured) == (0.0, False)
    shown = to_markdown(build(base, EXAM, entrants, climbed._replace(matched=[matched])))
    assert "- shuffled-rewards could not be matched, and is at strength 0.0001: 0.0000 nats a token where" in shown


def test_the_picture_is_an_svg_with_a_bar_a_row(base: Base, entrants: Entrants, climbed: Climbed) -> None:
    picture = ET.fromstring(to_svg(build(base, EXAM, entrants, climbed)))
    shapes = [element.tag.rpartition("}")[2] for element in picture]
    assert shapes.count("circle") == len(ROWS) - 1
    assert {"head", "lora-always"} <= {element.text for element in picture}


def test_the_verdict_names_what_is_not_beaten() -> None:
    rows = [
        Row(Policy("base"), "base", ""),
        Row(Policy("base-greedy", greedy=True), "sharpening", ""),
        Row(Policy("head"), "tier", ""),
        Row(Policy("weak"), "tier", ""),
        Row(Policy("harmful"), "tier", ""),
        Row(Policy("shuffled-rewards"), "control", "", "head"),
    ]
    differences = [
        Difference("head", "base", 0.2, 0.1, 0.3),
        Difference("head", "base-greedy", 0.1, 0.05, 0.15),
        Difference("head", "shuffled-rewards", 0.01, -0.02, 0.04),
        Difference("weak", "base", 0.02, -0.01, 0.05),
        Difference("weak", "base-greedy", -0.02, -0.1, 0.05),
        Difference("harmful", "base", -0.2, -0.3, -0.1),
    ]
    assert judge(rows, differences) == [
        "head: +0.200 [+0.100, +0.300] over base; beats base-greedy; does not beat shuffled-rewards (+0.010 [-0.020, "
        "+0.040])",
        "weak: +0.020 [-0.010, +0.050] over base; no gain is shown; does not beat base-greedy (-0.020 [-0.100, "
        "+0.050])",
        "harmful: -0.200 [-0.300, -0.100] over base; a loss",
    ]
    far = [Matched("shuffled-rewards", 32.0, 0.01, 0.02)]
    assert judge(rows, differences, far)[0] == (
        "head: +0.200 [+0.100, +0.300] over base; beats base-greedy; shuffled-rewards could not be made to push as "
        "hard, and controls nothing"
    )
    near = [far[0]._replace(kl=0.02)]
    assert judge(rows, differences, near) == judge(rows, differences)


def test_a_contrast_can_be_what_is_judged(base: Base, tmp_path: Path) -> None:
    exam = EXAM._replace(problems=EXAM.problems[:2])
    correction = ContrastCorrection(name="away", gate=Gate(tau=3.0), strength=0.7)
    rows = climb(base, exam, Entrants(correction), tmp_path).rows
    assert [row.policy.name for row in rows].count("contrast") == 1
    (judged,) = (row.policy for row in rows if row.policy.name == "contrast")
    assert judged.correction == "away"
