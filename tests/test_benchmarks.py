"""Benchmarks that a machine without a model or a GPU can run do run, at their smallest, and end in a line of JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
