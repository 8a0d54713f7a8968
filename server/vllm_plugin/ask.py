"""What a request asks of its correction: `vllm_xargs` -> a Rule, by the same words and checks as our own API.

    correction   its name; the rest is its own unless said           mode      apply, shadow, off
    strength     0 is the base                                         gate      entropy, varentropy, margin, always
    tau, ceiling it acts where tau < statistic <= ceiling              rate      instead of tau, where calibrated
    kl           nats: the most that one step may move

Invariant: an error is a ValueError that names the key, which vLLM answers with HTTP 400; other keys are not ours.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from trimtab.errors import InvalidRequest, NotFound
from trimtab.server.engine.request import Mode
from trimtab.server.engine.rule import Rule, rule_for
from trimtab.server.steering_body import SteeringBody
from trimtab.steering.bank import Bank

KEYS = ("correction", "strength", "gate", "tau", "ceiling", "rate", "mode")
KL = "kl"  # steering.budget.kl
PREFIX = "vllm_xargs."


class Asked(NamedTuple):
    """Of one request that is steered, or would be."""

    correction: str
    mode: Mode
    rule: Rule
    kl: float | None


def ask(params: Any, bank: Bank) -> Asked | None:
    """What SamplingParams ask; None where nothing is steered. Raises ValueError."""
    given = getattr(params, "extra_args", None) or {}
    if not isinstance(given, Mapping) or not any(given.get(key) is not None for key in (*KEYS, KL)):
        return None
    try:
        body = SteeringBody.model_validate({key: given[key] for key in KEYS if key in given} | _budget(given))
        if body.correction is None:
            vain = body.in_vain()
            if vain is not None:
                vain = KL if vain == "budget" else vain
                raise ValueError(f"{PREFIX}{vain} needs a correction: name one in {PREFIX}correction")
            return None
        steering = body.steering(body.weights)
        rule = rule_for(steering, bank)
    except ValidationError as error:
        found = error.errors()[0]
        raise ValueError(f"{PREFIX}{found['loc'][-1]}: {found['msg']}, not {found['input']!r}") from None
    except (InvalidRequest, NotFound) as error:
        told = str(error).replace("steering.budget.", PREFIX).replace("steering.", PREFIX)
        raise ValueError(told if PREFIX in told else f"{PREFIX}correction: {told}") from None
    if rule.gate == "random":
        raise ValueError(f"{PREFIX}gate: random is a control for experiments, which trimtab serve has")
    if getattr(params, "structured_outputs", None) is not None and body.mode != "off":
        raise ValueError(f"{PREFIX}correction: inside structured outputs nothing is steered: leave one of them out")
    return Asked(body.correction, steering.mode, rule, steering.budget.kl) if rule.steered else None


def _budget(given: Mapping[str, Any]) -> dict[str, Any]:
    return {} if given.get(KL) is None else {"budget": {"kl": given[KL]}}
