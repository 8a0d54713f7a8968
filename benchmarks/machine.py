"""What a figure was measured on: every benchmark prints this with its figures, and puts it in its JSON line."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("trimtab", "torch", "transformers", "triton", "httpx")


def describe() -> dict[str, Any]:
    """Hardware, versions, command and time of this process."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def card(machine: dict[str, Any], **facts: Any) -> str:
    """The same for people, with further facts, a line each."""
    versions = " ".join(f"{name} {found}" for name, found in machine["versions"].items())
    lines = {"hardware": hardware(machine), "system": machine["system"], "versions": versions, **facts}
    return "\n".join(f"{name:>16}  {value}" for name, value in lines.items())


def hardware(machine: dict[str, Any]) -> str:
    """In a few words."""
    return f"{machine['cpu']}, {machine['cores']} cores" + (f"; {machine['gpu']}" if machine["gpu"] else "")


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
