"""Corrections from stores: what fsspec reads, fetched whole; what is not there, said by its URL."""

from pathlib import Path

import fsspec
import pytest

from tiny import tiny_base, tiny_correction
from trimtab.errors import InvalidRequest
from trimtab.server.sources import read_named
from trimtab.steering.folder import save, version_of

BASE = tiny_base()


def test_a_store_is_read_as_a_folder_is(tmp_path: Path) -> None:
    made = tiny_correction(BASE, "mine")
    save(made, tmp_path / "mine")
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "mine"), "/bucket/mine", recursive=True)
    read = read_named("memory://bucket/mine", "renamed", None)
    assert (read.name, version_of(read)) == ("renamed", version_of(made))


@pytest.mark.parametrize("url", ["memory://bucket/none", "nothing-like-it://bucket/mine", "://"])
def test_what_is_not_there_is_said_by_its_url(url: str) -> None:
    with pytest.raises(InvalidRequest, match=url) as refused:
        read_named(url, None, None)
    assert refused.value.field in ("path", "correction")


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "a" * 5000, "a\0b", "", " "])
@pytest.mark.parametrize("rooted", [False, True])
def test_a_path_that_can_be_none_is_a_mistake_of_the_callers(path: str, rooted: bool, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_named(path, None, tmp_path if rooted else None)
    assert refused.value.field == "path"


def test_a_root_leaves_no_way_around_it(tmp_path: Path) -> None:
    save(tiny_correction(BASE, "mine"), tmp_path / "outside")
    (tmp_path / "root").mkdir()
    for path in (f"file://{tmp_path}/outside", "../outside", f"{tmp_path}/outside"):
        with pytest.raises(InvalidRequest):
            read_named(path, None, tmp_path / "root")
