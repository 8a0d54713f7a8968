"""A correction: the learned artefact, and its folder `correction.json` + `correction.safetensors`. No pickle.

Invariant: a Correction that exists is well-formed (shapes agree, numbers are finite), and one that `check` let pass
belongs to this very base: weights, tokenizer and chat template. The JSON holds the tensors' digest, so a folder whose
two files stem from different writes is refused, never mixed.

    delta_c = cap * tanh( w_c . (B A h / s_h + b) / s_w / cap )        c in the base's top_k tokens, where H > tau

    save(correction, folder);  correction = load(folder);  check(correction, base.identity)
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from trimtab.errors import CorrectionError
from trimtab.steering.atomic import write_bytes, write_json

FORMAT = 1  # of the folder; raised when an older reader would misread a newer folder
MAX_TOP_K = 64  # the step kernel keeps at most this many candidates

_JSON, _TENSORS = "correction.json", "correction.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class BaseIdentity:
    """What a correction is tied to: a model's name for people, and hashes of what must not change."""

    model: str
    fingerprint: str  # of the weights
    tokenizer: str
    chat_template: str


@dataclass(frozen=True)
class Gate:
    """Where a correction acts: at steps whose base entropy is above tau nats."""

    kind: str = "entropy"
    tau: float = 0.5

    def __post_init__(self) -> None:
        _require(self.kind == "entropy", f'gate.kind must be "entropy", not {self.kind!r}')
        _require(math.isfinite(self.tau), f"gate.tau must be a finite number of nats, not {self.tau}")


@dataclass(frozen=True, eq=False)
class Correction:
    """A head-tier correction of one base. Tensors are float32 on the CPU."""

    name: str
    rank: int
    top_k: int  # candidates: the base's best tokens, the only ones whose logits change
    base: BaseIdentity
    A: Tensor  # [rank, hidden]
    B: Tensor  # [hidden, rank]
    b: Tensor  # [hidden]
    hidden_scale: float  # s_h: root mean square of h where it was fitted
    row_scale: float  # s_w: root mean square of the candidates' LM head rows there
    cap: float = 3.0  # |delta| stays below
    gate: Gate = field(default_factory=Gate)
    strength: float = 1.0  # the default; a request may set its own
    tier: str = "head"
    provenance: Mapping[str, Any] = field(default_factory=dict)  # how it was made: JSON values
    report: Mapping[str, Any] | None = None  # what it did on held-out problems: JSON values

    def __post_init__(self) -> None:
        _require(
            _NAME.fullmatch(self.name) is not None,
            f"name must be 1 to 64 of A-Z a-z 0-9 . _ - and start with a letter or digit, not {self.name!r}",
        )
        _require(self.tier == "head", f'tier must be "head", not {self.tier!r}')
        _require(self.rank >= 1, f"rank must be at least 1, not {self.rank}")
        _require(1 <= self.top_k <= MAX_TOP_K, f"top_k must be 1 to {MAX_TOP_K}, not {self.top_k}")
        for name in ("cap", "hidden_scale", "row_scale"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"{name} must be a positive number, not {value}")
        _require(math.isfinite(self.strength), f"strength must be a finite number, not {self.strength}")
        hidden = self.b.shape[0] if self.b.dim() == 1 else 0
        for name, shape in (("A", (self.rank, hidden)), ("B", (hidden, self.rank)), ("b", (hidden,))):
            tensor: Tensor = getattr(self, name)
            _require(tensor.dtype == torch.float32, f"{name} must be float32, not {tensor.dtype}")
            _require(
                hidden > 0 and tuple(tensor.shape) == shape,
                f"{name} must have the shape {list(shape)} (rank {self.rank}), not {list(tensor.shape)}",
            )
            _require(bool(torch.isfinite(tensor).all()), f"{name} holds NaN or infinity")

    @property
    def hidden(self) -> int:
        """The base's hidden size."""
        return self.b.shape[0]


def save(correction: Correction, folder: str | Path) -> None:
    """Write the correction's two files, each atomically. A crash between them leaves a folder that `load` refuses."""
    tensors = {name: getattr(correction, name).detach().cpu().contiguous() for name in ("A", "B", "b")}
    content = save_tensors(tensors)
    described = {
        f.name: getattr(correction, f.name) for f in dataclasses.fields(correction) if f.name not in tensors
    } | {
        "base": dataclasses.asdict(correction.base),
        "gate": dataclasses.asdict(correction.gate),
        "provenance": dict(correction.provenance),
        "report": None if correction.report is None else dict(correction.report),
        "format": FORMAT,
        "tensors_sha256": hashlib.sha256(content).hexdigest(),
    }
    write_bytes(Path(folder) / _TENSORS, content)
    write_json(Path(folder) / _JSON, described)


def load(folder: str | Path) -> Correction:
    """Read a folder that `save` wrote. Raises CorrectionError naming the file and the field."""
    path = Path(folder) / _JSON
    described = _read_json(path)
    try:
        content = (Path(folder) / _TENSORS).read_bytes()
    except OSError as error:
        raise CorrectionError(f"{Path(folder) / _TENSORS}: cannot be read ({error.strerror})") from error
    try:
        if described.pop("tensors_sha256", None) != hashlib.sha256(content).hexdigest():
            raise CorrectionError(
                f"does not belong to {_TENSORS} beside it (its digest differs): copy both files again"
            )
        for name, shape in (("base", BaseIdentity), ("gate", Gate)):
            described[name] = _build(shape, described.get(name), name)
        correction: Correction = _build(Correction, described | _read_tensors(content), "correction")
        return correction
    except CorrectionError as error:
        raise CorrectionError(f"{path}: {error}") from error


def check(correction: Correction, identity: BaseIdentity) -> None:
    """Raise CorrectionError, naming both bases and what differs, unless the correction was fitted to this base."""
    made_for = correction.base
    parts = {"weights": "fingerprint", "tokenizer": "tokenizer", "chat template": "chat_template"}
    differ = [words for words, name in parts.items() if getattr(made_for, name) != getattr(identity, name)]
    if differ:
        raise CorrectionError(
            f"the correction {correction.name!r} was fitted to {made_for.model!r} and cannot steer {identity.model!r}: "
            f"other {' and '.join(differ)}. Serve it with {made_for.model!r}, or fit a new one to {identity.model!r} "
            "(trimtab fit)"
        )


_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "tier", "kind", "model", "fingerprint", "tokenizer", "chat_template"), str),
    **dict.fromkeys(("rank", "top_k"), int),
    **dict.fromkeys(("cap", "strength", "hidden_scale", "row_scale", "tau"), (int, float)),
    "provenance": dict,
    "report": (dict, type(None)),
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_bytes())
    except OSError as error:
        raise CorrectionError(f"{path}: cannot be read ({error.strerror}): is this a correction's folder?") from error
    except ValueError as error:
        raise CorrectionError(f"{path}: is not JSON ({error})") from error
    if not isinstance(described, dict):
        raise CorrectionError(f"{path}: must hold a JSON object")
    version = described.pop("format", None)
    if version != FORMAT:
        raise CorrectionError(f"{path}: format is {version!r}; this version of trimtab reads {FORMAT}")
    return described


def _read_tensors(content: bytes) -> dict[str, Tensor]:
    try:
        tensors = load_tensors(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorrectionError(f"{_TENSORS} is not a safetensors file ({error})") from error
    _require(set(tensors) == {"A", "B", "b"}, f"{_TENSORS} must hold A, B and b, not {sorted(tensors)}")
    return tensors


def _build(shape: Any, described: Any, where: str) -> Any:
    """Make the dataclass `shape` of a JSON object: exactly its fields, each of its type."""
    _require(isinstance(described, dict), f"{where} must be a JSON object")
    known = {f.name for f in dataclasses.fields(shape)}
    _require(not known - set(described), f"{where} lacks {', '.join(sorted(known - set(described)))}")
    _require(not set(described) - known, f"{where} has an unknown field: {', '.join(sorted(set(described) - known))}")
    for name, value in described.items():
        if name in _TYPES:
            right = isinstance(value, _TYPES[name]) and not isinstance(value, bool)
            _require(right, f"{name} has the wrong type: {value!r}")
    return shape(**described)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise CorrectionError(message)
