"""The README's table: what each tier gave, beside what is simpler and what controls it. results/README.md has the rest.

Invariant: a column is a ladder in which every tier stood, and each of its cells one figure of that ladder, as it is.

    fill(ROOT / "README.md", headline(fits, runs))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence import HEAD, SHUFFLED, gain, gains_of, lettered, name_of, of_kind
from tables import table

from trimtab.steering.evaluation.ladder import BASE, GREEDY, LORA_ALWAYS, LORA_GATED, RANDOM_GATE_MATCHED

BEGIN, END = "<!-- figures: written by benchmarks/results.py -->", "<!-- end of figures -->"

TIERS = {
    GREEDY: "base, greedy",
    "contrast": "contrast",
    HEAD: "**head**",
    LORA_GATED: "LoRA, gated",
    LORA_ALWAYS: "LoRA, always on",
}
CONTROLS = {
    SHUFFLED: "control: a head from shuffled rewards",
    "random-positions": "control: a head that learned at random positions",
    RANDOM_GATE_MATCHED: "control: the head at random steps",
}


def headline(fits: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """The ladders that have every tier, by their letters there, and below the table what they are."""
    columns = {
        letter: column
        for letter, column in lettered(fits, runs).items()
        if all((policy, BASE) in column.gains for policy in TIERS)
    }
    rows = [
        ["", *columns],
        ["base: % of answers right", *(f"{100 * column.base:.1f}" for column in columns.values())],
        ["head: acts at % of steps", *(f"{100 * (column.fired or 0):.0f}" for column in columns.values())],
    ]
    for policy, words in (TIERS | CONTROLS).items():
        rows.append([words, *(gain(column.gains, policy, BASE) for column in columns.values())])
    told = [f"- {letter}: {column.model}; {column.of}" for letter, column in columns.items()]
    names = {column.name for column in columns.values()}
    told += [_of_pool(pool) for pool in of_kind(runs, "pool") if pool["correction"] in names]
    return table(rows) + "\n\n" + "\n".join(told)


def _of_pool(run: Mapping[str, Any]) -> str:
    """What a correction gains over the problems of several ladders, beside greedy decoding."""
    pairs = ((HEAD, BASE), (GREEDY, BASE), (HEAD, GREEDY))
    said = "; ".join(f"{one} minus {other} {gain(gains_of(run), one, other)}" for one, other in pairs)
    runs = "of a further run" if run["problems"].endswith(" of 1 ladders") else "of several such runs"
    return f"- {name_of(run)} {runs}: {said}"


def fill(page: Path, figures: str) -> None:
    """Put the figures between the page's markers."""
    text = page.read_text()
    assert text.count(BEGIN) == text.count(END) == 1, f"{page} must hold each marker once"
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{figures}\n{END}{rest.split(END)[1]}")
