"""Which files a verifier is made of, so that a resumed run notices an edited one."""

import hashlib
import sys
from pathlib import Path
from types import ModuleType


def digest(module: ModuleType | None) -> str | None:
    """Of a module's file, and of those beside it that its names come from. None where there is no file."""
    files = _files(module)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:32] if files else None


def _files(module: ModuleType | None) -> list[Path]:
    """As far as they lie in the folder of the first; of what is installed, that one alone."""
    waiting, found = [module], dict[Path, None]()
    while waiting:
        one = waiting.pop()
        file = getattr(one, "__file__", None)
        path = None if file is None else Path(file)
        if path is None or path in found or (found and path.parent != next(iter(found)).parent):
            continue
        found[path] = None
        if "site-packages" not in path.parts:
            for value in vars(one).values():
                home = getattr(value, "__module__", None)
                waiting.append(value if isinstance(value, ModuleType) else sys.modules.get(str(home)))
    return sorted(found)
