"""What must hold of vLLM's answers with the plugin, counted: of how many cases each did.

Invariant: no check can hold for want of cases; whoever reads the counts asks for more than none.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any


def check(
    tokens: int,
    plain: list[Any],
    mixed: list[Any],
    alone: list[Any],
    untouched: list[Any],
    refused: dict[str, tuple[int, str]],
    ours: list[dict[str, Any]],
    rules: list[Any],
    receipts: dict[str, list[dict[str, Any]]],
) -> dict[str, dict[str, int]]:
    """What must hold -> of how many cases it did."""
    off = [i for i, rule in enumerate(rules) if rule is None]
    on = [i for i, rule in enumerate(rules) if rule is not None]
    logged = [receipts.get(mixed[i][0], []) for i in on]
    steps = [
        (line, token)
        for i, lines in zip(on, logged, strict=True)
        for line, token in zip(lines, mixed[i][1], strict=False)
    ]
    pairs = [
        (line, one)
        for lines, answer in zip(logged, ours, strict=True)
        for line, one in zip(lines, answer["steps"], strict=False)
    ]
    same = ("open", "fired", "base_token", "steered_token")
    return {
        "rows that are off equal vLLM without the plugin": tally(mixed[i][1] == plain[i][1] for i in off),
        "steered rows equal our engine's tokens": tally(
            mixed[i][1] == answer["tokens"] for i, answer in zip(on, ours, strict=True)
        ),
        "steered rows differ from the base's somewhere": tally([any(mixed[i][1] != plain[i][1] for i in on)]),
        "a steered row alone equals the same in the batch": tally(
            one[1] == mixed[i][1] for i, one in zip(range(1, 6, 2), alone, strict=True)
        ),
        "shadow, strength 0 and off equal vLLM without the plugin": tally(
            one[1] == plain[i][1] for i, one in enumerate(untouched)
        ),
        "a receipt for each token, in order": tally(
            [line["position"] for line in lines] == list(range(tokens)) for lines in logged
        ),
        "no receipt for a row that is off": tally(mixed[i][0] not in receipts for i in off),
        "each steered step is a gated step": tally(line["open"] for line, _ in steps if line["fired"]),
        "where the gate is shut, the token is the base's": tally(
            token == line["base_token"] for line, token in steps if not line["open"]
        ),
        "the token is the steered distribution's best": tally(token == line["steered_token"] for line, token in steps),
        "receipts equal our engine's": tally(
            all(line[name] == one[name] for name in same) and abs(line["entropy"] - one["entropy"]) < 1e-3
            for line, one in pairs
        ),
        "a bad value is HTTP 400 and is named": tally(
            status == 400 and f"vllm_xargs.{key}" in text for key, (status, text) in refused.items()
        ),
    }


def tally(held: Any) -> dict[str, int]:
    found = [bool(one) for one in held]
    return {"held": sum(found), "cases": len(found)}


def agree(logs: list[dict[str, list[dict[str, Any]]]], ranks: int) -> dict[str, int]:
    """Receipts of every rank, compared with the first's."""
    if len(logs) != ranks:
        return {"held": 0, "cases": 1}
    first = [line for lines in logs[0].values() for line in lines]
    others = [[log.get(line["request"], []) for log in logs[1:]] for line in first]
    return tally(all(line in found for found in others_of) for line, others_of in zip(first, others, strict=True))


def read_log(file: Path) -> dict[str, list[dict[str, Any]]]:
    """By request, in order; vLLM adds a random suffix to the id that it tells."""
    found = defaultdict(list)
    for line in file.read_text().splitlines():
        told = json.loads(line)
        told["request"] = re.sub(r"(-\d+)-[0-9a-f]{8}$", r"\1", told["request"])
        found[told["request"]].append(told)
    return dict(found)


def read_metrics(text: str) -> dict[str, float]:
    """Ours, and the prefix cache's."""
    found: dict[str, float] = defaultdict(float)
    for name, value in re.findall(r"^(trimtab:\w+_total|vllm:prefix_cache_hits_total)\S* (\S+)$", text, re.MULTILINE):
        found[name] += float(value)
    return dict(found)
