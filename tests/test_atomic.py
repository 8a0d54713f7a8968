"""Files appear whole or not at all."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trimtab.errors import TaskError
from trimtab.steering import atomic
from trimtab.steering.training.clock import Clock
from trimtab.steering.training.journal import Journal


def test_content_comes_back_and_nothing_is_left_beside(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "a" / "x.json", {"é": [1, None]})
    atomic.write_tensors(tmp_path / "a" / "x.safetensors", {"t": torch.arange(6).view(2, 3).T})
    assert (tmp_path / "a" / "x.json").read_text(encoding="utf-8") == '{\n  "é": [\n    1,\n    null\n  ]\n}\n'
    assert load_file(tmp_path / "a" / "x.safetensors")["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["x.json", "x.safetensors"]


def test_a_writer_killed_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    atomic.write_text(path, "old")

    def killed(source: str, target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_text(path, "new")
    assert path.read_text() == "old"


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "x", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_with_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write_text(tmp_path / "x", "new")
    assert caught.value.filename == str(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_error_of_words_alone_keeps_them(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=re.escape(f"{tmp_path}: no number")) as caught, atomic.naming(tmp_path):
        raise OSError("no number")
    assert caught.value.errno is None


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"\0" * 16])
def test_a_file_that_something_else_cut_or_wrote_over_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kept"
    path.write_bytes(content)
    readers = [atomic.read_json, atomic.read_tensors, *([lambda path: Journal(path).read()] if content else [])]
    for read in readers:
        with pytest.raises(TaskError, match=rf"{re.escape(str(path))} is damaged .*: restore it, or delete it"):
            read(path)


def test_seconds_of_another_shape_are_named(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "timings.json", {})
    with pytest.raises(TaskError, match=r"timings\.json is damaged \('stages'\)"):
        Clock(tmp_path / "timings.json", "here")
