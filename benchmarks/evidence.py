"""What was gained, against what is simpler, where, and what it costs: the tables of results/README.md.

Invariant: a cell is one figure of one run or report, as it is; a column is one set of problems, answered in pairs, and
a table is of one base model.

    fill(ROOT / "results" / "README.md", evidence(fits, runs))
"""

import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tables import table

from trimtab.steering.evaluation.ladder import BASE, GREEDY, LORA_ALWAYS
from trimtab.steering.machine import hardware

HEAD, SHUFFLED = "head", "shuffled-rewards"
AGAINST_THE_BASE = [
    *(GREEDY, "contrast", HEAD, "lora-gated", LORA_ALWAYS),
    *(SHUFFLED, "random-positions", "random-gate", "random-gate-matched"),
]
OF_THE_HEAD = [GREEDY, LORA_ALWAYS, SHUFFLED, "random-positions", "random-gate", "random-gate-matched"]
IN_A_FIT = {"correction": HEAD, "teacher": LORA_ALWAYS}  # what a fit's own report calls the tiers of a ladder

Pair = tuple[str, str]


class Column(NamedTuple):
    """What was found on one set of problems: of its policies' names, those of a ladder."""

    model: str
    name: str  # of what is judged
    of: str
    base: float  # pass@1
    fired: float | None  # at which share of its steps the head acted
    gains: Mapping[Pair, Mapping[str, float]]  # mean, low and high of the first minus the second


def evidence(fits: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """Of the ladders, the reports of corrections without one, and the other runs."""
    by_model: dict[str, dict[str, Column]] = {}
    for letter, column in lettered(fits, runs).items():
        by_model.setdefault(column.model, {})[letter] = column
    elsewhere = [line for run in of_kind(runs, "eval") for line in _of_transfer(run)]
    elsewhere += map(_of_study, of_kind(runs, "analyze"))
    parts = [_gains(model, found) for model, found in by_model.items()]
    parts += [_pools(pools)] if (pools := of_kind(runs, "pool")) else []
    parts += ["\n".join(elsewhere)] if elsewhere else []
    parts += map(_gates, of_kind(runs, "gates"))
    parts += map(_costs, of_kind(runs, "tiers"))
    return "\n\n".join(parts)


def lettered(fits: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """The columns of all tables of gains, a model's one after the other, by the letters that tell them apart."""
    ladders = of_kind(runs, "ladder")
    named = {run["corrections"][0]["name"] for run in ladders}
    unjudged = [fit for fit in fits if fit["name"] not in named and fit.get("report")]
    own = [run for run in ladders if run.get("strength") is None]  # the strength that the correction has
    columns = [*map(_of_ladder, own), *map(_of_fit, unjudged)]
    models = list(dict.fromkeys(column.model for column in columns))
    columns.sort(key=lambda column: models.index(column.model))
    return dict(zip(string.ascii_uppercase, columns, strict=False))


def of_kind(runs: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [run for run in runs if run["benchmark"] == kind]


def _of_ladder(run: Mapping[str, Any]) -> Column:
    rows = {row["policy"]: row for row in run["rows"]}
    judged = run["corrections"][0]
    gate = run.get("gate") or judged["facts"].rpartition("gate ")[2]  # the first ladders tell it there alone
    of = f"`{judged['name']}`, {_on({**run, 'gate': gate})}; problems {run['problems_sha256'][:8]}"
    fired = rows.get(HEAD, {}).get("fired")
    return Column(run["model"], judged["name"], of, rows[BASE]["pass_at_1"], fired, _pairs(run["differences"]))


def _of_fit(fit: Mapping[str, Any]) -> Column:
    report = fit["report"]
    rows = {row["policy"]: row for row in report["policies"]}
    of = f"`{fit['name']}`, {_on(report)}"
    fired = rows["correction"]["fired"]
    return Column(fit["base"]["model"], fit["name"], of, rows[BASE]["pass_at_1"], fired, _pairs(report["differences"]))


def _pairs(differences: Iterable[Mapping[str, Any]]) -> dict[Pair, Mapping[str, float]]:
    named = ((IN_A_FIT.get(d["policy"], d["policy"]), IN_A_FIT.get(d["against"], d["against"]), d) for d in differences)
    return {(policy, against): d for policy, against, d in named}


def _gains(model: str, lettered: Mapping[str, Column]) -> str:
    """A column for each set of problems, and below the table what it is."""
    columns = lettered.values()
    rows = [
        ["base: % of answers right", *(f"{100 * column.base:.1f}" for column in columns)],
        ["head: acts at % of steps", *("" if c.fired is None else f"{100 * c.fired:.0f}" for c in columns)],
    ]
    pairs = [*((policy, BASE) for policy in AGAINST_THE_BASE), *((HEAD, other) for other in OF_THE_HEAD)]
    rows += [
        [f"{policy} minus {against}", *(gain(c.gains, policy, against) for c in columns)] for policy, against in pairs
    ]
    told = "\n".join(f"- {letter}: {column.of}" for letter, column in lettered.items())
    return f"{table([[model, *lettered], *(row for row in rows if any(row[1:]))])}\n\n{told}"


def _pools(pools: Sequence[Mapping[str, Any]]) -> str:
    """A row for each: what a correction and its LoRA gain over several ladders' problems."""
    pairs = [(policy, BASE) for policy in (GREEDY, HEAD, LORA_ALWAYS)]
    pairs += [(policy, other) for other in (GREEDY, SHUFFLED) for policy in (HEAD, LORA_ALWAYS)]
    rows = [["further ladders, or several as one", "base", *(f"{policy} minus {against}" for policy, against in pairs)]]
    for run in pools:
        rates = {row["policy"]: row["pass@1"] for row in run["results"] if row["against"] is None}
        gains = gains_of(run)
        cells = (gain(gains, policy, against) for policy, against in pairs)
        rows.append([name_of(run), f"{100 * rates[BASE]:.1f}", *cells])
    places = " or ".join(dict.fromkeys(run["drawn on"] for run in pools))
    return f"{table(rows)}\n\n- on {places}"


def name_of(pool: Mapping[str, Any]) -> str:
    return f"{pool['correction']}, {pool['problems'].partition(' ')[0]} problems"


def gains_of(pool: Mapping[str, Any]) -> dict[Pair, Mapping[str, float]]:
    return {(row["policy"], row["against"]): row["gain"] for row in pool["results"] if row["gain"]}


def gain(gains: Mapping[Pair, Mapping[str, float]], policy: str, against: str) -> str:
    """In points of a hundred, whichever way round the run tells it."""
    if d := gains.get((policy, against)):
        return _interval(d["mean"], d["low"], d["high"])
    if d := gains.get((against, policy)):
        return _interval(-d["mean"], -d["high"], -d["low"])
    return ""


def _interval(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _of_transfer(run: Mapping[str, Any]) -> list[str]:
    """A correction on problems of a run of their own, and on plain text."""
    lines = [
        f"- `{run['correction']}`, {_on(run)}: {_interval(d['mean'], d['low'], d['high'])} over the base"
        for d in run["differences"]
        if (d["policy"], d["against"]) == ("correction", BASE)
    ]
    if text := run.get("text"):
        d = text["change"]
        changed = f"{d['mean']:+.4f} [{d['low']:.4f}, {d['high']:.4f}] nats a token; more is worse"
        lines.append(f"- its loss on {text['tokens']} tokens of `{text['file']}`, minus the base's: {changed}")
    return lines


def _of_study(run: Mapping[str, Any]) -> str:
    """What a tuned model changes, on what it writes itself and on what its base does; and what of its gain is left."""
    found = run["tokens"].values()
    changed = _span([100 * (tokens["reranked"] + tokens["shifted"]) for tokens in found])
    beyond = _span([100 * tokens["shifted"] for tokens in found])
    times = _span([tokens["entropy_ratio"] for tokens in found if tokens["entropy_ratio"] is not None])
    places = {"oracle": "at just those places", "random": "at as many drawn at random"}
    left = (
        f"{100 * share['mean']:.0f} % [{100 * share['low']:.0f}, {100 * share['high']:.0f}] {places[share['policy']]}"
        for share in run["shares"]
        if share["policy"] in places
    )
    unsure = f", and there the entropy is {times} times the mean" if times else ""
    return (
        f"- `{run['tuned']}` on {run['model']} ranks another token first at {changed} % of positions, at {beyond} % one"
        f" outside its base's five best{unsure}; its tokens give of its gain {', and '.join(left)}"
    )


def _span(values: Sequence[float]) -> str:
    """From the least to the most."""
    return " to ".join(dict.fromkeys(f"{value:.1f}" for value in (min(values), max(values)))) if values else ""


def _gates(run: Mapping[str, Any]) -> str:
    """What heads gain that learned and act above one threshold each, and by how much chance does worse."""
    found = run["results"]
    rows = [
        ["a head that learned and acts above, in nats", *(f"{r['tau']:g}" for r in found)],
        ["acts at % of steps", *(f"{100 * r['fired']:.0f}" for r in found)],
        ["minus base", *(_interval(**r["over_base"]) for r in found)],
        ["minus itself at as many random steps, as far from the base", *map(_over_random, found)],
    ]
    told = f"distilled anew above each from the LoRA of {run['run']}; {run['answered']}; {run['compared at']}"
    return f"{table(rows)}\n\n- {told}; {hardware(run['machine'])}; {run['model']} ({run['device']})"


def _over_random(gate: Mapping[str, Any]) -> str:
    return _interval(**gate["over_random"]) + ("" if gate["as_far_at_random"] else ", not as far")


def _costs(run: Mapping[str, Any]) -> str:
    """The tokens a second of each tier, of the base's in the same rounds."""
    batches = [f"batch {r['batch']}" for r in run["results"]]
    rows = [["tokens/s, % of the base's, the gate open at every step", *batches]]
    for tier in (tier for tier in run["results"][0]["tiers"] if tier != BASE):
        shares = [r["tiers"][tier]["of_base"] for r in run["results"]]
        rows.append([tier, *(f"{100 * s['median']:.1f} [{100 * s['low']:.1f}, {100 * s['high']:.1f}]" for s in shares)])
    return f"{table(rows)}\n\n- on {hardware(run['machine'])}; {run['model']} ({run['device']})"


def _on(run: Mapping[str, Any]) -> str:
    file = run["task"].rpartition(" + ")[2]  # of two files, what is held out is the second
    return f"{run['problems']} {run['split']} problems of `{file}`; gate {run['gate']}; {run['hardware']}"
