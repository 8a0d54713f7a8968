"""What a user can get wrong in a fit ends in one line that says where, and leaves no correction behind."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.cli import main
from trimtab.server.model import base as base_module
from trimtab.server.model.base import Base
from trimtab.steering.training import distil as distil_module
from trimtab.steering.training import fit as fit_module
from trimtab.steering.training import lora as lora_module

SMALL = (
    "--temperature 1.0 --max-tokens 4 --problems 10 --samples 3 --rank 2 "
    "--validation-problems 2 --validation-samples 1 --test-problems 2 --slots 16"
)
HEAD = "--top-k 5 --batch 32 --epochs 2"
GRADING = """
def odd(completion, answer): return sum(map(ord, completion)) % 2
def never(completion, answer): return 0
def always(completion, answer): return 1
def loud(completion, answer): return 3
def broken(completion, answer): return answer['gone']
"""
GOOD: list[Any] = [{"id": i, "prompt": f"Line {i}:", "answer": "1"} for i in range(40)]
LORA = "--lora-targets down_proj --lora-batch 4 --lora-warmup 1"


@pytest.fixture
def fit(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a fit that must fail; -> the line that says why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base_module, "load_base", lambda *_: base)
    (tmp_path / "bad_input_grading.py").write_text(GRADING)

    def run(lines: list[Any], options: str) -> str:
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "task.jsonl").write_text("\n".join(text))
        tier = "" if "--tier lora" in options else HEAD
        assert main(f"fit --out bad --task task.jsonl {SMALL} {tier} {options}".split()) == 1
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err + shown.out
        assert not list(tmp_path.glob("bad/*.*")), "nothing but the work"
        last = shown.err.rstrip("\n").split("\n")[-1]
        assert last.startswith("trimtab: ")
        return last

    return run


@pytest.mark.parametrize(
    ("line", "verifier", "words"),
    [
        ('{"id": 1, "prompt": "a"', "exact", "task.jsonl, line 8: is not JSON"),
        ({"id": "x", "prompt": "a"}, "exact", "task.jsonl, line 8: answer is missing"),
        ({"id": 0, "prompt": "a", "answer": 1}, "exact", "task.jsonl, line 8: id '0' was used before"),
        ({"id": "x", "prompt": "a", "answer": ""}, "math", "task.jsonl, line 8: answer is not a number or formula"),
        ({"id": "x", "prompt": "a", "answer": "["}, "regex", "task.jsonl, line 8: answer is not a regular expression"),
    ],
)
def test_a_bad_line_is_named(fit: Callable[..., str], line: Any, verifier: str, words: str) -> None:
    assert words in fit([*GOOD[:7], line], f"--verifier {verifier}")


@pytest.mark.parametrize(
    ("grading", "words"),
    [
        ("never", "0 of 10 problems (0%) are usable, and fitting needs 4: 10 were never solved and 0 always"),
        ("always", "0 of 10 problems (0%) are usable, and fitting needs 4: 0 were never solved and 10 always"),
        ("loud", "verifier 'bad_input_grading:loud' returned 3.0: it must return 0 to 1"),
        ("broken", "verifier 'bad_input_grading:broken' failed on"),
        ("gone", "verifier 'bad_input_grading:gone' cannot be imported"),
    ],
)
def test_rewards_that_teach_nothing_and_verifiers_that_fail_are_named(
    fit: Callable[..., str], grading: str, words: str
) -> None:
    assert words in fit(GOOD, f"--verifier bad_input_grading:{grading}")


def nan(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with no number for a result."""

    def spoiled(*arguments: Any) -> Any:
        found = function(*arguments)
        return found._replace(likelihood=found[0] * float("nan")) if isinstance(found, tuple) else found * float("nan")

    return spoiled


@pytest.mark.parametrize(
    ("options", "module", "function", "words"),
    [
        ("", fit_module, "loss", "the loss is no number by step 1: lower --learning-rate"),
        (f"--via lora {LORA}", distil_module, "_divergence", "is no number in epoch 1: lower --learning-rate"),
        (f"--via lora {LORA}", lora_module, "objective", "the LoRA's loss is no number at step 1 of"),
        (f"--tier lora {LORA}", lora_module, "objective", "the LoRA's loss is no number at step 1 of"),
    ],
)
def test_a_loss_that_is_no_number_ends_the_fit(
    fit: Callable[..., str], monkeypatch: pytest.MonkeyPatch, options: str, module: Any, function: str, words: str
) -> None:
    monkeypatch.setattr(module, function, nan(getattr(module, function)))
    assert words in fit(GOOD, f"--verifier bad_input_grading:odd {options}")


LONG = [*GOOD[:30], *({**line, "prompt": line["prompt"] * 80} for line in GOOD[30:])]
TWICE = [*GOOD[:-1], {**GOOD[0], "id": "39"}]


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (
            GOOD,
            f"--via lora {LORA} --lora-targets o_proj nothere",
            "lora_targets nothere is no linear layer inside the decoder of tiny-ll",
        ),
        (GOOD, f"--tier lora {LORA} --lora-targets lm_head", "lora_targets lm_head is no linear layer inside the dec"),
        (GOOD, "--temperature 200", "temperature must be at most 100, not 200.0"),
        (GOOD, f"--tier lora {LORA} --lora-targets mlp", "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj"),
        (GOOD, "--name shuffled-rewards", "name shuffled-rewards is a control's: give another --name"),
        (GOOD, "--name contrast", "name contrast is the built-in correction's name: give another --name"),
        (GOOD, "--keep-problems 3", "keep_problems must be 0, which is all, or at least 4, not 3"),
        (
            TWICE,
            "",
            "to choose on have the prompt of one to learn from, as task.jsonl, line 40: problem '39' that of '0'",
        ),
        (LONG, "--problems 7", "task.jsonl, line 40: problem '39', to choose on, has 640 tokens; tiny-llama takes 512"),
    ],
)
def test_what_would_end_the_fit_late_is_found_before_anything_is_sampled(
    fit: Callable[..., str], lines: list[Any], options: str, words: str
) -> None:
    assert words in fit(lines, f"--verifier bad_input_grading:odd {options}")
    assert not Path("bad/run").exists()


def test_a_held_out_problem_that_is_too_long_is_found_first(fit: Callable[..., str]) -> None:
    Path("long.jsonl").write_text(
        json.dumps({"id": "a", "prompt": "b", "answer": 1})
        + "\n"
        + json.dumps({"id": "x", "prompt": "c" * 600, "answer": 1})
    )
    words = "long.jsonl, line 2: problem 'x', to judge on, has 600 tokens; tiny-llama takes 512: shorten it"
    assert words in fit(GOOD, "--verifier bad_input_grading:odd --held-out long.jsonl")
    assert not Path("bad/run").exists()


def test_a_verifier_edited_under_a_run_scores_again_what_is_there(
    fit: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless something was learned from other rewards: then it is refused."""
    path, options = Path("edited_grading.py"), "--verifier edited_grading:grade"

    def edit(reward: str) -> None:
        path.write_text(f"def grade(completion, answer): return {reward}")
        monkeypatch.delitem(sys.modules, "edited_grading", raising=False)  # as in another process
        importlib.invalidate_caches()

    edit("0")
    fit(GOOD, options)
    kept = Path("bad/run/rollouts/00000.jsonl").read_text()
    edit("sum(map(ord, completion)) % 2")
    main(f"fit --out bad --task task.jsonl {SMALL} {HEAD} {options}".split())
    assert "has changed: the completions that are there count anew" in capsys.readouterr().err
    scored = [json.loads(line) for line in Path("bad/run/rollouts/00000.jsonl").read_text().splitlines()]
    assert {r["reward"] for r in scored} == {0.0, 1.0}
    assert [r | {"reward": 0.0} for r in scored] == [json.loads(line) for line in kept.splitlines()]
    assert list(Path("bad/run/features").iterdir())
    edit("(sum(map(ord, completion)) + 0) % 2")
    main(f"fit --out bad --task task.jsonl {SMALL} {HEAD} {options}".split())
    assert "count anew" in capsys.readouterr().err, "the rewards are the same"
    edit("1")
    assert main(f"fit --out bad --task task.jsonl {SMALL} {HEAD} {options}".split()) == 1
    assert "has changed since bad/run was begun, and with it rewards that were learned from" in capsys.readouterr().err
