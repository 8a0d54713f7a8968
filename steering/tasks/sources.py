"""Which files a verifier is made of, so that a resumed run notices an edited one."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

_PYTHON = Path(sysconfig.get_path("stdlib"))


def digest(modules: Iterable[ModuleType | None]) -> str | None:
    """Of the modules' files, and of those beside each that it imports, wherever in it. None where there is no file."""
    files = _files(modules)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:32] if files else None


def _files(modules: Iterable[ModuleType | None]) -> list[Path]:
    """Python's own are left out; of other installed ones, these modules' alone are taken."""
    waiting = [Path(file) for module in modules if (file := getattr(module, "__file__", None))]
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        installed = any(part in path.parts for part in ("site-packages", "dist-packages"))
        if path in found or (path.is_relative_to(_PYTHON) and not installed):
            continue
        found.add(path)
        waiting += [] if installed else _imported(path)
    return sorted(found)


def _imported(path: Path) -> list[Path]:
    """Files beside a module's that may be what its imports name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # as of what is compiled
        return []
    found: list[Path] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            beside = _beside(path, names)
            if not beside and isinstance(node, ast.ImportFrom):  # else what it is imported from is a package
                beside = _beside(path, [node.module or ""])
            found += beside
    return found


def _beside(path: Path, names: Iterable[str]) -> list[Path]:
    files = (path.with_name(f"{name.rpartition('.')[2] or '-'}.py") for name in names)
    return [file for file in files if file.is_file()]
