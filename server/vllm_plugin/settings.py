"""Which corrections an engine has, and where it logs: from `--additional-config`, else from the environment.

    TRIMTAB_CORRECTIONS=DIR                  or NAME=DIR, or several, with , or : between; a DIR may hold folders
    TRIMTAB_RECEIPTS=FILE                    a line of JSON a step of a steered request; with {rank} in it, of each rank
    TRIMTAB_ANY_BASE=1                       a correction's base is not insisted on
    --additional-config '{"trimtab": {"corrections": {"NAME": "DIR"}, "receipts": "FILE", "any_base": true}}'

Invariant: Settings that exist name folders that are there. Ray copies few variables to its workers, so there it must
be `--additional-config`.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.arguments import split_named
from trimtab.errors import CorrectionError
from trimtab.steering.correction import HeadCorrection
from trimtab.steering.folder import JSON_FILE, holds_correction, load

KEY = "trimtab"  # in additional_config
CORRECTIONS, RECEIPTS, ANY_BASE = "TRIMTAB_CORRECTIONS", "TRIMTAB_RECEIPTS", "TRIMTAB_ANY_BASE"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one engine; every one of its processes reads the same."""

    folders: tuple[tuple[str, Path], ...]  # name, folder
    receipts: str | None = None
    any_base: bool = False

    def load(self) -> dict[str, HeadCorrection]:
        """The corrections by name. Raises CorrectionError for what vLLM cannot be steered by."""
        return {name: _load(name, folder) for name, folder in self.folders}


def read_settings(vllm_config: Any, environment: Mapping[str, str] = os.environ) -> Settings:
    """Raises CorrectionError, which names the key or variable."""
    given = getattr(vllm_config, "additional_config", None)
    given = given.get(KEY, {}) if isinstance(given, dict) else {}
    if not isinstance(given, dict) or given.keys() - {"corrections", "receipts", "any_base"}:
        raise CorrectionError(f"additional_config.{KEY} may hold corrections, receipts and any_base, not {given!r}")
    if "corrections" in given:
        where, asked = f"additional_config.{KEY}.corrections", given["corrections"]
    else:
        where, asked = CORRECTIONS, environment.get(CORRECTIONS, "")
    folders = [found for name, folder in _split(asked, where) for found in _expand(name, folder, where)]
    names = [name for name, _ in folders]
    if not names:
        example = f'{CORRECTIONS}=DIR, or --additional-config \'{{"{KEY}": {{"corrections": "DIR"}}}}\''
        raise CorrectionError(f"the processor has no correction: set {example}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CorrectionError(f"{where}: two corrections are called {twice[0]}: give one another name, NAME=DIR")
    any_base = given.get("any_base", environment.get(ANY_BASE, "") not in ("", "0"))
    return Settings(tuple(folders), given.get("receipts") or environment.get(RECEIPTS) or None, bool(any_base))


def _split(asked: Any, where: str) -> list[tuple[str, Path]]:
    """(name or nothing, folder) of each item of a mapping, a list, or a text with commas or the system's separator."""
    if isinstance(asked, dict):
        items = [f"{name}={folder}" for name, folder in asked.items()]
    elif isinstance(asked, str):
        items = [item.strip() for item in asked.replace(os.pathsep, ",").split(",")]
    else:
        items = asked
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise CorrectionError(f"{where} must be a folder, a list of them or a mapping of names to them, not {asked!r}")
    return [split_named(item) for item in items if item]


def _expand(name: str, folder: Path, where: str) -> list[tuple[str, Path]]:
    """The folder itself, or those in it where it holds no correction."""
    if not folder.is_dir():
        raise CorrectionError(f"{where}: there is no folder {folder}")
    if holds_correction(folder):
        return [(name or folder.resolve().name, folder)]
    inside = [(path.name, path) for path in sorted(folder.iterdir()) if path.is_dir() and holds_correction(path)]
    if name or not inside:
        raise CorrectionError(f"{where}: {folder} holds no {JSON_FILE}: is it a correction's folder?")
    return inside


def _load(name: str, folder: Path) -> HeadCorrection:
    correction = load(folder)
    if isinstance(correction, HeadCorrection):
        return dataclasses.replace(correction, name=name)
    instead = {
        "lora": "vLLM serves a LoRA that is always on by itself (--enable-lora --lora-modules); behind a gate, "
        "trimtab serve does",
        "contrast": "a contrast runs a second row, which vLLM has no place for: trimtab serve has",
    }
    raise CorrectionError(f"{folder}: is of the tier {correction.tier}, and vLLM is steered by heads alone. "
                          f"{instead[correction.tier]}")  # fmt: skip
