"""Head corrections inside an unmodified vLLM: the same folders, gate and mathematics as in our own engine.

    pip install '.[vllm]'
    TRIMTAB_CORRECTIONS=DIR vllm serve MODEL --logits-processors trimtab.server.vllm_plugin:Processor
    {"model": ..., "prompt": ..., "vllm_xargs": {"correction": "NAME", "strength": 0.5}}

    hook.py       the entry point: sees h and z of every step          processor.py  writes z' where a row fired
    settings.py   which corrections, from where                         ask.py        what a request asks
    table.py      what the rows of a batch ask, in tensors              batch.py      who sits in which row, by runner
    support.py    which vLLM, and what of it                            head.py       the LM head's weight, whole
    base.py       is this the base they were fitted to?                 receipts.py   what was done: a log, and metrics

Invariant: nothing of vLLM is imported before vLLM itself asks for it; no other part of this package imports vLLM.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.server.vllm_plugin.processor import Processor

__all__ = ["Processor"]


def __getattr__(name: str) -> Any:
    """The processor, when vLLM looks for it: the entry point is loaded before vLLM is ready for its import."""
    if name == "Processor":
        from trimtab.server.vllm_plugin.processor import Processor

        return Processor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
