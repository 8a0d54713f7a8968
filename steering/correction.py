"""A correction: the learned artefact, one dataclass a tier. folder.py reads and writes its folder.

    head      delta_c = cap * tanh( w_c . (B act(A h / s_h) + b) / s_w / cap )    c in the base's top_k tokens
              z' = z + s * delta, where the gate opens
    lora      a companion row runs with the adapter on:       z' = (1 - s) z + s z_companion
    contrast  a companion row reads another prompt:           z' = (1 + s) z - s z_companion

Invariant: a Correction that exists is well-formed (shapes agree, numbers are finite), and one that `check` let pass
belongs to this very base: weights, tokenizer and chat template.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.errors import CorrectionError
from trimtab.steering.adapter import Adapter
from trimtab.steering.gate import Gate

MAX_TOP_K = 64  # the step kernel keeps at most this many candidates
ACTIVATIONS = ("none", "silu")
MOST_STRENGTH = 100.0  # that a correction may have, and a request ask for: more overflows
CONTRAST = "contrast"  # the built-in correction of that tier, which any base has
TAKEN = {
    CONTRAST: "the built-in correction's name",
    **dict.fromkeys(("none", "others"), "what metrics call the base, or corrections beyond a number"),
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class BaseIdentity:
    """What a correction is tied to: a model's name for people, and hashes of what must not change."""

    model: str
    fingerprint: str  # of the weights
    tokenizer: str
    chat_template: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Correction:
    """What every tier has."""

    tier: ClassVar[str]

    name: str
    base: BaseIdentity
    gate: Gate = field(default_factory=Gate)
    strength: float = 1.0  # the default; a request may set its own
    provenance: Mapping[str, Any] = field(default_factory=dict)  # how it was made: JSON values
    report: Mapping[str, Any] | None = None  # what it did on held-out problems: JSON values

    def __post_init__(self) -> None:
        require(
            _NAME.fullmatch(self.name) is not None,
            f"name must be 1 to 64 of A-Z a-z 0-9 . _ - and start with a letter or digit, not {self.name!r}",
        )
        require(abs(self.strength) <= MOST_STRENGTH, f"strength must be within {MOST_STRENGTH:g}, not {self.strength}")

    @property
    def facts(self) -> dict[str, Any]:
        """What the tier adds, as JSON values."""
        return {}


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadCorrection(Correction):
    """A low-rank function of h on the base's best tokens. KV-neutral. Tensors are float32 on the CPU."""

    tier: ClassVar[str] = "head"

    rank: int  # 0: the constant vector b alone
    top_k: int  # candidates: the base's best tokens, the only ones whose logits change
    A: Tensor  # [rank, hidden]
    B: Tensor  # [hidden, rank]
    b: Tensor  # [hidden]
    hidden_scale: float  # s_h: root mean square of h where it was fitted
    row_scale: float  # s_w: root mean square of the candidates' LM head rows there
    cap: float = 3.0  # |delta| stays below
    activation: str = "none"  # act, between A and B

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 0, f"rank must be at least 0, not {self.rank}")
        require(1 <= self.top_k <= MAX_TOP_K, f"top_k must be 1 to {MAX_TOP_K}, not {self.top_k}")
        require(
            self.activation in ACTIVATIONS,
            f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}",
        )
        for name in ("cap", "hidden_scale", "row_scale"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"{name} must be a positive number, not {value}")
        hidden = self.b.shape[0] if self.b.dim() == 1 else 0
        for name, shape in (("A", (self.rank, hidden)), ("B", (hidden, self.rank)), ("b", (hidden,))):
            tensor: Tensor = getattr(self, name)
            require(tensor.dtype == torch.float32, f"{name} must be float32, not {tensor.dtype}")
            require(
                hidden > 0 and tuple(tensor.shape) == shape,
                f"{name} must have the shape {list(shape)} (rank {self.rank}), not {list(tensor.shape)}",
            )
            require(bool(torch.isfinite(tensor).all()), f"{name} holds NaN or infinity")

    @property
    def hidden(self) -> int:
        """The base's hidden size."""
        return self.b.shape[0]

    @property
    def facts(self) -> dict[str, Any]:
        parameters = self.A.numel() + self.B.numel() + self.b.numel()
        shape = {name: getattr(self, name) for name in ("rank", "top_k", "cap", "activation")}
        return {**shape, "parameters": parameters}


@dataclass(frozen=True, eq=False, kw_only=True)
class LoraCorrection(Correction):
    """A LoRA inside the network. A companion row computes it; one that is always on may run alone (rule.py)."""

    tier: ClassVar[str] = "lora"

    adapter: Adapter

    @property
    def facts(self) -> dict[str, Any]:
        layers = sorted({path.rpartition(".")[2] for path in self.adapter.layers})
        return {"rank": self.adapter.rank, "layers": layers, "parameters": self.adapter.parameters}


@dataclass(frozen=True, eq=False, kw_only=True)
class ContrastCorrection(Correction):
    """Guidance away from what the base would say to another prompt. Nothing is learned, so it fits any base."""

    tier: ClassVar[str] = "contrast"

    base: BaseIdentity = BaseIdentity("any", "", "", "")
    strength: float = 0.5
    prompt: str = ""  # what the companion reads in place of the user's last message, or of the prompt

    @property
    def facts(self) -> dict[str, Any]:
        return {"prompt": self.prompt}


TIERS: Mapping[str, type[Correction]] = {c.tier: c for c in (HeadCorrection, LoraCorrection, ContrastCorrection)}


_ROUNDED = ". Weights that were rounded to float16 are others too: there is bfloat16, or float32"


def check(correction: Correction, identity: BaseIdentity) -> None:
    """Raise CorrectionError, naming both bases and what differs, unless the correction was fitted to this base; and
    for a name that is taken."""
    whose = TAKEN.get(correction.name)
    allowed = whose is None or (correction.name == CONTRAST and isinstance(correction, ContrastCorrection))
    require(allowed, f"{correction.name} is {whose}: give this correction another name")
    if isinstance(correction, ContrastCorrection):
        return
    made_for = correction.base
    parts = {"weights": "fingerprint", "tokenizer": "tokenizer", "chat template": "chat_template"}
    known = {words: name for words, name in parts.items() if getattr(made_for, name)}  # PEFT's folders tell none
    differ = [words for words, name in known.items() if getattr(made_for, name) != getattr(identity, name)]
    if differ:
        raise CorrectionError(
            f"the correction {correction.name!r} was fitted to {made_for.model!r} and cannot steer {identity.model!r}: "
            f"other {' and '.join(differ)}. Serve it with {made_for.model!r}, or fit a new one to {identity.model!r} "
            f"(trimtab fit){_ROUNDED if 'weights' in differ else ''}"
        )


def require(holds: bool, message: str) -> None:
    """Raise CorrectionError unless it holds."""
    if not holds:
        raise CorrectionError(message)
