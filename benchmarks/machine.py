"""What a figure was measured on: every benchmark prints this with its figures, and puts it in its JSON line."""

import argparse
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which model a benchmark of the engine loads, and how it runs here."""
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
