"""The machine that figures were made on: every table, report and correction states it.

Invariant: describe() says the same for every process of one installation on one machine, so that equal runs make equal
files. Imports nothing heavy.

    machine = describe();  print(hardware(machine), versions(machine));  describe_run("trimtab")   # with command, time
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.server.model.base import Base

PACKAGES = ("trimtab", "torch", "transformers", "triton", "httpx")


def describe() -> dict[str, Any]:
    """Hardware and versions, as JSON values."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "architecture": platform.machine(),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def describe_run(*program: str) -> dict[str, Any]:
    """The same, with the command and the time of this process. program: what this process's arguments follow."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {"command": shlex.join([*program, *sys.argv[1:]]), "when": when, **describe()}


def hardware(machine: Mapping[str, Any]) -> str:
    """In a few words."""
    parts = [machine["cpu"], machine["architecture"], f"{machine['cores']} cores"]
    return ", ".join(parts) + (f"; {machine['gpu']}" if machine["gpu"] else "")


def device_of(base: "Base", threads: int) -> str:
    """What a model runs on: "cpu, float32, 1 threads"."""
    return f"{base.device.type}, {base.dtype}, {threads} threads".replace("torch.", "")


def ran_on(base: "Base", threads: int) -> str:
    """This machine, and what the model runs on."""
    return f"{hardware(describe())} ({device_of(base, threads)})"


def versions(machine: Mapping[str, Any]) -> str:
    """In a line."""
    return " ".join(f"{name} {found}" for name, found in machine["versions"].items())


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    return ", ".join(name for name in names if name) or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
