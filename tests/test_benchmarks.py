"""Benchmarks that a machine without a model or a GPU can run do run, at their smallest, and end in a line of JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


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


def test_a_beginning_is_read_once(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    found = run("prefix.py", str(model), "--chat", "80", "--rush", "4", "--beginning", "48", "--rounds", "1")
    computed = {row["case"]: row["computed"] for row in found["results"]}
    assert computed == {
        "chat, read first, off": 80,
        "chat, then c0": 32,
        "chat, then c1": 32,
        "chat, then off": 32,
        "4 at once, beginnings of their own": 4 * 80,
        "4 at once, one beginning": 48 + 4 * 32,
        "one request alone": 80,
    }
