"""A correction's folder: `correction.json`, and the files of its tier. No pickle.

    head      correction.json + correction.safetensors
    lora      correction.json + adapter_config.json + adapter_model.safetensors (PEFT's, so that PEFT loads it too)
    contrast  correction.json

Invariant: the JSON holds a digest of the other files, and what would make a folder readable is written last: the JSON,
or for a LoRA the adapter_config.json, without which PEFT reads nothing either. So a folder that a crash left half
written, or whose files stem from different writes, is refused, never mixed. (A LoRA's without its correction.json, as
an unfinished copy may be, is a PEFT folder like any other.)

    save(correction, folder);  correction = load(folder)
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from trimtab.errors import CorrectionError
from trimtab.steering.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_files, parse_adapter, read_adapter
from trimtab.steering.atomic import write_bytes, write_json
from trimtab.steering.correction import (
    TIERS,
    BaseIdentity,
    Correction,
    HeadCorrection,
    LoraCorrection,
    require,
)
from trimtab.steering.gate import Gate

FORMAT = 1  # raised when an older reader would misread a newer folder
MAX_DEPTH = 64  # of its JSON: what answers with it, pydantic among them, recurses

JSON_FILE, TENSORS_FILE = "correction.json", "correction.safetensors"

_FILES: Mapping[str, tuple[str, ...]] = {
    "head": (TENSORS_FILE,),
    "lora": (WEIGHTS_FILE, CONFIG_FILE),
    "contrast": (),
}
_HEAD_TENSORS = ("A", "B", "b")


def save(correction: Correction, folder: str | Path) -> None:
    """Write the correction's files, each atomically. A crash between them leaves a folder that `load` refuses."""
    folder = Path(folder)
    files = _files_of(correction)
    described = _describe(correction, files)
    config = files.pop(CONFIG_FILE, None)
    for name, content in files.items():
        write_bytes(folder / name, content)
    write_json(folder / JSON_FILE, described)
    if config is not None:  # after the JSON: without that one, it would say that the LoRA is always on
        write_bytes(folder / CONFIG_FILE, config)


def is_saved(folder: Path) -> bool:
    """Whether a first `save` into the folder came to its end."""
    if not (folder / JSON_FILE).is_file():
        return False
    tier = _read_json(folder / JSON_FILE).get("tier")
    return all((folder / name).is_file() for name in _FILES.get(str(tier), ()))


def holds_correction(folder: Path) -> bool:
    """Whether it is a correction's folder, a PEFT folder included."""
    return any((folder / name).is_file() for name in (JSON_FILE, CONFIG_FILE))


def load(folder: str | Path) -> Correction:
    """Read a folder that `save` wrote, or a PEFT LoRA's, which is then always on. Raises CorrectionError."""
    folder = Path(folder)
    path = folder / JSON_FILE
    if not path.is_file() and (folder / CONFIG_FILE).is_file():
        return _load_peft(folder)
    described = _read_json(path)
    try:
        tier = described.pop("tier", None)
        require(isinstance(tier, str) and tier in TIERS, f"tier must be one of {', '.join(TIERS)}, not {tier!r}")
        files = {name: _read(folder / name) for name in _FILES[tier]}
        if described.pop("tensors_sha256", None) != _digest(files.values()):
            beside = " and ".join(files) or "it"
            raise CorrectionError(f"does not belong to {beside} beside it (the digest differs): copy all files again")
        described["base"] = _build(BaseIdentity, described.get("base"), "base")
        described["gate"] = _build(Gate, _parse_gate(described.get("gate")), "gate")
        if tier == "head":
            described |= _read_tensors(files[TENSORS_FILE])
        elif tier == "lora":
            described["adapter"] = parse_adapter(files[CONFIG_FILE], files[WEIGHTS_FILE])
        correction: Correction = _build(TIERS[tier], described, "correction")
        return correction
    except CorrectionError as error:
        raise CorrectionError(f"{path}: {error}") from error


def digest(correction: Correction) -> str:
    """Of what was learned: all that decides what it does where it acts, at a given strength."""
    described = _describe(correction, _files_of(correction))
    for told in ("name", "base", "strength", "gate", "provenance", "report"):
        del described[told]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def version_of(correction: Correction) -> str:
    """A short digest of all that `save` would write but the name, so that one artefact is the same everywhere."""
    described = _describe(correction, _files_of(correction))
    del described["name"]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def _load_peft(folder: Path) -> LoraCorrection:
    adapter = read_adapter(folder)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name).lstrip("._-")[:64] or "lora"
    made_for = str(adapter.config.get("base_model_name_or_path") or "unknown")
    identity = BaseIdentity(made_for, "", "", "")  # PEFT does not say; shapes are checked when it is put on a model
    return LoraCorrection(name=name, base=identity, gate=Gate("always"), adapter=adapter)


def _describe(correction: Correction, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What its JSON holds."""
    return {
        f.name: getattr(correction, f.name)
        for f in dataclasses.fields(correction)
        if f.name not in (*_HEAD_TENSORS, "adapter")
    } | {
        "tier": correction.tier,
        "base": dataclasses.asdict(correction.base),
        "gate": _describe_gate(correction.gate),
        "provenance": dict(correction.provenance),
        "report": None if correction.report is None else dict(correction.report),
        "format": FORMAT,
        "tensors_sha256": _digest(files.values()),
    }


def _files_of(correction: Correction) -> dict[str, bytes]:
    """In the order of _FILES, which the digest depends on."""
    if isinstance(correction, HeadCorrection):
        tensors = {name: getattr(correction, name).detach().cpu().contiguous() for name in _HEAD_TENSORS}
        return {TENSORS_FILE: save_tensors(tensors)}
    return adapter_files(correction.adapter) if isinstance(correction, LoraCorrection) else {}


def _digest(contents: Any) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def _describe_gate(gate: Gate) -> dict[str, Any]:
    """JSON knows no infinity: a gate without a ceiling says null."""
    return dataclasses.asdict(gate) | {"ceiling": gate.ceiling if math.isfinite(gate.ceiling) else None}


def _parse_gate(described: Any) -> Any:
    if not isinstance(described, dict):
        return described
    ceiling = described.get("ceiling")
    table = described.get("calibration", [])
    fine = isinstance(table, list) and all(
        isinstance(row, list) and len(row) == 2 and all(_is(value, (int, float)) for value in row) for row in table
    )
    require(fine, "gate.calibration must be a list of [rate, tau]")
    return described | {
        "ceiling": math.inf if ceiling is None else ceiling,
        "calibration": tuple((float(rate), float(tau)) for rate, tau in table),
    }


_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "kind", "model", "fingerprint", "tokenizer", "chat_template"), str),
    **dict.fromkeys(("activation", "prompt"), str),
    **dict.fromkeys(("rank", "top_k"), int),
    **dict.fromkeys(("cap", "strength", "hidden_scale", "row_scale", "tau", "ceiling"), (int, float)),
    "provenance": dict,
    "report": (dict, type(None)),
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(_read(path))
        json.dumps(described, ensure_ascii=False, allow_nan=False).encode()  # as whoever asks for it will be told
    except CorrectionError as error:
        raise CorrectionError(f"{error}: is this a correction's folder?") from error
    except (ValueError, RecursionError) as error:
        raise CorrectionError(f"{path}: is not JSON ({error})") from error
    if not isinstance(described, dict):
        raise CorrectionError(f"{path}: must hold a JSON object")
    if _is_deeper(described, MAX_DEPTH):
        raise CorrectionError(f"{path}: must not hold lists and objects more than {MAX_DEPTH} levels deep")
    version = described.pop("format", None)
    if version != FORMAT:
        raise CorrectionError(f"{path}: format is {version!r}; this version of trimtab reads {FORMAT}")
    return described


def _is_deeper(described: dict[str, Any], levels: int) -> bool:
    """Whether lists and objects stand in one another, so many levels and more."""
    inner: list[Any] = [described]
    for _ in range(levels):
        entries = (entry for one in inner for entry in (one.values() if isinstance(one, dict) else one))
        inner = [entry for entry in entries if isinstance(entry, list | dict)]
    return bool(inner)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorrectionError(f"{path}: cannot be read ({error.strerror})") from error


def _read_tensors(content: bytes) -> dict[str, Tensor]:
    try:
        tensors = load_tensors(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorrectionError(f"{TENSORS_FILE} is not a safetensors file ({error})") from error
    require(set(tensors) == set(_HEAD_TENSORS), f"{TENSORS_FILE} must hold A, B and b, not {sorted(tensors)}")
    return tensors


def _build(shape: Any, described: Any, where: str) -> Any:
    """Make the dataclass `shape` of a JSON object: its fields, each of its type, and no others."""
    require(isinstance(described, dict), f"{where} must be a JSON object")
    fields = {f.name: f for f in dataclasses.fields(shape)}
    needed = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    require(not needed - set(described), f"{where} lacks {', '.join(sorted(needed - set(described)))}")
    unknown = sorted(set(described) - set(fields))
    require(not unknown, f"{where} has an unknown field: {', '.join(unknown)}")
    for name, value in described.items():
        if name in _TYPES:
            require(_is(value, _TYPES[name]), f"{name} has the wrong type: {value!r}")
    return shape(**described)


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
