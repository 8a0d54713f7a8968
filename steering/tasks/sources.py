"""Which files a verifier is made of, so that a resumed run notices an edited one."""

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType


def digest(modules: Iterable[ModuleType | None]) -> str | None:
    """Of the modules' files, and of those beside each that it imports, wherever in it. None where there is no file."""
    files = _files(modules)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:32] if files else None


def _files(modules: Iterable[ModuleType | None]) -> list[Path]:
    """Of what is installed, the modules' own alone."""
    waiting = [Path(file) for module in modules if (file := getattr(module, "__file__", None))]
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [] if "site-packages" in path.parts else _imported(path)
    return sorted(found)


def _imported(path: Path) -> list[Path]:
    """Files beside a module's that may be what its imports name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # as of what is compiled
        return []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            told = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            names.update(part for name in told for part in name.split("."))
    beside = (path.with_name(f"{name}.py") for name in sorted(names) if name)
    return [file for file in beside if file.is_file()]
