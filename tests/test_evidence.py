"""eval --ladder, --out and --text, calibrate and analyze from the command line: what they print, keep and refuse."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from fitting import work_in, write_task
from tiny import tiny_base, tiny_correction, tiny_lora
from trimtab.cli import main
from trimtab.server.engine.core import Core
from trimtab.steering.commands.setting import keep_in
from trimtab.steering.correction import HeadCorrection
from trimtab.steering.folder import load, save
from trimtab.steering.gate import Gate
from trimtab.steering.tasks.tasks import digest_of, load_task

FITTED = {"model": "tiny", "task": "task.jsonl", "verifier": "odd_grading:odd", "temperature": 1.0, "max_tokens": 6}
PEFT = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a task, a verifier, a correction with a control, and a PEFT folder."""
    work_in(tmp_path, monkeypatch)
    write_task(tmp_path)
    base = tiny_base()
    correction = dataclasses.replace(tiny_correction(base, "mine", tau=3.0), provenance={"config": FITTED})
    save(correction, "mine")
    save(tiny_correction(base, "shuffled-rewards", seed=2, tau=3.0), "mine/controls/shuffled-rewards")
    save(tiny_lora(base, "adapter"), "peft")
    (tmp_path / "peft" / "correction.json").unlink()
    return tmp_path


def run(arguments: str) -> int:
    """As the shell runs it: what a report says of its own command is read from the process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trimtab", *arguments.split()])
        return main(arguments.split())


LADDER = "eval --correction mine --ladder --lora peft --problems 4 --out kept"


@pytest.mark.usefixtures("folder")
def test_a_ladder_is_printed_and_kept(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (Path("other.txt")).write_text("Some other text. " * 100)
    assert run(f"{LADDER} --json --text other.txt") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(Path("kept/report.json").read_text())
    assert (report["benchmark"], report["model"], len(report["rows"])) == ("ladder", "tiny-llama", 14)
    assert report["text"]["file"] == "other.txt"
    assert len(report["text"]["sha256"]) == 64
    assert report["machine"]["command"] == f"trimtab {LADDER} --json --text other.txt"
    assert {"report.md", "report.json", "ladder.svg", "completions"} == {path.name for path in Path("kept").iterdir()}
    monkeypatch.setattr(Core, "step", None)
    assert run(LADDER) == 0
    shown = capsys.readouterr().out
    assert "| lora-gated | " in shown
    assert shown.rstrip("\n") == Path("kept/report.md").read_text().rstrip("\n")
    assert run(f"{LADDER} --seed 1") == 1
    assert "holds completions made with " in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_an_eval_with_out_goes_on_where_it_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("eval --correction mine --problems 4 --out kept") == 0
    first = capsys.readouterr().out
    assert "of the fit's own report" not in first, "it has none"
    monkeypatch.setattr(Core, "step", None)
    assert run("eval --correction mine --problems 4 --out kept") == 0
    assert capsys.readouterr().out == first


@pytest.mark.usefixtures("folder")
def test_problems_that_were_learned_from_are_not_judged_on(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"id": f"h{i}", "prompt": f"Another {i}:", "answer": None}) for i in range(8)]
    Path("test.jsonl").write_text("\n".join(lines))
    config = FITTED | {"held_out": "test.jsonl", "problems": 50, "validation_problems": 10}
    save(dataclasses.replace(load("mine"), provenance={"config": config}), "mine")
    assert run("eval --correction mine --task ./task.jsonl --problems 4 --samples 1 --json") == 0
    assert json.loads(capsys.readouterr().out)["task"] == "task.jsonl + test.jsonl", "as fitted"
    Path("copy.jsonl").write_bytes(Path("task.jsonl").read_bytes())
    given = "--task copy.jsonl --verifier odd_grading:odd --problems 4 --samples 1"
    for command in (f"eval --correction mine {given}", f"analyze tiny mine {given}"):
        assert run(command) == 1
        assert "4 of the 4 problems are no held-out ones: mine was fitted" in capsys.readouterr().err
    assert run("eval --correction mine --task test.jsonl --verifier odd_grading:odd --problems 2 --samples 1") == 0
    Path("task.jsonl").rename("gone.jsonl")
    assert run(f"eval --correction mine {given}") == 0
    assert "was not checked: it does not list its own, and task.jsonl is not here" in capsys.readouterr().err
    learned = [digest_of(problem) for problem in load_task("copy.jsonl", "odd_grading:odd").problems("held-out", 4)]
    save(dataclasses.replace(load("mine"), provenance={"config": config, "learned": learned}), "mine")
    assert run(f"eval --correction mine {given}") == 1
    assert "problems are no held-out ones: mine was fitted" in capsys.readouterr().err
    save(dataclasses.replace(load("mine"), name="clean", provenance={"config": config, "learned": []}), "clean")
    for other in ("--also mine", "--lora mine"):
        assert run(f"eval --correction clean --ladder {other} {given}") == 1
    assert "problems are no held-out ones: mine was fitted" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--strength inf", "strength must be a finite number, not inf"),
        ("--out mine", "mine holds a correction, with a report of its own: choose another --out"),
    ],
)
def test_what_an_eval_cannot_do_is_refused_before_it_begins(
    capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    assert run(f"eval --correction mine --problems 2 {given}") == 1
    assert message in capsys.readouterr().err
    assert not Path("mine/completions").exists()


@pytest.mark.usefixtures("folder")
def test_two_processes_do_not_write_to_one_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with keep_in(Path("kept")):
        assert run("eval --correction mine --problems 2 --out kept") == 1
        assert "another process writes to kept" in capsys.readouterr().err
    with keep_in(Path("kept")) as folder:
        assert folder == Path("kept/completions")


@pytest.mark.usefixtures("folder")
def test_calibrate_writes_the_table_that_a_rate_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    before = load("mine")
    assert run("calibrate mine --problems 12 --samples 2 --rates 0.2 0.5 0.8") == 0
    shown = capsys.readouterr().out
    assert "mine: entropy > 3 nats, which is open at " in shown
    after = load("mine")
    assert isinstance(before, HeadCorrection)
    assert isinstance(after, HeadCorrection)
    assert len(after.gate.calibration) == 3
    assert all(f"{tau:.5g}" in shown for _, tau in after.gate.calibration)
    assert after.gate.tau == before.gate.tau
    assert torch.equal(after.A, before.A)
    assert after.provenance["calibration"]["prompts"] == 12
    Path("prompts.txt").write_text("Why?\nHow?\n")
    save(dataclasses.replace(load("mine"), report={"of": "the gate before"}), "mine")
    Path("mine/report.md").write_text("of the gate before")
    assert run("calibrate mine --prompts prompts.txt --rate 0.3 --gate margin") == 0
    assert load("mine").report is None
    assert not Path("mine/report.md").exists()
    gate = load("mine").gate
    assert gate.kind == "margin"
    assert -1 < gate.tau < 0


@pytest.mark.usefixtures("folder")
def test_a_peft_folder_becomes_a_gated_correction_of_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("calibrate peft --rate 0.3 --gate entropy") == 1
    assert "does not say which model it was made for: give --model" in capsys.readouterr().err
    arguments = "calibrate peft --rate 0.3 --gate entropy --model tiny --task task.jsonl --verifier odd_grading:odd"
    assert run(f"{arguments} --problems 8 --max-tokens 8 --temperature 1") == 0
    lora = load("peft")
    assert (lora.tier, lora.gate.kind, lora.base) == ("lora", "entropy", tiny_base().identity)
    assert lora.gate.tau_for(0.3) == pytest.approx(lora.gate.tau, abs=0.5)


@pytest.mark.usefixtures("folder")
def test_analyze_takes_a_correction_a_peft_folder_or_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    what = "--task task.jsonl --verifier odd_grading:odd --max-tokens 6 --temperature 1 --problems 3 --taus 3"
    assert run(f"analyze tiny peft {what} --out study --json") == 0
    study = json.loads(capsys.readouterr().out)
    assert study == json.loads(Path("study/report.json").read_text())
    assert (study["benchmark"], study["tuned"]) == ("analyze", "peft")
    for tuned in ("mine", "another"):
        assert run(f"analyze tiny {tuned} {what}") == 0
        assert f"{tuned} against tiny-llama: 3 held-out problems of task.jsonl" in capsys.readouterr().out
    assert run("analyze tiny mine --problems 2 --samples 1 --taus 3") == 0
    assert "mine against tiny-llama: 2 held-out problems of task.jsonl" in capsys.readouterr().out, "as fitted"


@pytest.mark.usefixtures("folder")
def test_mistakes_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.txt").write_text("A text of one line.")
    always = dataclasses.replace(load("mine"), gate=Gate("always"))
    save(always, "always")
    for arguments, words in {
        "calibrate mine --gate margin": "--gate margin needs --rate",
        "calibrate mine --rate 1.5": "rate must be above 0 and below 1",
        "calibrate mine --gate sometimes --rate 0.1": "gate.kind must be one of",
        "calibrate always": "mine's gate is always",
        "calibrate mine --prompts gone.txt": "gone.txt: cannot be read",
        "eval --correction mine --ladder --lora mine --problems 2": "is of the tier head: give it with --also",
        "eval --correction mine --lora peft --problems 2": "--lora is of the ladder: add --ladder",
        "eval --correction mine --few-shot 2 --problems 2": "--few-shot is of the ladder: add --ladder",
        "eval --correction mine --problems 2 --text gone.txt": "--text gone.txt: cannot be read",
        "eval --correction mine --problems 2 --text short.txt --out none": "the text has 19 tokens: give 514 or more",
        "eval --correction always --problems 2 --tau 1": "tau cannot be set: mine's gate is always open",
        "eval --correction always --problems 2 --tau 1 --ladder": "tau cannot be set: mine's gate is always open",
        "analyze tiny mine --gate sometimes --problems 2": "gate.kind must be one of",
    }.items():
        assert run(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("trimtab: ") or "\ntrimtab: " in error
        assert words in error.splitlines()[-1]
    assert not Path("none", "completions").exists(), "a text is looked at before anything is sampled"
    for command in ("eval --correction mine", "analyze tiny mine"):
        with pytest.raises(SystemExit):
            run(f"{command} --problems 1")
        assert "--problems: must be at least 2, not 1" in capsys.readouterr().err
