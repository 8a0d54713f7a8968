"""Who a base is, so that a correction made for another is refused: hashes of weights, tokenizer and chat template.

Invariant: the fingerprint reads every parameter rounded to bfloat16, as the sum of its bits and a sample of values, so
that it is the same whether the model is served in float32 or in bfloat16.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trimtab.steering.correction import BaseIdentity


def identify(model: Any, tokenizer: Any, name: str) -> BaseIdentity:
    """Of a transformers model and its tokenizer."""
    words, template = identify_words(tokenizer)
    weights = fingerprint(sorted(model.state_dict().items()))
    return BaseIdentity(model=name, fingerprint=weights, tokenizer=words, chat_template=template)


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Of all parameters in the order of their names, by which transformers calls them."""
    weights = hashlib.sha256()
    for key, parameter in parameters:
        bits = parameter.detach().flatten().bfloat16().view(torch.int16)
        sample = bits[:: max(1, bits.numel() // 64)][:64].cpu().numpy().tobytes()
        weights.update(f"{key}{tuple(parameter.shape)}{int(bits.sum(dtype=torch.int64))}".encode() + sample)
    return weights.hexdigest()[:32]


def identify_words(tokenizer: Any) -> tuple[str, str]:
    """-> hashes of the vocabulary and of the chat template."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    template = getattr(tokenizer, "chat_template", None) or ""
    return hashlib.sha256(words.encode()).hexdigest()[:32], hashlib.sha256(str(template).encode()).hexdigest()[:32]
