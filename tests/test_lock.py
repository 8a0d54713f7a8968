"""A folder is held by one process at a time, and what is no folder is refused by name."""

import errno
import fcntl
from pathlib import Path

import pytest

from trimtab.errors import InvalidRequest
from trimtab.steering.training.lock import hold


def test_a_folder_is_made_and_held_until_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for _ in range(2):
        with hold(out):
            assert out.is_dir()
            with pytest.raises(InvalidRequest, match=f"another process writes to {out}"), hold(out):
                raise AssertionError("unreachable")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for out in (tmp_path / "out", tmp_path / "out" / "deep"):
        with pytest.raises(InvalidRequest, match=f"out must be a folder: {out} cannot be made") as caught, hold(out):
            raise AssertionError("unreachable")
        assert caught.value.field == "out"


def test_a_file_system_without_locks_is_not_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(InvalidRequest, match=r"can be locked: .*Operation not supported"), hold(tmp_path):
        raise AssertionError("unreachable")
