"""How the engine runs: one frozen dataclass, validated here, passed whole."""

from dataclasses import dataclass

from trimtab.errors import InvalidRequest

DEFAULT_MAX_LEN = 4096


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and limits of one engine. Memory for the KV cache is slots * max_model_len tokens, reserved at start."""

    slots: int = 32  # sequences that run at once
    max_model_len: int | None = None  # tokens a sequence may hold; None: the model's own, at most 4096
    step_tokens: int = 512  # tokens computed a step: decode rows first, then prompt chunks
    pause: int | None = None  # steps between two that read prompts, where most slots are taken; None: 8 with graphs
    max_queue: int = 512  # choices that may wait; beyond it, Overloaded
    max_queue_tokens: int | None = None  # tokens of prompts that may wait to be read; beyond it, Overloaded
    graphs: bool = True  # on CUDA, decode steps are captured at start and replayed; without, they are far slower
    threads: int = 1  # torch threads: more than the free cores is far slower than one

    def __post_init__(self) -> None:
        for name in ("slots", "step_tokens", "max_queue", "threads"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}", name)
        if self.pause is not None and self.pause < 0:
            raise InvalidRequest(f"pause must be at least 0, not {self.pause}", "pause")
        if self.max_queue_tokens is not None and self.max_queue_tokens < 1:
            message = f"max_queue_tokens must be at least 1, not {self.max_queue_tokens}"
            raise InvalidRequest(message, "max_queue_tokens")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise InvalidRequest(f"max_model_len must be at least 2, not {self.max_model_len}", "max_model_len")

    def length_within(self, most: int) -> int:
        """How many tokens a sequence may hold, of a model that takes `most`. Raises InvalidRequest beyond those."""
        if self.max_model_len is None:
            return min(most, DEFAULT_MAX_LEN)
        if self.max_model_len > most:
            message = f"max_model_len must be at most the model's {most}, not {self.max_model_len}"
            raise InvalidRequest(message, "max_model_len")
        return self.max_model_len
