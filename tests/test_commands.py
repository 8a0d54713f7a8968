"""fit, eval and inspect from the command line, on a tiny base: what they print, and what they refuse."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from fitting import work_in, write_task
from tiny import tiny_base
from trimtab.cli import build_parser, main
from trimtab.steering.folder import load
from trimtab.steering.machine import describe, hardware
from trimtab.steering.tasks.tasks import load_task
from trimtab.steering.training import teacher as teacher_module
from trimtab.steering.training.config import FitConfig

SMALL = (
    "--temperature 1.0 --max-tokens 5 --problems 16 --samples 4 --rank 2 "
    "--validation-problems 2 --validation-samples 1 --test-problems 8"
)
HEAD = f"{SMALL} --top-k 5 --batch 32 --epochs 2 --learning-rate 0.01"
TASK = "--task task.jsonl --verifier odd_grading:odd"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a task, a verifier and a fitted correction."""
    folder = tmp_path_factory.mktemp("work")
    write_task(folder)
    with pytest.MonkeyPatch.context() as patch:
        work_in(folder, patch)
        assert run(f"fit --model tiny {TASK} --out odd {HEAD} --kl-budgets 0.01 0.03") == 0
        lora = (
            "--via lora --epochs 8 --rank 4 --top-k 40 --problems 20 --lora-targets down_proj --lora-rate 0.02 "
            "--lora-kl-limit 0 --lora-batch 4 --teacher-samples 2"
        )
        assert run(f"fit --model tiny {TASK} --out taught {HEAD} {lora}") == 0
    return folder


def mean_reward(folder: str) -> float:
    lines = "".join(file.read_text() for file in Path(folder).glob("*.jsonl")).splitlines()
    found = [json.loads(line)["reward"] for line in lines]
    return float(sum(found) / len(found))


def run(arguments: str) -> int:
    return main(arguments.split())


@pytest.fixture
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(folder, monkeypatch)


@pytest.mark.usefixtures("_inside")
def test_eval_repeats_the_fits_report_and_takes_other_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval --correction odd --problems 8 --json") == 0
    again = json.loads(capsys.readouterr().out)
    report = load("odd").report
    assert report is not None
    assert {name: again[name] for name in report} == report
    assert run("eval --correction odd --problems 4 --skip 8 --samples 1 --strength 0") == 0
    table = capsys.readouterr().out
    assert "4 held-out problems of task.jsonl, 1 samples each" in table
    for policy in ("correction", "shuffled-rewards", "random-positions"):
        assert f"| {policy} - base | +0.000 | [+0.000, +0.000] |" in table


@pytest.mark.usefixtures("_inside")
def test_kept_completions_are_judged_by_the_verifier_of_now(capsys: pytest.CaptureFixture[str]) -> None:
    Path("moody.py").write_text("def never(completion, answer): return 0\ndef always(completion, answer): return 1\n")
    for kind, rate in (("never", 0.0), ("always", 1.0)):
        options = f"--verifier moody:{kind} --problems 2 --samples 1 --out kept --json"
        assert run(f"eval --correction odd {options}") == 0
        report = json.loads(capsys.readouterr().out)
        assert {policy["pass_at_1"] for policy in report["policies"]} == {rate}


@pytest.mark.usefixtures("_inside")
def test_eval_in_json_says_what_ran_where(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "eval --correction odd --problems 4 --skip 6 --samples 1 --strength 0.5 --tau 1.25 --json"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/trimtab", *arguments.split()])
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["benchmark"], found["correction"], found["model"]) == ("eval", "odd", "tiny-llama")
    assert found["machine"]["command"] == f"trimtab {arguments}"
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert found["hardware"] == f"{hardware(describe())} (cpu, float32, 1 threads)"
    assert found["problems_of_the_fits_report"] == 2
    assert found["tau"] == 1.25
    assert found["strengths"]["correction"] == 0.5
    for kind in ("shuffled-rewards", "random-positions"):
        assert found["strengths"][kind] == pytest.approx(load(f"odd/controls/{kind}").strength / 2)


@pytest.mark.usefixtures("_inside")
def test_an_eval_on_problems_of_the_fits_report_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval --correction odd --problems 4 --skip 6 --samples 1") == 0
    assert "\n2 of these problems are of the fit's own report: --skip 8 asks others.\n" in capsys.readouterr().out
    assert run("eval --correction odd --problems 4 --skip 8 --samples 1") == 0
    assert "of the fit's own report" not in capsys.readouterr().out
    before = [json.dumps({"id": f"new {i}", "prompt": f"New {i}:", "answer": None}) + "\n" for i in range(20)]
    Path("more.jsonl").write_text("".join(before) + Path("task.jsonl").read_text())
    more = "--task more.jsonl --verifier odd_grading:odd --samples 1"
    assert run(f"eval --correction odd {more} --problems 4") == 0
    assert "of the fit's own report" not in capsys.readouterr().out, "they are not those that came first then"
    held_out = load_task("more.jsonl", "odd_grading:odd").problems("held-out", 18)
    first = next(i for i, problem in enumerate(held_out) if not problem.id.startswith("new "))
    assert run(f"eval --correction odd {more} --skip {first} --problems 2") == 0
    assert f"\n2 of these problems are of the fit's own report: --skip {first + 2} asks" in capsys.readouterr().out


@pytest.mark.usefixtures("_inside")
def test_eval_repeats_the_report_of_a_distilled_correction_with_its_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval --correction taught --problems 8 --json") == 0
    again = json.loads(capsys.readouterr().out)
    report = load("taught").report
    assert report is not None
    assert {name: again[name] for name in report} == report
    assert again["policies"][-1]["policy"] == "teacher"


@pytest.mark.usefixtures("_inside")
def test_distill_takes_a_peft_folder_or_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    for teacher in ("taught/lora", "another"):
        out = f"from-{Path(teacher).name}"
        assert run(f"distill tiny {teacher} {TASK} --out {out} {HEAD} --strengths 1 --teacher-samples 2") == 0
        shown = capsys.readouterr()
        assert "| correction - shuffled-teacher |" in shown.out
        told = re.search(
            r"\[teacher rollouts\] mean reward (\S+) on the problems that are learned from, where the base had (\S+); "
            r"(\S+) on (\d+) kept apart, where it had (\S+)\n",
            shown.err,
        )
        assert told is not None
        teachers, bases, teachers_apart, apart, bases_apart = map(float, told.groups())
        problems = load(out).provenance["config"]["problems"]
        assert 0 < apart < problems
        for learned, others, work in (
            (teachers, teachers_apart, "teacher/rollouts"),
            (bases, bases_apart, "rollouts"),
        ):
            together = (learned * (problems - apart) + others * apart) / problems
            assert together == pytest.approx(mean_reward(f"{out}/run/{work}"), abs=1e-3)
        correction = load(out)
        assert correction.provenance["config"]["teacher"] == teacher
        assert correction.provenance["config"]["via"] == "teacher"
        assert correction.strength == 1.0


@pytest.mark.usefixtures("_inside")
def test_a_teacher_that_reads_less_than_the_base_writes_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tiny_base(seed=1, max_position_embeddings=20)
    monkeypatch.setattr(teacher_module, "load_base", lambda *_: short)
    assert run(f"distill tiny another {TASK} --out from-short {HEAD} --max-tokens 16") == 1
    assert "max_tokens 16 is more than the teacher tiny-llama can read after" in capsys.readouterr().err
    assert not Path("from-short/run").exists()


@pytest.mark.usefixtures("_inside")
def test_what_a_teacher_learned_is_not_held_out_from_whom_it_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    lora = f"{SMALL} --tier lora --lora-targets down_proj --lora-rate 0.05 --lora-kl-limit 0"
    assert run(f"fit --model tiny {TASK} --out adapter {lora}") == 0
    learned = {problem.id for problem in load_task("task.jsonl", "odd_grading:odd").problems("train", 16)}
    lines = [line for line in Path("task.jsonl").read_text().splitlines() if str(json.loads(line)["id"]) in learned]
    Path("judge.jsonl").write_text("\n".join(lines))
    new = [json.dumps({"id": f"n{i}", "prompt": f"Other {i}:", "answer": None}) for i in range(60)]
    Path("new.jsonl").write_text("\n".join(new))
    other = "--task new.jsonl --verifier odd_grading:odd"
    capsys.readouterr()
    options = f"{lora} --teacher-samples 2"
    assert run(f"distill tiny adapter {other} --held-out judge.jsonl --out leaky {options}") == 1
    assert "8 of the 8 problems are no held-out ones: adapter was fitted or chosen on them" in capsys.readouterr().err
    assert not Path("leaky/run").exists()
    assert run(f"distill tiny adapter {other} --out passed-on {options}") == 0
    assert set(load("adapter").provenance["learned"]) < set(load("passed-on").provenance["learned"])


@pytest.mark.usefixtures("_inside")
def test_distill_makes_a_lora_of_the_rank_that_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    lora = "--lora-targets down_proj --lora-rate 0.05 --lora-kl-limit 0 --teacher-samples 2"
    options = f"{SMALL} --tier lora {lora} --gate always"
    assert run(f"distill tiny taught/lora {TASK} --out copied {options}") == 0
    assert "| correction - shuffled-teacher |" in capsys.readouterr().out
    assert run("inspect copied") == 0
    card = capsys.readouterr().out
    assert re.search(r"^rank +2$", card, re.MULTILINE)
    for words in ("lora", "down_proj", "always", "Verdict:"):
        assert words in card


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--lora-rank 64", "lora_rank is of a LoRA: add --via lora or --tier lora"),
        ("--lora-preset paper", "lora_preset is of a LoRA"),
        ("--strengths 2", "strengths is of what is distilled, or of a LoRA"),
        ("--via lora --kl-budgets 0.5", "kl_budgets is of a head that is fitted directly"),
        ("--tier lora --teacher-samples 2", "teacher_samples is of what is distilled, or of a teacher's imitation"),
        ("--via lora --kl-weight 3", "kl_weight is of a head that is fitted directly"),
        ("--tier lora --learning-rate 1e-5", "learning_rate is of a head: a LoRA has --lora-rate"),
        ("--via teacher --teacher x --keep-problems 5", "keep_problems is of completions that are rewarded"),
    ],
)
def test_an_option_of_another_route_is_refused(options: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"fit --out nowhere {options}") == 1
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("_inside")
def test_inspect_shows_base_gate_and_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect odd") == 0
    card = capsys.readouterr().out
    for words in (
        "tiny-llama",
        "rank             2",
        "entropy > 0.5 nats",
        "parameters       160",
        "Verdict:",
        "task.jsonl",
    ):
        assert words in card


@pytest.mark.usefixtures("_inside")
def test_another_base_is_refused_with_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval --correction odd --model other --problems 8") == 1
    assert "was fitted to 'tiny-llama' and cannot steer 'tiny-llama': other weights" in capsys.readouterr().err


@pytest.mark.usefixtures("_inside")
def test_mistakes_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in {
        "inspect nowhere": "correction.json: cannot be read",
        "fit --out x --task gone.jsonl": "gone.jsonl",
        "fit --out x --rank -1": "rank must be at least 0",
        "fit --out x --via magic": "via must be one of direct, lora, teacher",
        "fit --out x --via teacher": "teacher must be given with --via teacher",
        "eval --correction odd --problems 900": "held-out problems",
        "eval --correction odd --problems 2 --top-p nan": "top_p must be greater than 0",
        "eval --correction odd --problems 2 --out task.jsonl": "out must be a folder",
        f"fit --out task.jsonl {TASK}": "out must be a folder",
    }.items():
        assert run(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("trimtab: ")
        assert words in error
        assert error.count("\n") == 1


def test_fit_has_an_option_with_help_for_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["fit", "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(FitConfig):
        assert f"--{field.name.replace('_', '-')} " in shown
    args = build_parser().parse_args(["fit", "--out", "x"])
    assert FitConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(FitConfig)}) == FitConfig()
