"""A fit that is killed at ten random moments ends as an undisturbed one, and loses no finished rollout."""

import json
import subprocess
import sys
from pathlib import Path

from fitting import contents

KILLS, SEED = 10, 0


def test_ten_kills_change_nothing_and_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), str(tmp_path), str(KILLS), str(SEED)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["kills"] == KILLS
    assert not told["twice"]
    assert not told["lost"]
    undisturbed = contents(tmp_path / "undisturbed")
    assert "correction.json" in undisturbed
    assert sum(name.endswith(".jsonl") for name in undisturbed) > 8
    assert told["finished"] > 50 * (1 + told["rounds"])
    for number in range(told["rounds"]):
        assert contents(tmp_path / f"killed-{number}") == undisturbed
