"""What is being served, in words for the operator: printed at start, and logged by each replica of a fleet."""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.server.engine.rule import slots_of
from trimtab.server.model.base import Base
from trimtab.server.model.kv import size_of
from trimtab.steering.bank import Bank, Entry


def describe(
    base: Base,
    bank: Bank,
    names: Sequence[str],
    slots: int,
    max_len: int,
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """What is being served, for the operator. defaults: of sampling."""
    values = {"temperature": 1, "top_p": 1} | dict(defaults or {})
    source = " by the model's generation_config" if defaults else ""
    cache = size_of(base.config, slots, max_len, base.dtype)
    lines = [
        f"model        {', '.join(names)} ({str(base.dtype).removeprefix('torch.')} on {base.device})",
        f"slots        {slots} of {max_len} tokens: a KV cache of {cache / 1e6:,.0f} MB",
        f"sampling     {', '.join(f'{name} {value:g}' for name, value in values.items())}{source}"
        " unless a request says otherwise",
    ]
    corrections = [_describe_correction(entry) for entry in bank.entries]
    return "\n".join([*lines, *(f"correction   {line}" for line in corrections or ["none"])])


def describe_keys(api: Sequence[str], admin: Sequence[str]) -> str:
    """Who may come in."""
    asking = f"{len(api)} for /v1" if api else "none for /v1: whoever reaches it may ask"
    changing = f"{len(admin)} for changes" if admin else "none for changes: nobody may make any"
    return f"keys         {asking}; {changing}"


def _describe_correction(entry: Entry) -> str:
    """One line, and one with the verdict where something was learned."""
    correction = entry.correction
    facts = ", ".join(f"{name} {_say(value)}" for name, value in correction.facts.items())
    slots = "; two slots a choice" if slots_of(correction) == 2 else ""
    line = f"{correction.name}: {correction.tier} ({facts}), strength {correction.strength:g} where {correction.gate}"
    if correction.tier == "contrast" and correction.report is None:
        return f"{line}{slots}"
    verdict = (correction.report or {}).get("verdict")
    found = verdict.get("summary") if isinstance(verdict, dict) else None
    return (
        f"{line}{slots}; version {entry.version}\n"
        f"             held out: {found or 'never evaluated: its report has no verdict'}"
    )


def _say(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value) or '""'
