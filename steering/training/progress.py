"""Progress of a stage as plain lines on stderr: counts, a rate, the time left. No carriage returns: logs stay readable.

Invariant: at most one line every INTERVAL seconds, and always one when the stage is done.
"""

import sys
import time
from types import TracebackType

INTERVAL = 5.0  # seconds


def say(stage: str, text: str) -> None:
    """One line, at once."""
    print(f"[{stage}] {text}", file=sys.stderr, flush=True)


class Progress:
    """Counts units of work towards a total.

    with Progress("rollouts", 1024, "completions") as progress: progress.add(1, "pass@1 0.57")
    """

    def __init__(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        """done: what an earlier run left finished."""
        self._stage, self._total, self._unit = stage, total, unit
        self._done = self._resumed = self._shown = done
        self._start = self._printed = time.monotonic()
        self._note = ""
        if done:
            say(stage, f"{done} of {total} {unit} were finished before")

    def add(self, count: int, note: str = "") -> None:
        """Count work as done. note: a figure worth seeing."""
        self._done += count
        self._note = note
        if time.monotonic() - self._printed >= INTERVAL:
            self._print()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and self._done > self._shown:
            self._print()

    def _print(self) -> None:
        self._printed, self._shown = time.monotonic(), self._done
        seconds = self._printed - self._start
        rate = (self._done - self._resumed) / max(seconds, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        end = f"in {seconds:.0f} s" if self._done >= self._total else f"about {_duration(left)} left"
        note = f", {self._note}" if self._note else ""
        say(self._stage, f"{self._done} of {self._total} {self._unit}, {rate:.1f}/s, {end}{note}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
