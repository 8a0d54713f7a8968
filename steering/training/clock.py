"""How long each stage took: seconds by stage in a file, added up over the runs that a fit was resumed in.

Invariant: nothing that ships is made of it, so that equal runs make equal corrections. What a killed stage had taken is
not known.

    clock = Clock(Path("run/timings.json"), "where it ran")
    with clock.time("rollouts"): ...
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.steering.atomic import intact, read_json, write_json


class Clock:
    """Seconds by stage, in the order in which they came."""

    def __init__(self, path: Path, hardware: str) -> None:
        self._path, self._hardware = path, hardware
        self.seconds: dict[str, float] = {}
        if path.exists():
            with intact(path):
                self.seconds = dict(read_json(path)["stages"])

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add what passes inside to the stage's seconds. Stages do not nest."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 2)
        write_json(self._path, {"hardware": self._hardware, "stages": list(self.seconds.items())})

    def __str__(self) -> str:
        """For people: `rollouts 267 s, features 64 s`."""
        return ", ".join(f"{stage} {seconds:.3g} s" for stage, seconds in self.seconds.items())
