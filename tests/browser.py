"""Headless Chromium for tests of the page, and an engine that takes its time.

with chromium() as browser, visit(browser, url) as visit: visit.page.click(...)

Invariant: a visit fails on an error in the console, and on a request to any host but the page's own.
"""

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from scripted import ScriptedEngine, event, ids
from trimtab.server.engine.event import Event, Receipt
from trimtab.server.engine.request import Request as EngineRequest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "Chromium is not installed: the page is tested in a real one (apt-get install chromium)"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE = 30_000  # ms, for a busy machine


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own, which is gone afterwards."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """An open page and what went wrong on it. allowed: parts of console messages that a test provokes."""

    page: Page
    url: str
    allowed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", self._read)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._follow)

    def _read(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(part in message.text for part in self.allowed):
            self.errors.append(message.text)

    def _follow(self, request: Request) -> None:
        if not request.url.startswith(("data:", "blob:")) and urlsplit(request.url)[:2] != urlsplit(self.url)[:2]:
            self.foreign.append(request.url)


@contextmanager
def visit(browser: Browser, url: str, allowed: Sequence[str] = (), **options: Any) -> Iterator[Visit]:
    """The page, opened. options: of the browser's context."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
    context.set_default_timeout(PATIENCE)
    visited = Visit(context.new_page(), url, list(allowed))
    visited.watch()
    visited.page.goto(url)
    try:
        yield visited
        assert not visited.errors, visited.errors
        assert not visited.foreign, visited.foreign
    finally:
        context.close()


def receipt(entropy: float, **fields: Any) -> Receipt:
    """Of a step where nothing acted, unless fields say otherwise."""
    shut = Receipt(entropy, False, False, 65, 65, -0.5, -0.5, -0.5, -0.5, entropy, 0.0, 0.0)
    return shut._replace(**fields)


class PacedEngine(ScriptedEngine):
    """Plays each choice's script on a thread, `pace` seconds a step, until it is aborted or let go."""

    max_len = 4096

    def __init__(self, script: Any, pace: float = 0.0) -> None:
        super().__init__(script)
        self.pace = pace
        self._leaving = threading.Event()
        self._threads: list[threading.Thread] = []

    def submit(self, request: EngineRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        thread = threading.Thread(target=self._play, args=(request, self.script(request, 0)))
        self._threads.append(thread)
        thread.start()

    def _play(self, request: EngineRequest, events: Sequence[Event]) -> None:
        for each in events:
            if self._leaving.wait(self.pace) or (request.id, None) in self.aborted or (request.id, 0) in self.aborted:
                return
            with suppress(RuntimeError):  # the app has closed its loop
                self.on_events([each])

    def close(self) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join()
        super().close()


def steps(request: EngineRequest, text: str, receipts: Sequence[Receipt]) -> list[Event]:
    """The text a byte a step, with a receipt each, the last one being the end's."""
    tokens = [*ids(text), 256]
    assert len(tokens) == len(receipts)
    last = len(tokens) - 1
    return [
        event(request, 0, token, receipt=told, finish="stop" if i == last else None)
        for i, (token, told) in enumerate(zip(tokens, receipts, strict=True))
    ]
