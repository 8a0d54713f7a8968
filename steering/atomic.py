"""Files that are there whole or not at all: written beside their place, flushed to the disk, then renamed over it.

Invariant: a reader never sees half a file; a killed writer leaves the old one (or none) and at worst a `.tmp` beside
it; one that the disk had no room for leaves nothing. Every file of the trainer and the corrections goes through here.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from trimtab.errors import TaskError


def write_bytes(path: Path, content: bytes) -> None:
    """Make `path` hold `content`, durably; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    _flush_folder(path.parent)


def write_text(path: Path, content: str) -> None:
    """As write_bytes, in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """As write_bytes: readable JSON with a stable key order. NaN and infinity are bugs and raise."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """As read_json: what `write_tensors` left."""
    with intact(path):
        return load_file(path)


def read_json(path: Path) -> Any:
    """What `write_json` left. Raises TaskError for a file that something else cut or wrote over."""
    with intact(path):
        return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """As write_bytes, in the safetensors format."""
    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


@contextmanager
def intact(path: Path) -> Iterator[None]:
    """Raises TaskError, naming the file, where what is read in here is not what was written."""
    try:
        yield
    except (ValueError, TypeError, LookupError, SafetensorError) as error:
        raise TaskError(f"{path} is damaged ({error}): restore it, or delete it and what was made of it") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a library's own, in words alone
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def _flush_folder(folder: Path) -> None:
    """A rename is durable only when its folder is. Some file systems refuse this: then the rename is merely atomic."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
