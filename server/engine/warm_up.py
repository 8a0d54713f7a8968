"""The first steps of an engine: what they compile and allocate, the first requests would wait for.

Invariant: when it returns, the engine is as one that was just made; and what will not fit the memory has been tried.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from trimtab.errors import EngineFailure
from trimtab.server.engine.request import Request, SamplingParams, Steering
from trimtab.steering.correction import CONTRAST

if TYPE_CHECKING:
    from trimtab.server.engine.core import Core


def warm_up(core: "Core") -> None:
    """Prompts, draws, edits, masks, a head, a LoRA, companions; then all slots, for which memory may not suffice.

    Raises EngineFailure.
    """
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=0, max_tokens=2, ignore_eos=True)
    found = {core.bank.get(name).tier: Steering(name) for name in reversed(core.bank.names)}
    heads, loras = ([found[tier]] if tier in found else [] for tier in ("head", "lora"))
    slots, prompt = core.config.slots, (0,) * min(8, core.max_len - 1)
    contrast = Steering(CONTRAST, companion_prompt=prompt)
    kinds = [Steering(), *heads]
    if slots > 1:  # a companion takes the second
        kinds += [contrast, *loras]
    biased = replace(sampling, logit_bias={0: 1.0})
    masked = [replace(draws, allowed_tokens=frozenset({0, 1})) for draws in (sampling, biased)]
    for draws in (sampling, biased, *masked):
        for steering in kinds:
            _try(core, [Request("warm-up", prompt, draws, steering)])
    longest = (1,) * min(core.config.step_tokens, core.max_len - 1)  # of which no slot holds a beginning
    _try(core, [Request(f"warm-up {i}", longest if i == 0 else prompt, sampling) for i in range(slots)])
    _try(core, [Request(f"warm-up {i}", prompt, sampling, contrast) for i in range(slots // 2)])
    core.forget()


def _try(core: "Core", requests: Iterable[Request]) -> None:
    for event in core.run(requests):
        if event.error is not None:
            advice = "where memory ran out, take fewer slots (--max-num-seqs) or shorter ones (--max-model-len)"
            raise EngineFailure(f"the engine's first steps failed ({event.error}): {advice}")
