"""The LM head's weight as a correction reads it: whole, on every rank that draws.

With tensor parallelism each rank holds a part of the vocabulary, and a delta needs the rows of any candidate: they are
gathered once, at load, before vLLM measures what memory is left for its cache: [vocab, hidden] in the model's dtype.

Invariant: the weight that is returned makes the model's own logits of a probe, so a model whose head is something else
is refused, not steered by nonsense.
"""

from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UnsupportedModel

_ALIKE = 0.9  # least correlation of the model's logits with ours; a soft-cap or a scale bends them a little


@torch.inference_mode()
def whole_head(model: Any, vocab: int, hidden: int, gather: Any) -> Tensor:
    """gather(weight) -> the ranks' parts, one after another. Every rank calls this. Raises UnsupportedModel."""
    kind = type(model).__name__
    layer = _find(model)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape[-1] != hidden:
        shape = list(weight.shape) if isinstance(weight, Tensor) else None
        raise UnsupportedModel(
            f"trimtab's plugin finds no plain LM head of {hidden} columns in {kind} (its weight: {shape}): "
            "a correction needs its rows; serve the model without a quantised head"
        )
    head: Tensor = gather(weight.detach())[:vocab]
    probe = torch.randn(2, hidden, generator=torch.Generator().manual_seed(0)).to(weight)
    logits = model.compute_logits(probe)
    if logits is None:
        raise UnsupportedModel(f"{kind} gives its logits to one rank alone, and trimtab's plugin needs them on all")
    expected = probe @ head.T
    alike = float(torch.corrcoef(torch.stack([logits[:, : len(head)].flatten(), expected.flatten()]).float())[0, 1])
    if len(head) < vocab or not alike > _ALIKE:
        raise UnsupportedModel(
            f"the logits of {kind} are not its hidden states times its LM head [{len(head)}, {hidden}] (correlation "
            f"{alike:.3f}): trimtab's plugin does not know this family"
        )
    return head


def _find(model: Any) -> Any:
    """The layer that makes logits: the model's, or that of the language model inside it."""
    inner = model.get_language_model() if callable(getattr(model, "get_language_model", None)) else None
    for owner in (model, inner, getattr(model, "language_model", None)):
        layer = getattr(owner, "lm_head", None)
        if layer is not None:
            return getattr(layer, "base_layer", layer)  # under a LoRA's
    return None
