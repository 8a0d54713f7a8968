"""What the commands share: how `--help` reads, and what an option's text means."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

Subparsers = Any  # argparse's own type is private


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of what has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default in ([], "")
        return action.help if silent else super()._get_help_string(action)


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
