"""Every kernel compiles for sm_80 and sm_90 without a GPU, and the compiler kept it in registers."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    """What the check reports, by kernel and target. In a process of its own: here triton may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-W", "error", "-m", "trimtab.kernels.compile_check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {(r["name"], r["target"]): r for r in json.loads(done.stdout.splitlines()[-1])}


def test_every_kernel_compiles_for_both_targets(compiled: dict[tuple[str, int], dict[str, Any]]) -> None:
    kernels = {name.split()[0] for name, _ in compiled}
    step, layers = {"stats", "finish", "tilt", "resolve"}, {"norm", "silu", "stream"}
    assert kernels == step | layers | {"attend", "combine", "chunk", "store"}
    assert {(name, 80) for name, _ in compiled} | {(name, 90) for name, _ in compiled} == set(compiled)
    assert all(r["registers"] > 16 and r["instructions"] > 100 for r in compiled.values())  # the tools' output was read


def test_nothing_spills(compiled: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert [r for r in compiled.values() if r["stack"] or r["spills"]] == []


def test_the_logits_are_read_sixteen_bytes_at_a_time(compiled: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert all(r["wide_loads"] for (name, _), r in compiled.items() if name.startswith("stats"))
