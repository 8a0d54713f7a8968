"""Our engine in a process of its own, which may be another installation's: greedy answers in float32.

answers = ask_engine(python, model, correction, tokens, [(prompt, rule), ...])
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def ask_engine(
    python: str, model: str, correction: Path, tokens: int, asked: list[tuple[list[int], Any]]
) -> list[dict[str, Any]]:
    """The greedy tokens and the receipts of each: its prompt, and its rule for the correction. python: who runs it."""
    told = {"model": model, "correction": str(correction), "tokens": tokens, "asked": asked}
    ran = subprocess.run([python, __file__], input=json.dumps(told), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    return found


def answer(told: dict[str, Any]) -> list[dict[str, Any]]:
    """All requests together."""
    from trimtab.server.engine.config import EngineConfig
    from trimtab.server.engine.core import Core
    from trimtab.server.engine.request import Request, SamplingParams, Steering
    from trimtab.server.model.base import load_base
    from trimtab.steering.bank import Bank
    from trimtab.steering.correction import check
    from trimtab.steering.folder import load

    base, correction = load_base(told["model"], "float32", "cpu"), load(told["correction"])
    check(correction, base.identity)
    bank = Bank(base.hidden, "cpu")
    bank.add(correction)
    sampling = SamplingParams(temperature=0, max_tokens=told["tokens"], ignore_eos=True)
    requests = [
        Request(str(i), tuple(prompt), sampling, Steering(correction.name, **rule))
        for i, (prompt, rule) in enumerate(told["asked"])
    ]
    answers: list[dict[str, Any]] = [{"tokens": [], "steps": []} for _ in requests]
    for event in Core(base, bank, EngineConfig(slots=16, max_model_len=1024)).run(requests):
        assert event.error is None, event.error
        assert event.receipt is not None
        answers[int(event.request_id)]["tokens"].append(event.token)
        answers[int(event.request_id)]["steps"].append(event.receipt._asdict())
    return answers


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
