"""What the commands share: how `--help` reads, what an option's text means, and how what goes wrong is said."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError

Subparsers = Any  # argparse's own type is private

LESS_MEMORY = "lower --slots or --max-tokens (serve: --max-num-seqs or --max-model-len)"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of what has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default in ([], "")
        return action.help if silent else super()._get_help_string(action)


def explain(error: Exception) -> str | None:
    """A caller's mistake, or what this machine lacks, in one line; None for a fault of ours."""
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("trimtab"):
        package = (error.name or "").partition(".")[0]
        extra = {"peft": "train", "opentelemetry": "otel"}.get(package, "server")
        return f"{error.name} is not installed: in Trimtab's checkout, pip install '.[{extra}]'"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return f"out of memory: {str(error).partition('. ')[0]}; {LESS_MEMORY}"
    if isinstance(error, OSError):  # a full disk, a folder that may not be written to
        words = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return " ".join(words.split())
    return " ".join(str(error).split()) if isinstance(error, TrimtabError) else None


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type for argparse, which names the flag that has another value."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {value}")
        return value

    return number


def split_named(item: str) -> tuple[str, Path]:
    """[NAME=]DIR: (name or nothing, folder). A folder that is there may have a = in its name."""
    name, separator, folder = ("", "", item) if Path(item).is_dir() else item.partition("=")
    return (name, Path(folder)) if separator else ("", Path(item))
