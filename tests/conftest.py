"""One torch thread for every test: two on busy cores can be a hundred times slower. No deadline. Shared fixtures.

Property tests look at other cases in every run, but under --hypothesis-profile=repeatable, where a change is judged.
"""

import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

from mocked import Both
from trimtab.clients import AsyncClient, Client, async_client, client

if TYPE_CHECKING:
    from trimtab.server.model.base import Base

torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("untimed")

LONGEST = ("test_readme", "test_fleet", "test_compile", "test_soak", "test_killed")  # files of minutes each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: beside them another process goes through all others, and neither waits at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def _hooks() -> Iterator[None]:
    """Whatever a test starts in this process, what nobody catches stays pytest's to hear of."""
    kept = sys.excepthook, threading.excepthook
    yield
    sys.excepthook, threading.excepthook = kept


@pytest.fixture(scope="module")
def base() -> "Base":
    """A tiny Llama. Where another one is wanted, the file has a `base` of its own."""
    from tiny import tiny_base  # transformers, which takes seconds: not for the clients' tests

    return tiny_base()


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Both:
    """Either client, whatever the environment says."""
    for name in ("TRIMTAB_BASE_URL", "TRIMTAB_API_KEY", "TRIMTAB_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    return Both(request.param)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that were asked for; none is slept."""
    taken: list[float] = []

    async def nap(seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=taken.append))
    monkeypatch.setattr(async_client, "asyncio", SimpleNamespace(sleep=nap))
    return taken
