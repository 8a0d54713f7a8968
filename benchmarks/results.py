"""Writes RESULTS.md, and the tables between the markers of README.md and results/README.md, from what was measured.

    python benchmarks/tiers.py | tee results/tiers.txt
    trimtab eval --correction corrections/smollm2-135m-instructions --skip 200 --ladder --out results/demo
    python benchmarks/results.py

Inputs: all outputs in results/ (a benchmark's or a command's, whose last line or whole content is JSON, and the
report.json of a command's --out), and the correction.json, which holds the report, of what ships (corrections/) and of
what does not (results/). Each kind has its renderer; one without makes a table of its rows as they are.
"""

import argparse
import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from evidence import evidence
from headline import fill, headline
from tables import plain_table, serve_table, table, tiers_table

from trimtab.steering.evaluation import analyze_report, ladder_report, text
from trimtab.steering.evaluation.report import to_markdown
from trimtab.steering.gate import Gate
from trimtab.steering.machine import hardware, versions
from trimtab.steering.training.config import FREE, FitConfig

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Results

Written by `benchmarks/results.py` from what the commands below printed; no figure here was typed. Compare rows of one
table with one another: machines differ, and so do their moments. results/README.md says what they show.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write RESULTS.md, and the tables of README.md and results/README.md.")
    parser.add_argument("outputs", nargs="*", type=Path, help="what was measured (default: all in results/)")
    parser.add_argument("--correction", action="append", default=[], type=Path, metavar="DIR")
    args = parser.parse_args()
    found = [path for pattern in ("*.txt", "*.json", "*/report.json") for path in (ROOT / "results").glob(pattern)]
    paths = args.outputs or sorted(found)
    fitted = [
        path for pattern in ("corrections", "results") for path in sorted((ROOT / pattern).glob("*/correction.json"))
    ]
    folders = args.correction or [path.parent for path in fitted]
    runs = [read(path) for path in paths]
    fits = [json.loads((folder / "correction.json").read_text()) for folder in folders]
    sections = [HEAD, *(write_fit(fit, folder) for fit, folder in zip(fits, folders, strict=True))]
    for kind in (*RENDERERS, *sorted({run["benchmark"] for run in runs} - set(RENDERERS))):
        for run, path in zip(runs, paths, strict=True):
            if run["benchmark"] == kind:
                sections.append(RENDERERS.get(kind, write_plain)(run, path))
    sections.insert(1, _contents(sections[1:]))
    (ROOT / "RESULTS.md").write_text("\n".join(sections))
    fill(ROOT / "README.md", headline(fits, runs))
    fill(ROOT / "results" / "README.md", evidence(fits, runs))


def read(path: Path) -> dict[str, Any]:
    """JSON, or lines for people of which the last is JSON."""
    text = path.read_text().strip()
    found: dict[str, Any] = json.loads(text if text.startswith("{") else text.splitlines()[-1])
    return found


def write_fit(fit: Mapping[str, Any], folder: Path) -> str:
    """A correction: how it was made, and its own report."""
    made = fit["provenance"]
    config = made.get("config", {})
    route = {name: config[name] for name in ("tier", "via", "teacher", "gate", "lora_preset") if name in config}
    plain, defaults = (dataclasses.asdict(FitConfig(**chosen)) for chosen in ({}, route))
    defaults |= {name: plain[name] for name in route}
    command = ["trimtab", "fit", "--out", _place(folder)]
    placed = {"threads": made["threads"]} if config else {}  # sums are rounded by how many there are
    for name, value in {**config, **placed}.items():
        if name in defaults and name != "name" and value != _plain(defaults[name]):
            values = value if isinstance(value, list) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    gate = Gate(fit["gate"]["kind"], fit["gate"]["tau"], fit["gate"].get("ceiling") or math.inf)
    head = f", rank {fit['rank']}, {fit['top_k']} candidates" if fit["tier"] == "head" else ""
    tried: Mapping[str, float] = made.get("fit", {}).get("validation", {})
    since = {name: value for name, value in defaults.items() if config and name not in config and name not in FREE}
    facts = {
        "command": f"`{shlex.join(command)}`",
        "options there were not then, and now": ", ".join(f"{name} {value}" for name, value in since.items()),
        "base": fit["base"]["model"],
        "correction": f"{fit['tier']}{head}, strength {fit['strength']:g}, gate {gate}",
        "validation": ", ".join(f"{name} {rate:.3f}" for name, rate in tried.items()),
        "problems sha256": made.get("problems_sha256"),
        "seed": config.get("seed"),
        "device": f"{made['device']}, {made['dtype']}, {made['threads']} threads",
        **_machine(made["machine"]),
    }
    body = to_markdown(fit["report"]) if fit.get("report") else "No report: nobody has judged this correction.\n"
    return f"## The correction {fit['name']} ({_place(folder)})\n\n{_list(facts)}\n\n{body}"


def write_eval(run: dict[str, Any], path: Path) -> str:
    """A correction judged again, on other problems than the fit's or with other options: a table of its own."""
    known = run["problems_of_the_fits_report"]
    which = f"problems, {known} of them in the fit's own report" if known else "further problems"
    title = f"The correction {run['correction']} on {run['problems']} {which}"
    facts = {"base": run["model"], "seed": run["sampling"]["seed"]}
    return _section(title, path, facts, run, to_markdown(run) + _text(run))


def write_ladder(run: dict[str, Any], path: Path) -> str:
    """All rows, and the picture beside the report."""
    picture = path.parent / "ladder.svg"
    shown = f"![gains over the base]({picture.relative_to(ROOT)})\n\n" if picture.exists() else ""
    name = run["corrections"][0]["name"]
    title = f"The ladder: {name}, {run['problems']} problems of {run['task']}"
    facts = {"problems sha256": run["problems_sha256"], "seed": run["sampling"]["seed"], "gate": run.get("gate")}
    return _section(title, path, facts, run, shown + ladder_report.to_markdown(run) + _text(run))


def write_analyze(run: dict[str, Any], path: Path) -> str:
    facts = {"problems sha256": run["problems_sha256"], "seed": run["sampling"]["seed"]}
    return _section(f"What tuning changed: {run['tuned']}", path, facts, run, analyze_report.to_markdown(run))


def write_serve(run: dict[str, Any], path: Path) -> str:
    return _section(f"Serving speed: {run['model']}", path, _facts(run), run, serve_table(run))


def write_tiers(run: dict[str, Any], path: Path) -> str:
    return _section(f"What each tier costs: {run['model']}", path, _facts(run), run, tiers_table(run))


def write_fit_time(run: dict[str, Any], path: Path) -> str:
    """Fits timed one by one, and the stages of the run whose features they read."""
    told = run["fit"]
    rows = [["stage of the fit", "seconds"], *([stage, f"{seconds:.1f}"] for stage, seconds in told["stages"])]
    body = f"{plain_table(run['results'])}\n\nBy the fit itself, on {told['hardware']}:\n\n{table(rows)}"
    return _section(f"How long fitting takes: {run['model']}", path, _facts(run), run, body)


def write_data(run: dict[str, Any], path: Path) -> str:
    """A task file that was made by a script: by which options, and the digests."""
    return f"## Task file: {run['benchmark']} ({_place(path)})\n\n{_list(_facts(run))}\n"


def write_plain(run: dict[str, Any], path: Path) -> str:
    """A kind that needs no table of its own."""
    title = run["benchmark"].replace("_", " ").capitalize()
    title += f": {run['model']}" if "model" in run else ""
    return _section(title, path, _facts(run), run, plain_table(run["results"]))


RENDERERS: dict[str, Callable[[dict[str, Any], Path], str]] = {
    "ladder": write_ladder,
    "eval": write_eval,
    "analyze": write_analyze,
    "fit_time": write_fit_time,
    "tiers": write_tiers,
    "serve": write_serve,
    "gsm8k": write_data,
    "capitals": write_data,
    "math500": write_data,
}


def _contents(sections: Iterable[str]) -> str:
    """A link to each, by the anchor that a reader of Markdown makes of its title."""
    titles = [section.partition("\n")[0].removeprefix("## ") for section in sections]
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    return "".join(f"- [{title}](#{anchor})\n" for title, anchor in zip(titles, anchors, strict=True))


def _section(title: str, path: Path, facts: Mapping[str, Any], run: Mapping[str, Any], body: str) -> str:
    """A run: where it lies, its command, what was asked, the machine, the time, and the figures."""
    here = run["machine"]
    listed = {"command": f"`{here['command']}`", **facts, **_machine(here), "when": here["when"]}
    return f"## {title} ({_place(path)})\n\n{_list(listed)}\n\n{body.rstrip()}\n"


def _place(path: Path) -> str:
    """In the repository, where it lies there."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a benchmark says of itself in a word or a number."""
    return {name: value for name, value in run.items() if name != "benchmark" and isinstance(value, str | int | float)}


def _text(run: Mapping[str, Any]) -> str:
    """How likely plain text was, where that was asked."""
    if "text" not in run:
        return ""
    return f"\n{text.to_markdown(run['text'])}The text: {run['text']['file']}, sha256 {run['text']['sha256']}.\n"


def _machine(here: Mapping[str, Any]) -> dict[str, str]:
    return {"hardware": hardware(here), "system": here["system"], "versions": versions(here)}


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value not in (None, ""))


if __name__ == "__main__":
    main()
