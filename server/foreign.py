"""Keys of a body that have no field in schema.py: which of them are refused, and which do no harm.

Invariant: a key of OpenAI's or vLLM's that would change the answer, and that this server does not do, is refused, never
ignored; null is the same as not sent. Keys that nobody knows are accepted.

    refuse(extra);  unknown(extra);  Unknown().tell(keys)
"""

import logging
from collections.abc import Collection, Mapping
from itertools import islice

from trimtab.errors import InvalidRequest

log = logging.getLogger(__name__)

MOST = 100  # unknown keys that are told of
SHOWN = 64  # characters of each

# Accepted and without effect, by OpenAI's or vLLM's own definition.
_IGNORED = {
    "guided_decoding_backend",
    "metadata",
    "parallel_tool_calls",
    "priority",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
# Not done here. The values that ask for nothing stand with each. What one endpoint knows is refused at the other.
_REFUSED: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (False,),
    "audio": (),
    "cache_salt": ("",),
    "chat_template": (),
    "context_management": ([],),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "max_completion_tokens": (),
    "modalities": ([], ["text"]),
    "moderation": ({},),
    "prediction": (),
    "prompt_embeds": (),
    "repetition_detection": ({},),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "web_search_options": (),  # to OpenAI, an empty one asks for a search
}

_INSTEAD = {"functions": "tools", "function_call": "tool_choice", "vllm_xargs": "steering"}


def refuse(extra: Mapping[str, object]) -> None:
    """Raise InvalidRequest for a key that asks for something which is not done here."""
    for key, nothing in _REFUSED.items():
        value = extra.get(key)
        if value is not None and value not in nothing:
            advice = f"send {_INSTEAD[key]}" if key in _INSTEAD else "leave it out"
            raise InvalidRequest(f"{key} is not supported by this server: {advice}", key)


def unknown(extra: Mapping[str, object]) -> set[str]:
    """The keys that nothing here knows."""
    return set(extra) - _IGNORED - set(_REFUSED)


class Unknown:
    """Tells the log, once of each, of keys that nothing here knows: a misspelled one has no effect."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, keys: Collection[str]) -> None:
        """No more than MOST in all, and the beginning of each: a caller may send any number, of any length."""
        new = sorted({key[:SHOWN] for key in islice(keys, MOST)} - self._told)[: MOST - len(self._told)]
        if new:
            self._told.update(new)
            log.warning("accepted without effect, as nothing here knows them: %s", ", ".join(map(repr, new)))
