"""A token study as Markdown: where tuning moved the best token, and what each intervention was worth."""

from collections.abc import Mapping
from typing import Any

from trimtab.steering.evaluation.report import few

_TOKENS = {
    "unshifted": "{:.2%}",
    "reranked": "{:.2%}",
    "shifted": "{:.2%}",
    "drawn_differently": "{:.2%}",
    "mean_rank": "{:.2f}",
    "entropy": "{:.3f}",
    "entropy_reranked": "{:.3f}",
    "entropy_ratio": "{:.1f}",
}
_ENTROPY = ("entropy", "at reranked", "times")
NOTE = (
    "`unshifted`: the tuned model's best token is the base's; `reranked`: it is another of the base's five best; "
    "`shifted`: none of them. `drawn`: with the same random numbers both draw different tokens. `rank`: of the "
    "promoted token among the base's (up to 20). `entropy`: of the base, nats; `at reranked` and how many `times` the "
    "mean. `taken`: positions at which a rule takes the tuned model's token; `changed`: where that is another one. "
    "Gains are over the base, paired, with 95 % bootstrap intervals over problems."
)


def to_markdown(study: Mapping[str, Any]) -> str:
    """Two tables, and what they say."""
    s = study["sampling"]
    lines = [
        f"{study['tuned']} against {study['model']}: {study['problems']} held-out problems of {study['task']}, "
        f"{s['samples']} samples each, temperature {s['temperature']}, top_p {s['top_p']}, at most {s['max_tokens']} "
        f"tokens, seed {s['seed']}. On {study['hardware']}.",
        "",
        _row("completions of", "positions", "unshifted", "reranked", "shifted", "drawn", "rank", *_ENTROPY),
        _row(*["---"] * 10),
    ]
    for name, tokens in study["tokens"].items():
        cells = ["" if tokens[key] is None else shown.format(tokens[key]) for key, shown in _TOKENS.items()]
        lines.append(_row(name, str(int(tokens["positions"])), *cells))
    lines += ["", _row("rule", "pass@1", "gain", "taken", "changed", "tokens"), _row(*["---"] * 6)]
    for rule in study["rules"]:
        d = rule["gain"]
        gain = "" if rule["policy"] == "base" else f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
        rate = f"{rule['pass_at_1']:.3f} [{rule['low']:.3f}, {rule['high']:.3f}]"
        shares = [f"{rule['fired']:.2%}", f"{rule['flips']:.2%}", f"{rule['length']:.1f}"]
        lines.append(_row(rule["policy"], rate, gain, *shares))
    lines += ["", NOTE, ""]
    if not study["shares"]:
        lines.append("The tuned model's gain over the base is not above 0 here: no share of it can be told.")
    for share in study["shares"]:
        span = f"[{share['low']:.0%}, {share['high']:.0%}]"
        lines.append(f"- {share['policy']} has {share['mean']:.0%} {span} of the tuned model's gain.")
    lines += [f"- {warning}." for warning in few(study["problems"])]
    return "\n".join([*lines, ""])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
