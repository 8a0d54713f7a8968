"""What a ladder found: figures, differences and a verdict, as JSON values, Markdown and a picture.

Invariant: the verdict follows from the intervals alone, and names every control that a tier does not beat. A row beats
another when the whole 95 % interval of their paired difference lies above 0; intervals are not corrected for how many
rows there are.

    report = build(base, exam, entrants, climbed);  to_markdown(report);  to_svg(report)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.server.model.base import Base
from trimtab.steering.correction import Correction
from trimtab.steering.evaluation.evaluate import Difference, compare, kept, summarise
from trimtab.steering.evaluation.ladder import (
    BASE,
    GREEDY,
    LORA_ALWAYS,
    LORA_GATED,
    PROMPTED,
    Climbed,
    Entrants,
    Row,
    common_gate,
)
from trimtab.steering.evaluation.match import TOKEN, Matched
from trimtab.steering.evaluation.plot import Bar, gains_svg
from trimtab.steering.evaluation.report import few
from trimtab.steering.machine import ran_on
from trimtab.steering.tasks.tasks import fingerprint
from trimtab.steering.training.rollouts import Exam

NOTE = (
    "`marked`: completions that mark their answer (#### or \\boxed{}); `KL`: of steered from base distribution, nats "
    "at temperature 1, a fired step and a token; `flips`: fired steps that changed the most likely token, a thousand "
    "tokens. "
    "Intervals: 95 %, bootstrap over problems, paired in gains, not corrected for the number of rows."
)
RULES = ("base", "sharpening", "format", "control")  # what a tier is held against


def build(base: Base, exam: Exam, entrants: Entrants, climbed: Climbed) -> dict[str, Any]:
    """The report as JSON values."""
    rows = [_row(row, exam, climbed) for row in climbed.rows]
    differences = _differences(climbed)
    whole = [name for name in (LORA_ALWAYS, *_named(climbed, "-always")) if name in climbed.found][:1]
    tiers = [row.policy.name for row in climbed.rows if row.role == "tier" and not row.policy.greedy]
    shares = [kept(climbed.found, tier, of, BASE) for of in whole for tier in tiers if tier != of]
    corrections = (entrants.correction, *([entrants.lora] if entrants.lora else []), *entrants.others)
    return {
        "task": exam.task.name,
        "split": "held-out",
        "problems": len(exam.problems),
        "problems_sha256": fingerprint(exam.problems),
        "sampling": exam.sampling._asdict(),
        "hardware": ran_on(base, exam.threads),
        "model": base.name,
        "gate": str(common_gate(entrants)),
        "strength": entrants.strength,
        "corrections": [_describe(c) for c in corrections],
        "system": entrants.system,
        "rows": rows,
        "differences": [d._asdict() for d in differences],
        "shares": [s._asdict() for s in shares if s],
        "matched": [m._asdict() for m in climbed.matched],
        "verdict": [*judge(climbed.rows, differences, climbed.matched), *few(len(exam.problems))],
    }


def _row(row: Row, exam: Exam, climbed: Climbed) -> dict[str, Any]:
    figures = summarise(row.policy.name, exam.problems, climbed.found[row.policy.name], exam.task.extract)
    gain = compare(climbed.found, row.policy.name, BASE)
    return {"role": row.role, "what": row.what, "measured": row.measured, **figures._asdict(), "gain": gain._asdict()}


def _named(climbed: Climbed, ending: str) -> list[str]:
    return [row.policy.name for row in climbed.rows if row.policy.name.endswith(ending)]


def _differences(climbed: Climbed) -> list[Difference]:
    """Each tier minus all it is held against, a greedy one minus the greedy base; and the tiers among themselves."""
    rules = [row for row in climbed.rows if row.role in RULES]
    tiers = [row for row in climbed.rows if row.role == "tier"]
    found = climbed.found
    pairs: list[tuple[str, str]] = []
    for tier in tiers:
        if tier.policy.greedy:
            pairs.append((tier.policy.name, GREEDY))
            continue
        pairs += [(tier.policy.name, row.policy.name) for row in rules if row.of in ("", tier.policy.name)]
    whole = [row.policy.name for row in tiers if row.policy.name in (LORA_ALWAYS, LORA_GATED)]
    pairs += [(t.policy.name, w) for w in whole for t in tiers if not t.policy.greedy and t.policy.name not in whole]
    if len(whole) > 1:
        pairs.append((LORA_GATED, LORA_ALWAYS))
    pairs += [(row.policy.name, BASE) for row in rules if row.policy.name != BASE]
    return [compare(found, one, other) for one, other in pairs]


def judge(rows: Sequence[Row], differences: Sequence[Difference], matched: Sequence[Matched] = ()) -> list[str]:
    """A sentence for each tier. A control that should have been brought to its push and was not controls nothing."""
    unmatched = [m.control for m in matched if not m.near]
    role = {row.policy.name: row.role for row in rows}
    of = {(d.policy, d.against): d for d in differences}
    words = []
    for row in rows:
        name = row.policy.name
        if row.role != "tier":
            continue
        rules = [
            d for (policy, other), d in of.items() if policy == name and role[other] in RULES and other not in unmatched
        ]
        gain = of.get((name, BASE)) or of[name, GREEDY]
        sentence = [f"{name}: {_gain(gain)} over {gain.against}"]
        beaten = [d.against for d in rules if d.low > 0 and d is not gain]
        missed = [f"{d.against} ({_gain(d)})" for d in rules if d.low <= 0 and d is not gain]
        if gain.low <= 0:
            sentence.append("no gain is shown" if gain.high >= 0 else "a loss")
        if beaten:
            sentence.append(f"beats {', '.join(beaten)}")
        if missed:
            sentence.append(f"does not beat {', '.join(missed)}")
        if held := [control for control in unmatched if (name, control) in of]:
            sentence.append(f"{', '.join(held)} could not be made to push as hard, and controls nothing")
        words.append("; ".join(sentence))
    return words


def to_markdown(report: Mapping[str, Any]) -> str:
    """The table, what gains are made of, and the verdict."""
    s = report["sampling"]
    lines = [
        f"{report['model']}, {report['problems']} {report['split']} problems of {report['task']}, {s['samples']} "
        f"samples each (greedy: 1), temperature {s['temperature']}, top_p {s['top_p']}, at most {s['max_tokens']} "
        f"tokens, seed {s['seed']}. On {report['hardware']}.",
        "",
        *[f"- {c['name']}: {c['facts']}" for c in report["corrections"]],
        *[f"- the system message: {report['system']}" for row in report["rows"] if row["policy"] == PROMPTED],
        "",
        *_table(report["rows"]),
        "",
        NOTE,
        "",
        *[f"- {row['policy']}: {row['what']}" for row in report["rows"]],
        *[_say_matched(Matched(**m)) for m in report["matched"]],
        "",
        "Verdict:",
        "",
        *[f"- {sentence}." for sentence in report["verdict"]],
        *[
            f"- {s['policy']} keeps {s['mean']:.0%} [{s['low']:.0%}, {s['high']:.0%}] of what {s['of']} gains."
            for s in report["shares"]
        ],
    ]
    among = [d for d in report["differences"] if d["against"] in (LORA_ALWAYS, LORA_GATED)]
    lines += [f"- {d['policy']} minus {d['against']}: {_gain(Difference(**d))}." for d in among]
    return "\n".join([*lines, ""])


def to_svg(report: Mapping[str, Any]) -> str:
    """Gains over the base, a bar each."""
    bars = [
        Bar(row["policy"], row["gain"]["mean"], row["gain"]["low"], row["gain"]["high"], row["role"])
        for row in report["rows"]
        if row["policy"] != BASE
    ]
    return gains_svg(bars, f"Gain in pass@1 over the base: {report['model']}, {report['task']}")


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    k = max(row["k"] for row in rows if row["samples"] > 1) if any(row["samples"] > 1 for row in rows) else 0
    read = any(row["marked"] is not None for row in rows)
    head = ["policy", "pass@1", "gain", *([f"pass@{k}"] if k else []), *(["majority", "marked"] if read else [])]
    head += ["tokens", "truncated", "fired", "KL fired", "KL token", "flips"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        gain = "" if row["policy"] == BASE else _gain(Difference(**row["gain"]))
        cells = [row["policy"], f"{row['pass_at_1']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", gain]
        cells += [_share(row["pass_at_k"])] if k else []
        cells += [_share(row["majority"]), _share(row["marked"], 2)] if read else []
        cells += [f"{row['length']:.1f}", f"{row['truncated']:.1%}", f"{row['fired']:.1%}"]
        pushes = [f"{row['kl_fired']:.3f}", f"{row['kl_token']:.4f}", f"{1000 * row['flips']:.0f}"]
        lines.append(cells + (pushes if row["measured"] else [""] * 3))
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _say_matched(m: Matched) -> str:
    places = 4 if m.of == TOKEN else 3
    pushes = (
        f"{m.kl:.{places}f} nats a {m.of} where the correction has {m.wanted:.{places}f}, on the base's own completions"
    )
    if not m.near:
        return f"- {m.control} could not be matched, and is at strength {m.strength:g}: {pushes}"
    return f"- {m.control} was matched at strength {m.strength:g}: {pushes}"


def _describe(correction: Correction) -> dict[str, str]:
    facts = {"tier": correction.tier, **correction.facts, "strength": f"{correction.strength:g}"}
    words = ", ".join(f"{name} {value}" for name, value in facts.items())
    return {"name": correction.name, "facts": f"{words}, gate {correction.gate}"}


def _gain(d: Difference) -> str:
    return f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def _share(value: float | None, places: int = 3) -> str:
    return "" if value is None else f"{value:.{places}f}"
