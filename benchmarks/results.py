"""Writes RESULTS.md, and the table between the README's markers, from what was measured. Nobody writes them by hand.

    python benchmarks/step.py | tee runs/step.txt;  python benchmarks/serve.py | tee runs/serve.txt
    trimtab eval --correction corrections/smollm2-135m-instructions --skip 200 --json > runs/eval.txt
    python benchmarks/results.py runs/*.txt --correction corrections/smollm2-135m-instructions

Inputs: the outputs of benchmarks and of `trimtab eval --json` (the last line is JSON), and corrections' folders (the
report is in correction.json).
"""

import argparse
import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.steering.config import FitConfig
from trimtab.steering.machine import hardware, versions
from trimtab.steering.report import to_markdown

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: written by benchmarks/results.py -->", "<!-- end of figures -->"
HEAD = """# Results

Written by `benchmarks/results.py` from what the commands below printed; no figure here was typed. Compare rows of one
table with one another: machines differ, and so do their moments.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write RESULTS.md and the README's table.")
    parser.add_argument("outputs", nargs="*", type=Path, help="what benchmarks printed")
    parser.add_argument("--correction", action="append", default=[], type=Path, metavar="DIR")
    args = parser.parse_args()
    runs = [json.loads(path.read_text().strip().splitlines()[-1]) for path in args.outputs]
    fits = [json.loads((folder / "correction.json").read_text()) for folder in args.correction]
    steps, serves, evals = ([run for run in runs if run["benchmark"] == kind] for kind in ("step", "serve", "eval"))
    sections = [HEAD]
    sections += [write_fit(fit, folder) for fit, folder in zip(fits, args.correction, strict=True)]
    sections += [write_eval(run) for run in evals]
    sections += [write_run("Steering's share of a decode step", run, step_table(run)) for run in steps]
    sections += [write_run("Serving speed", run, serve_table(run)) for run in serves]
    (ROOT / "RESULTS.md").write_text("\n".join(sections))
    fill_readme(ROOT / "README.md", headline(fits, steps))


def write_fit(fit: Mapping[str, Any], folder: Path) -> str:
    """A correction: how it was made, and its own report."""
    made = fit["provenance"]
    config = made.get("config", {})
    route = {name: config[name] for name in ("tier", "via", "teacher", "gate", "lora_preset") if name in config}
    plain, defaults = (dataclasses.asdict(FitConfig(**chosen)) for chosen in ({}, route))
    defaults |= {name: plain[name] for name in route}
    command = ["trimtab", "fit", "--out", str(folder)]
    for name, value in config.items():
        if name in defaults and name != "name" and value != _plain(defaults[name]):
            values = value if isinstance(value, list) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    here = made.get("machine")
    facts = {
        "command": f"`{shlex.join(command)}`",
        "base": fit["base"]["model"],
        "correction": f"{fit['tier']}, rank {fit['rank']}, {fit['top_k']} candidates, strength {fit['strength']:g}, "
        f"gate above {fit['gate']['tau']:g} nats",
        "seed": config.get("seed"),
        "device": f"{made['device']}, {made['dtype']}, {made['threads']} threads" if here else None,
        **(_machine(here) if here else {}),
    }
    body = to_markdown(fit["report"]) if fit.get("report") else "No report: nobody has judged this correction.\n"
    return f"## The correction {fit['name']}\n\n{_list(facts)}\n\n{body}"


def write_eval(run: dict[str, Any]) -> str:
    """A correction judged again, on other problems than the fit's or with other options: a table of its own."""
    here, known = run["machine"], run["problems_of_the_fits_report"]
    which = f"problems, {known} of them in the fit's own report" if known else "further problems"
    facts = {"command": f"`{here['command']}`", "base": run["model"], "seed": run["sampling"]["seed"]}
    facts |= {**_machine(here), "when": here["when"]}
    return f"## The correction {run['correction']} on {run['problems']} {which}\n\n{_list(facts)}\n\n{to_markdown(run)}"


def write_run(title: str, run: dict[str, Any], table: str) -> str:
    """One benchmark: the command, the machine and the figures."""
    here = run["machine"]
    known = {name: value for name, value in run.items() if name not in ("benchmark", "machine", "results")}
    facts = {"command": f"`{here['command']}`", **known, **_machine(here)}
    return f"## {title}: {run['model']}\n\n{_list({**facts, 'when': here['when']})}\n\n{table}\n"


def step_table(run: Mapping[str, Any]) -> str:
    rows = [["batch", "base ms", "off - base, ms", "on - base, ms", "steering's share", "same tokens"]]
    for r in run["results"]:
        spans = [f"{r[k]['median']:+.3f} [{r[k]['low']:+.3f}, {r[k]['high']:+.3f}]" for k in ("off_ms", "on_ms")]
        rows.append([str(r["batch"]), f"{r['base_ms']:.2f}", *spans, f"{r['share']:.1%}", f"{r['same_tokens']:.0%}"])
    return _table(rows) + "\n\nMedians of rounds in which the three took turns; 95 % bootstrap intervals."


def serve_table(run: Mapping[str, Any]) -> str:
    rows = [["streams", "tokens/s", "first token p50, ms", "p99", "between tokens p50, ms", "p99"]]
    for r in run["results"]:
        times = [r["ttft_ms"]["p50"], r["ttft_ms"]["p99"], r["itl_ms"]["p50"], r["itl_ms"]["p99"]]
        rows.append([str(r["streams"]), f"{r['tokens_per_s']:.1f}", *(f"{t:.1f}" for t in times)])
    return _table(rows)


def headline(fits: Sequence[Mapping[str, Any]], steps: Sequence[dict[str, Any]]) -> str:
    """The README's one table: what the corrections gained, against their controls, and what steering costs."""
    rows = [["what", "figure", "measured on"]]
    for fit in fits:
        report = fit.get("report")
        if not report:
            continue
        rates = {policy["policy"]: policy["pass_at_1"] for policy in report["policies"]}
        on = f"{fit['base']['model']}, {report['problems']} {report['split']} problems of `{report['task']}`"
        rows.append([f"`{fit['name']}`, pass@1", f"base {rates['base']:.3f}, correction {rates['correction']:.3f}", on])
        for d in report["differences"]:
            if d["policy"] == "correction":
                figure = f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
                rows.append([f"correction minus {d['against']}", figure, "the same, paired seeds"])
    for run in steps:
        shares = ", ".join(f"{r['share']:.1%} at batch {r['batch']}" for r in run["results"])
        where = f"{hardware(run['machine'])}; {run['model']} ({run['device']})"
        rows.append(["steering's share of a decode step, gate always open", shares, where])
    return _table(rows)


def fill_readme(readme: Path, table: str) -> None:
    text = readme.read_text()
    assert text.count(BEGIN) == text.count(END) == 1, f"{readme} must hold each marker once"
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def _machine(here: Mapping[str, Any]) -> dict[str, str]:
    return {"hardware": hardware(here), "system": here["system"], "versions": versions(here)}


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value not in (None, ""))


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    main()
