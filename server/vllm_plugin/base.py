"""Is what vLLM serves the base that these corrections were fitted to? As far as each of its processes can tell.

    check_front(corrections, hidden, name, tokenizer)     the API's process: sizes, tokenizer, chat template
    check_weights(corrections, folder)                    a worker: the fingerprint of the checkpoint's files

Invariant: what differs is refused by name; what cannot be compared is said in the log, not passed over. The fingerprint
is of transformers' names: a checkpoint that it would rename is refused too, unless any base will do (settings.py).
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from trimtab.errors import CorrectionError
from trimtab.server.vllm_plugin.settings import ANY_BASE
from trimtab.steering.correction import HeadCorrection
from trimtab.steering.identity import fingerprint, identify_words

log = logging.getLogger("vllm.trimtab")  # below vllm's, so that it is shown as vllm's is

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check_front(corrections: Sequence[HeadCorrection], hidden: int, name: str, tokenizer: Any, any_base: bool) -> None:
    """Raise CorrectionError. tokenizer: None where vLLM has none."""
    for correction in corrections:
        if correction.hidden != hidden:
            raise CorrectionError(
                f"the correction {correction.name!r} has the hidden size {correction.hidden}; {name!r} has {hidden}"
            )
    if tokenizer is None:
        log.warning("trimtab: vLLM has no tokenizer here, so it was not compared with the corrections'")
        return
    words, template = identify_words(tokenizer)
    for correction in corrections:
        made_for = correction.base
        found = {"tokenizer": (made_for.tokenizer, words), "chat template": (made_for.chat_template, template)}
        differ = [what for what, (theirs, ours) in found.items() if theirs and theirs != ours]
        _tell(correction, name, differ, any_base)


def check_weights(corrections: Sequence[HeadCorrection], name: str, folder: Path | None, any_base: bool) -> None:
    """Raise CorrectionError. folder: where the checkpoint lies; None where nobody knows."""
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if not files:
        log.warning("trimtab: %s has no safetensors files here, so its weights were not compared", name)
        return
    found = fingerprint(_read(files))
    for correction in corrections:
        other = bool(correction.base.fingerprint) and correction.base.fingerprint != found
        _tell(correction, name, ["weights"] * other, any_base)


def checkpoint(model: str, revision: str | None) -> Path | None:
    """Where the files of a folder or of a hub id lie, which vLLM has loaded before; None: not here."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


def _read(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, one at a time; a tied head, which files leave out, is its embedding again."""
    places: dict[str, Path] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    tied = _HEAD not in places and _EMBEDDING in places
    for key in sorted([*places, *([_HEAD] if tied else [])]):
        stored = _EMBEDDING if tied and key == _HEAD else key
        with safe_open(places[stored], "pt") as opened:
            yield key, opened.get_tensor(stored)


def _tell(correction: HeadCorrection, name: str, differ: list[str], any_base: bool) -> None:
    if not differ:
        return
    told = (
        f"the correction {correction.name!r} was fitted to {correction.base.model!r} and cannot steer {name!r}: other "
        f"{' and '.join(differ)}"
    )
    if not any_base:
        raise CorrectionError(f"{told}. Serve what it was fitted to, or insist with {ANY_BASE}=1")
    log.warning("trimtab: %s; it does all the same, as any_base is set", told)
