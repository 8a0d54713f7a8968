"""What a figure was measured on: every benchmark prints this with its figures, and puts it in its JSON line."""

import sys
from typing import Any

from trimtab.steering.machine import describe_run, hardware, versions


def describe() -> dict[str, Any]:
    """Hardware, versions, command and time of this process."""
    return describe_run("python", sys.argv[0])


def card(machine: dict[str, Any], **facts: Any) -> str:
    """The same for people, with further facts, a line each."""
    lines = {"hardware": hardware(machine), "system": machine["system"], "versions": versions(machine), **facts}
    return "\n".join(f"{name:>16}  {value}" for name, value in lines.items())
