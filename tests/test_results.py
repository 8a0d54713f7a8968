"""RESULTS.md from what was measured: each table states its command, its versions and its hardware."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trimtab.steering.machine import describe
from trimtab.steering.training.config import FitConfig

ROOT = Path(__file__).resolve().parent.parent
POLICY = {"by_kind": {}, "fired": 0.5, "flips": 0.1, "length": 9.0, "open": 0.5, "pass_at_1": 0.6, "truncated": 0.0}
REPORT: dict[str, Any] = {
    "task": "sums",
    "split": "held-out",
    "problems": 200,
    "sampling": {"samples": 2, "seed": 7, "temperature": 0.6, "top_p": 0.95, "max_tokens": 64},
    "interval": "95 %",
    "hardware": "a box (cpu, float32, 1 threads)",
    "correction": "mine",
    "strengths": {"correction": 1.0},
    "tau": 0.5,
    "gate": "entropy > 0.5 nats",
    "policies": [{"policy": "base", **POLICY}, {"policy": "correction", **POLICY}],
    "differences": [{"policy": "correction", "against": "base", "mean": 0.1, "low": 0.05, "high": 0.15}],
    "verdict": {"ship": True, "beats": {}, "summary": "+0.100 over the base"},
}
MACHINE = describe() | {"cpu": "Abacus 3000", "architecture": "wood64", "cores": 2, "gpu": None}
PAGES = ("README.md", "results/README.md")
MARKERS = "<!-- figures: written by benchmarks/results.py -->\n<!-- end of figures -->"


def read_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of benchmarks/."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as when it runs: tables.py lies beside it
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/results.py, writing to a folder of the test's."""
    module = read_benchmark("results", monkeypatch)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    for page in PAGES:
        (tmp_path / page).write_text(f"Before\n{MARKERS}\nAfter\n")
    return module


def write(results: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["results.py", *arguments])
    results.main()
    text: str = (results.ROOT / "RESULTS.md").read_text()
    return text


def test_what_the_repository_holds_is_what_its_results_say(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "results", tmp_path / "results", dirs_exist_ok=True)
    (tmp_path / "corrections").symlink_to(ROOT / "corrections")
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    assert write(results, monkeypatch) == (ROOT / "RESULTS.md").read_text()
    for page in PAGES:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    capacity = read_benchmark("capacity", monkeypatch)
    monkeypatch.setattr(capacity, "PAGE", tmp_path / "CAPACITY.md")
    capacity.main()
    assert (tmp_path / "CAPACITY.md").read_text() == (ROOT / "deploy" / "CAPACITY.md").read_text()


@pytest.mark.parametrize(
    ("known", "title"),
    [(0, "on 200 further problems"), (50, "on 200 problems, 50 of them in the fit's own report")],
)
def test_an_eval_is_a_table_of_its_own(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: int, title: str
) -> None:
    run = {"command": "trimtab eval --correction mine --json", "when": "2020-01-01T00:00:00+00:00", **MACHINE}
    facts = {"benchmark": "eval", "model": "tiny", "problems_of_the_fits_report": known, "machine": run}
    (tmp_path / "eval.json").write_text(json.dumps(REPORT | facts) + "\n")
    text = write(results, monkeypatch, str(tmp_path / "eval.json"))
    assert f"## The correction mine {title} (eval.json)\n" in text
    for words in ("`trimtab eval --correction mine --json`", "hardware: Abacus 3000, wood64, 2 cores", "seed: 7"):
        assert f"- {words}\n" in text or f": {words}\n" in text
    assert "| correction - base | +0.100 | [+0.050, +0.150] |" in text
    readme = (tmp_path / "results" / "README.md").read_text()
    assert "- `mine`, 200 held-out problems of `sums`; gate entropy > 0.5 nats; a box" in readme
    assert "(cpu, float32, 1 threads): +10.0 [5.0, 15.0] over the base\n" in readme


def test_a_fit_states_its_device_and_hardware(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    run = {"command": "trimtab eval --task else.jsonl", "when": "2020-01-01T00:00:00+00:00", **MACHINE}
    other = REPORT | {"benchmark": "eval", "model": "tiny", "problems_of_the_fits_report": 0, "machine": run}
    other |= {"task": "else.jsonl", "text": LADDER["text"]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    made = {"config": {"rank": 4, "seed": 7}, "device": "cuda", "dtype": "bfloat16", "threads": 2, "machine": MACHINE}
    fit = {"name": "mine", "base": {"model": "tiny"}, "tier": "head", "rank": 4, "top_k": FitConfig().top_k}
    fit |= {
        "strength": 1.0,
        "gate": {"kind": "entropy", "tau": 0.5, "ceiling": None},
        "provenance": made,
        "report": REPORT,
    }
    (folder / "correction.json").write_text(json.dumps(fit))
    text = write(results, monkeypatch, str(tmp_path / "other.json"), "--correction", str(folder))
    assert "--rank 4 --seed 7 --threads 2`\n" in text
    assert "- device: cuda, bfloat16, 2 threads\n- hardware: Abacus 3000, wood64, 2 cores\n" in text
    assert f"torch {MACHINE['versions']['torch']}" in text
    readme = (tmp_path / "results" / "README.md").read_text()
    assert "| tiny | A |\n|---|---|\n| base: % of answers right | 60.0 |\n| head: acts at % of steps | 50 |\n" in readme
    assert "| head minus base | +10.0 [5.0, 15.0] |\n" in readme
    assert "- A: `mine`, 200 held-out problems of `sums`; gate entropy > 0.5 nats; a box" in readme
    assert "- `mine`, 200 held-out problems of `else.jsonl`; gate entropy > 0.5 nats; a box" in readme
    assert "- its loss on 9 tokens of `wiki.txt`, minus the base's: +0.1000 [0.0000, 0.2000] nats a token" in readme


GAIN = {"policy": "head", "against": "base", "mean": 0.1, "low": 0.05, "high": 0.15}
ROW = {"k": 2, "samples": 2, "pass_at_k": 0.7, "majority": None, "marked": None, "kl_fired": 0.1, "kl_token": 0.05}
ROW |= POLICY | {"low": 0.55, "high": 0.65, "what": "it", "measured": True, "gain": GAIN, "problems": 300}
LADDER: dict[str, Any] = {
    "benchmark": "ladder",
    "task": "sums",
    "split": "held-out",
    "problems": 300,
    "problems_sha256": "abcd",
    "sampling": REPORT["sampling"],
    "hardware": "a box",
    "model": "tiny",
    "corrections": [{"name": "mine", "facts": "tier head, rank 4, gate entropy > 1 nats"}],
    "system": "",
    "rows": [
        ROW | {"policy": name, "role": role}
        for name, role in (("base", "base"), ("head", "tier"), ("head-greedy", "tier"))
    ],
    "differences": [GAIN],
    "shares": [],
    "matched": [],
    "verdict": ["head: +0.100"],
    "text": {"correction": "mine", "tokens": 9, "windows": 2, "fired": 0.5, "base": 2.0, "corrected": 2.1}
    | {"base_at_fired": 2.2, "corrected_at_fired": 2.4, "file": "wiki.txt", "sha256": "ef01"}
    | {"change": {"mean": 0.1, "low": 0.0, "high": 0.2}},
}
STUDY: dict[str, Any] = {
    **{name: LADDER[name] for name in ("task", "problems", "problems_sha256", "sampling", "hardware", "model")},
    "benchmark": "analyze",
    "tuned": "lora",
    "tokens": {
        "base": dict.fromkeys(("positions", "unshifted", "reranked", "shifted", "drawn_differently", "entropy"), 0.5)
        | dict.fromkeys(("mean_rank", "entropy_reranked", "entropy_ratio"))
    },
    "rules": [ROW | {"policy": name} for name in ("base", "tuned", "oracle")],
    "shares": [{"policy": "oracle", "of": "tuned", "mean": 0.9, "low": 0.5, "high": 1.2}],
}
SPREAD = {"median": 0.97, "low": 0.9, "high": 1.0}
TIERS = {
    "base": {"ms": 1.0, "tokens_s": 8.0, "of_base": SPREAD},
    "head": {"ms": 1.1, "tokens_s": 7.0, "of_base": SPREAD},
}
POOL: list[dict[str, Any]] = [
    {"policy": "base", "against": None, "pass@1": 0.5, "gain": None},
    {"policy": "head", "against": None, "pass@1": 0.6, "gain": None},
    {"policy": "head", "against": "base", "pass@1": None, "gain": {"mean": 0.1, "low": 0.05, "high": 0.15}},
]
MEASURED: dict[str, dict[str, Any]] = {
    "pool": {
        "benchmark": "pool",
        "model": "tiny",
        "correction": "mine",
        "problems": "600 of 2 ladders",
        "drawn on": "a box",
        "results": POOL,
    },
    "tiers": {"benchmark": "tiers", "model": "tiny", "device": "cpu", "results": [{"batch": 8, "tiers": TIERS}]},
    "kernels": {"benchmark": "kernels", "vocabulary": 9, "results": [{"rows": 1, "us": 3.14159, "span": SPREAD}]},
    "gsm8k": {"benchmark": "gsm8k", "problems": 660, "task_sha256": "cafe"},
    "fit_time": {
        "benchmark": "fit_time",
        "model": "tiny",
        "results": [{"what": "head", "positions": 9, "seconds": 1.5}],
        "fit": {"hardware": "a box", "stages": [["rollouts", 12.0]]},
    },
}


def test_all_that_lies_in_results_is_rendered(results: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = results.ROOT / "results"
    run = {"command": "trimtab something", "when": "2020-01-01T00:00:00+00:00", **MACHINE}
    for name, found in {"ladder/report": LADDER, "study/report": STUDY, **MEASURED}.items():
        path = folder / f"{name}{'.json' if 'report' in name else '.txt'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = found | {"machine": run}
        path.write_text(json.dumps(whole, indent=2) if "report" in name else f"for people\n{json.dumps(whole)}\n")
    (folder / "ladder" / "ladder.svg").write_text("<svg/>")
    (folder / "ladder" / "completions").mkdir()
    (folder / "ladder" / "completions" / "policy.json").write_text("{}")
    shown = write(results, monkeypatch)
    for words in (
        "## The ladder: mine, 300 problems of sums (results/ladder/report.json)\n",
        "![gains over the base](results/ladder/ladder.svg)",
        "- problems sha256: abcd\n- seed: 7\n",
        "| head | 0.600 [0.550, 0.650] | +0.100 [+0.050, +0.150] | 0.700 |",
        "The text: wiki.txt, sha256 ef01.",
        "## What tuning changed: lora (results/study/report.json)\n",
        "- oracle has 90% [50%, 120%] of the tuned model's gain.",
        "## What each tier costs: tiny (results/tiers.txt)\n",
        "| 8 | head | 1.10 | 7.0 | 0.970 [0.900, 1.000] |",
        "## How long fitting takes: tiny (results/fit_time.txt)\n",
        "| rollouts | 12.0 |",
        "## Kernels (results/kernels.txt)\n",
        "| 1 | 3.142 | 0.97 [0.9, 1] |",
        "## Task file: gsm8k (results/gsm8k.txt)\n\n- problems: 660\n- task_sha256: cafe\n",
    ):
        assert words in shown
    assert shown.count("- command: `trimtab something`") == 6
    readme = (results.ROOT / "results" / "README.md").read_text()
    for only_in_results in ("head-greedy", "oracle"):
        assert only_in_results in shown
        assert only_in_results not in readme
    assert "| head minus base | +10.0 [5.0, 15.0] |\n" in readme
    assert "| base minus" not in readme
    assert "- `lora` on tiny ranks another token first at 100.0 % of positions, at 50.0 % one" in readme
    assert "; its tokens give of its gain 90 % [50, 120] at just those places\n" in readme
    assert "| mine, 600 problems | 50.0 |  | +10.0 [5.0, 15.0] |  |  |  |  |  |\n\n- on a box\n" in readme
    assert "- A: `mine`, 300 held-out problems of `sums`; gate entropy > 1 nats; a box; problems abcd\n" in readme
    assert "| tokens/s, % of the base's, the gate open at every step | batch 8 |\n" in readme
    assert "| head | 97.0 [90.0, 100.0] |\n" in readme


def test_the_readme_shows_the_ladders_that_have_every_tier_by_the_same_letters(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"command": "trimtab eval --ladder", "when": "2020-01-01T00:00:00+00:00", **MACHINE}
    tiers = ("base-greedy", "contrast", "head", "lora-gated", "lora-always", "shuffled-rewards")
    whole = LADDER | {"differences": [GAIN | {"policy": policy} for policy in tiers], "machine": run}
    part = LADDER | {"problems_sha256": "ef", "machine": run}
    pools = [MEASURED["pool"] | {"correction": name, "machine": run} for name in ("mine", "other")]
    names = [str(tmp_path / f"{name}.json") for name in ("first", "second", "pool", "other")]
    for name, found in zip(names, (part, whole, *pools), strict=True):
        Path(name).write_text(json.dumps(found))
    shown = write(results, monkeypatch, *names)
    (readme, evidence) = ((tmp_path / page).read_text() for page in PAGES)
    assert "| tiny | A | B |\n" in evidence
    assert "|  | B |\n|---|---|\n| base: % of answers right | 60.0 |\n| head: acts at % of steps | 50 |\n" in readme
    assert "| LoRA, always on | +10.0 [5.0, 15.0] |\n" in readme
    assert "| control: a head from shuffled rewards | +10.0 [5.0, 15.0] |\n" in readme
    assert "- B: tiny; `mine`, 300 held-out problems of `sums`; gate entropy > 1 nats; a box; problems abcd\n" in readme
    assert "\n- mine, 600 problems of several such runs: head minus base +10.0 [5.0, 15.0]; base-greedy minus" in readme
    assert "other, 600 problems" not in readme
    for name in ("first", "second"):
        assert f"- [The ladder: mine, 300 problems of sums ({name}.json)]" in shown
        assert f"(#the-ladder-mine-300-problems-of-sums-{name}json)\n" in shown
