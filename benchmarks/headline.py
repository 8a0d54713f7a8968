"""The README's one table: what was gained, against what is simpler, and what steering costs. RESULTS.md has the rest.

Invariant: a row is the figures of one run or report, as they are; nothing is computed from them.

    fill_readme(ROOT / "README.md", headline(fits, runs))
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import table

from trimtab.steering.ladder import LORA_ALWAYS
from trimtab.steering.machine import hardware

BEGIN, END = "<!-- figures: written by benchmarks/results.py -->", "<!-- end of figures -->"

Row = list[str]  # what, figure, measured on
_OF_A_FIT = {("correction", "base"), ("correction", "shuffled-rewards"), ("teacher", "base")}


def headline(fits: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """Of the ladders, the reports of corrections that no ladder judged, and the other runs, what a newcomer asks
    first."""
    rows = [["what", "figure", "measured on"]]
    made_for = {fit["name"]: fit["report"]["task"] for fit in fits if fit.get("report")}
    ladders = _of_kind(runs, "ladder")
    shown = set()
    for run in ladders:  # of several under one gate the first: there is a pool of them
        asked = run["corrections"][0]["name"], run.get("gate")
        rows += [] if asked in shown or run.get("strength") is not None else _of_ladder(run)
        shown.add(asked)
    for run in _of_kind(runs, "pool"):
        rows += _of_pool(run)
    judged = {run["corrections"][0]["name"] for run in ladders}
    for fit in fits:
        rows += [] if fit["name"] in judged else _of_fit(fit)
    for run in _of_kind(runs, "eval"):
        elsewhere = made_for.get(run["correction"], run["task"]) != run["task"]
        rows += _of_transfer(run) if elsewhere else [[f"`{run['correction']}`", run["verdict"]["summary"], _on(run)]]
    for run in _of_kind(runs, "tiers"):
        rows += _of_tiers(run)
    return table(rows)


def fill_readme(readme: Path, figures: str) -> None:
    """Put the table between the README's markers."""
    text = readme.read_text()
    assert text.count(BEGIN) == text.count(END) == 1, f"{readme} must hold each marker once"
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{figures}\n{END}{rest.split(END)[1]}")


def _of_kind(runs: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [run for run in runs if run["benchmark"] == kind]


def _of_fit(fit: Mapping[str, Any]) -> Iterator[Row]:
    report = fit.get("report")
    if not report:
        return
    rates = {policy["policy"]: policy["pass_at_1"] for policy in report["policies"]}
    shown = f"base {rates['base']:.3f}, correction {rates['correction']:.3f}"
    yield [f"`{fit['name']}`, pass@1", shown, _on(report | {"model": fit["base"]["model"]})]
    for d in report["differences"]:
        if (d["policy"], d["against"]) in _OF_A_FIT:
            yield [f"{d['policy']} minus {d['against']}", _gain(d), "the same, paired seeds"]


def _of_ladder(run: Mapping[str, Any]) -> Iterator[Row]:
    at = f", {run['gate']}" if "gate" in run else ""
    for row in run["rows"]:
        if row["policy"] == "base":
            yield [f"`{run['corrections'][0]['name']}`, the ladder{at}: base", f"{row['pass_at_1']:.3f}", _on(run)]
        elif row["role"] in ("tier", "control") and not row["policy"].endswith("-greedy"):
            often = f" at {row['fired']:.0%} of steps" if 0 < row["fired"] < 1 else ""
            shown = f"{row['pass_at_1']:.3f}{often}, {_gain(row['gain'])}"
            held = row["role"] == "control" or row["policy"] == LORA_ALWAYS
            against = [d for d in run["differences"] if held and d["against"] == row["policy"]]
            shown += "".join(f"; {d['policy']} minus it {_gain(d)}" for d in against)
            yield [f"{row['role']} {row['policy']}, and its gain", shown, "the same, paired seeds"]


def _of_pool(run: Mapping[str, Any]) -> Iterator[Row]:
    """What is judged against the base, and what it says among themselves."""
    on = f"{run['model']}, {run['problems']}; {run['drawn on']}"
    for row in run["results"]:
        if row["gain"] and (row["against"] == "base" or not row["policy"].startswith("base")):
            of = f"`{run['correction']}`, ladders together: {row['policy']} minus {row['against']}"
            yield [of, _gain(row["gain"]), on]
            on = "the same, paired seeds"


def _of_transfer(run: Mapping[str, Any]) -> Iterator[Row]:
    """A correction on a task that it was not made for, and on plain text."""
    on = _on(run)
    for d in run["differences"]:
        if (d["policy"], d["against"]) == ("correction", "base"):
            yield [f"`{run['correction']}` on `{run['task']}`, minus base", _gain(d), on]
    if text := run.get("text"):
        d = text["change"]
        shown = f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}] nats a token, over windows; more is worse"
        yield [
            f"`{run['correction']}` on plain text, loss minus the base's",
            shown,
            f"{text['tokens']} tokens of `{text['file']}`",
        ]


def _of_tiers(run: Mapping[str, Any]) -> Iterator[Row]:
    for tier in (tier for tier in run["results"][0]["tiers"] if tier != "base"):
        found = [(r["batch"], r["tiers"][tier]["of_base"]) for r in run["results"]]
        shares = ", ".join(
            f"{s['median']:.1%} [{s['low']:.1%}, {s['high']:.1%}] at batch {batch}" for batch, s in found
        )
        yield [f"tokens/s of the base's, {tier}, gate always open", shares, _where(run)]


def _on(run: Mapping[str, Any]) -> str:
    return f"{run['model']}, {run['problems']} {run['split']} problems of `{run['task']}`; {run['hardware']}"


def _where(run: Mapping[str, Any]) -> str:
    return f"{hardware(run['machine'])}; {run['model']} ({run['device']})"


def _gain(d: Mapping[str, Any]) -> str:
    return f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
