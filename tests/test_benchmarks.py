"""Benchmarks that a machine without a model or a GPU can run do run, at their smallest, and end in a line of JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from killing import FIT, prepare

from tiny import read_states, tiny_base, tiny_lora, tiny_model, tiny_tokenizer
from trimtab.server.model.base import load_base
from trimtab.steering.adapter import adapter_files
from trimtab.steering.atomic import write_bytes
from trimtab.steering.training.teacher import adapt

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *arguments: str, folder: Path = ROOT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        call(str(ROOT / "benchmarks" / name), *arguments, folder=folder).splitlines()[-1]
    )
    return found


def call(*arguments: str, folder: Path) -> str:
    """What Python prints, run in the folder."""
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_engines_on_random_weights() -> None:
    sizes = [
        "--shapes",
        "tiny",
        "--compare",
        "tiny",
        "--batches",
        "2",
        "--prompt",
        "8",
        "--steps",
        "2",
        "--rounds",
        "1",
    ]
    found = run("engine.py", *sizes, "--device", "cpu")
    assert found["off_rows_identical"] is True
    (row,) = found["results"]
    assert all(row["ms"][kind] > 0 for kind in ("off", "on", "on 256"))


def test_the_hosts_work_on_a_device_that_takes_no_time() -> None:
    found = run("host.py", "--rows", "2", "--tokens", "4", "--steps", "2", "--rounds", "1", "--step", "1")["results"]
    alone, *served = found
    assert all(value > 0 for value in alone.values() if isinstance(value, float))
    assert {row["what"] for row in served} == {
        "streamed",
        "streamed, steered",
        "streamed, receipts",
        "whole, steered",
    }
    assert all(row["tokens/s"] > 0 for row in served)


def test_the_kernels_benchmark_asks_for_what_a_step_takes() -> None:
    """All of it that needs no GPU."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import kernels; print(kernels.row_params(3, True, 1, 1, 'cpu'))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "noise=tensor([" in run.stdout, run.stderr


def test_a_beginning_is_read_once(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    found = run("prefix.py", str(model), "--chat", "80", "--rush", "4", "--beginning", "96", "--rounds", "1")
    computed = {row["case"]: row["computed"] for row in found["results"]}
    assert computed == {
        "chat, read first, off": 80,
        "chat, then c0": 32,
        "chat, then c1": 32,
        "chat, then off": 32,
        "4 at once, beginnings of their own": 4 * 128,
        "4 at once, one beginning": 96 + 4 * 32,
        "one request alone": 128,
    }


def test_gates_variants_and_answers_of_a_finished_fit(tmp_path: Path) -> None:
    prepare(tmp_path)
    call("-m", "trimtab.cli", *FIT.split(), "--out", "fit", folder=tmp_path)
    (tmp_path / "fit/run/report/teacher/00000.jsonl").rename(tmp_path / "fit/run/report/teacher/00000.journal")
    told = ["fit/run/report", "--timings", "fit/run/timings.json", "--tokens"]
    for tokens, share in (("5", 1.0), ("0", 0.0)):
        direct = run("direct.py", *told, tokens, folder=tmp_path)
        assert {row["policy"] for row in direct["results"]} >= {"base", "correction", "shuffled-rewards"}
        assert {row["at_once"] for row in direct["results"]} == {share}
        assert direct["not answered whole"] == "teacher"
        (greedy,) = (row for row in direct["results"] if row["policy"] == "correction-greedy")
        assert greedy["against"] == "base-greedy"
        empty = "gain_where_it_reasoned" if share else "gain_where_that_was_at_once"
        assert greedy[empty] is None
        assert greedy["gain"] is not None
    for name, skip in (("one", "0"), ("two", "2")):
        ladder = ["eval", "--correction", "fit", "--ladder", "--problems", "2", "--skip", skip, "--out", name]
        call("-m", "trimtab.cli", *ladder, folder=tmp_path)
    pooled = run("pool.py", "fit", "one/completions", "two/completions", folder=tmp_path)
    assert pooled["problems"] == "4 of 2 ladders"
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    rates = [{row["policy"]: row["pass_at_1"] for row in report["rows"]} for report in reports]
    means = {row["policy"]: row["pass@1"] for row in pooled["results"] if row["against"] is None}
    assert means == {name: sum(rate[name] for rate in rates) / 2 for name in means}
    gains = {(r["policy"], r["against"]): r["gain"]["mean"] for r in pooled["results"] if r["against"] is not None}
    assert gains["head", "base"] == means["head"] - means["base"]
    few = ["fit", "--problems", "3", "--samples", "2"]
    gates = run("gates.py", *few, "--taus", "0.5", "2.5", "--kl", "0.01", folder=tmp_path)["results"]
    assert [row["tau"] for row in gates] == [0.5, 2.5]
    assert gates[0]["fired"] > gates[1]["fired"] > 0
    variants = run("variants.py", *few, "--online", "--kl", "0.01", folder=tmp_path)["results"]
    assert all(row["strength"] > 0 for row in variants if "pass_at_1" in row)
    assert variants[0]["parameters"] == min(row["parameters"] for row in variants)


def test_two_rounds_of_a_lora_are_one(tmp_path: Path) -> None:
    """Stacked on the base, as the second on the base that the first was merged into."""
    model, merged, both = (str(tmp_path / name) for name in ("model", "merged", "both"))
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    for folder, seed in ((first, 1), (second, 2)):
        for name, content in adapter_files(tiny_lora(tiny_base(), seed=seed, size=0.1).adapter).items():
            write_bytes(Path(folder) / name, content)
    script = str(ROOT / "benchmarks" / "second_round.py")
    call(script, "merge", model, first, "--dtype", "float32", "--out", merged, folder=tmp_path)
    call(script, "stack", first, second, "--out", both, folder=tmp_path)
    states = [
        read_states(adapt(load_base(base, "float32"), Path(lora)), [5, 6, 7])
        for base, lora in ((model, both), (merged, second), (model, first), (model, second))
    ]
    assert torch.allclose(states[0], states[1], rtol=1e-4, atol=1e-4)
    for one_alone in states[2:]:
        assert not torch.allclose(states[0], one_alone, rtol=1e-2, atol=1e-2)
