"""Figures as Markdown tables: one for each kind of run that needs its own, and one for all others."""

from collections.abc import Mapping, Sequence
from typing import Any


def plain_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Rows as they are: a column for each name."""
    names = list(dict.fromkeys(name for row in results for name in row))
    rows = [[_cell(row.get(name)) for name in names] for row in results]
    return table([[name.replace("_", " ") for name in names], *rows])


def tiers_table(run: Mapping[str, Any]) -> str:
    rows = [["batch", "tier", "ms a step", "tokens/s", "tokens/s of the base's"]]
    for r in run["results"]:
        for tier, found in r["tiers"].items():
            share = "{median:.3f} [{low:.3f}, {high:.3f}]".format(**found["of_base"])
            rows.append([str(r["batch"]), tier, f"{found['ms']:.2f}", f"{found['tokens_s']:.1f}", share])
    return table(rows) + "\n\nMedians of rounds in which all took turns; 95 % bootstrap intervals of the ratio."


def serve_table(run: Mapping[str, Any]) -> str:
    rows = [["streams", "tokens/s", "first token p50, ms", "p99", "between tokens p50, ms", "p99"]]
    for r in run["results"]:
        times = [r["ttft_ms"]["p50"], r["ttft_ms"]["p99"], r["itl_ms"]["p50"], r["itl_ms"]["p99"]]
        rows.append([str(r["streams"]), f"{r['tokens_per_s']:.1f}", *(f"{t:.1f}" for t in times)])
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _cell(value: Any) -> str:
    """Four significant digits; a spread as its middle and interval."""
    if isinstance(value, Mapping):
        if set(value) >= {"low", "high"}:
            middle = value["median"] if "median" in value else value["mean"]
            return f"{middle:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
