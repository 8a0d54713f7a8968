"""`trimtab serve` in a process of its own, for tests."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Served(NamedTuple):
    url: str
    told: str  # what the server printed until it was ready
    process: "subprocess.Popen[str]"


@contextmanager
def serving(
    arguments: Sequence[str], folder: Path, code: int = 0, program: Sequence[str] = ("-m", "trimtab.cli")
) -> Iterator[Served]:
    """Serves on a free port; afterwards SIGTERM must end it, if it runs, with this exit code and no traceback."""
    command = [sys.executable, *program, "serve", *arguments, "--port", "0"]
    with subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as server:
        try:
            assert server.stdout is not None
            told = ""
            while not (found := re.search(r"running on (http://\S+)", told)):
                line = server.stdout.readline()
                assert line, f"the server ended: {told}"
                told += line
            yield Served(found[1], told, server)
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == code
            assert "Traceback" not in server.stdout.read()
        finally:
            server.kill()
