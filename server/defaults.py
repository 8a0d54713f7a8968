"""How a model's makers would sample from it: the part of its generation_config that a request may leave unsaid.

Invariant: what is not in the file stays as OpenAI has it (temperature 1, top_p 1); a value that no request could send
is refused at the start.

    defaults = sampling_defaults(base)
"""

from typing import Any

from trimtab.errors import InvalidRequest, UnsupportedModel
from trimtab.server.engine.request import SamplingParams
from trimtab.server.model.base import Base

_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def sampling_defaults(base: Base) -> dict[str, Any]:
    """Of SamplingParams, what the model's own configuration sets. Raises UnsupportedModel."""
    config = base.model.generation_config
    told = {} if config is None else config.to_diff_dict()
    found = {ours: told[theirs] for theirs, ours in _NAMES.items() if told.get(theirs) is not None}
    try:
        SamplingParams(**found)
    except (InvalidRequest, TypeError) as error:
        raise UnsupportedModel(f"{base.name}'s generation_config cannot be used: {error}") from error
    return found
