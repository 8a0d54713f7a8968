"""Teachers: tuned models that a correction is distilled from. A model of its own, or the base with a PEFT LoRA on.

Invariant: a teacher reads the base's prompts, made by the base's tokenizer and chat template. The base stays as it is:
a LoRA is added to the outputs of a copy's layers (merged into bfloat16 weights, the update would be rounded away).

    teacher = load_teacher("runs/lora", base)
    targets = cache_targets(teacher, problems, items, features, temperature, folder, "teacher")
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from trimtab.errors import CorrectionError, UnsupportedModel
from trimtab.server.model.base import Base, load_base, prepare
from trimtab.server.model.linear import copy_unpacked
from trimtab.steering.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_files, read_adapter
from trimtab.steering.correction import Correction, check
from trimtab.steering.folder import holds_correction, load
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.training.features import LOGIT_ROWS, READ_AT_ONCE, Features, bounds, read_in_shards, states_of
from trimtab.steering.training.selection import Item

# The logarithm of what is no probability, and yet a number: beyond the tokenizer's ids, a teacher may have fewer rows
# than its base.
NEVER = -100.0


class Targets(NamedTuple):
    """What a teacher says at some positions, over its whole vocabulary, of the base's candidates."""

    log_p: Tensor  # float32 [n, CANDIDATES]: log-probabilities at temperature 1
    lse: Tensor  # float32 [n]: logsumexp(log p / T) over the vocabulary, T the sampling temperature

    def at(self, rows: Tensor) -> "Targets":
        """The rows of a mask or of indices."""
        return Targets(self.log_p[rows], self.lse[rows])


def load_teacher(model: str, base: Base, dtype: str = "auto", device: str = "auto", threads: int = 1) -> Base:
    """MODEL: a PEFT folder made for this base, or what load_base takes. It writes no longer than the base reads.

    Raises CorrectionError, UnsupportedModel."""
    if (Path(model) / CONFIG_FILE).is_file():
        made = load(model)
        check(made, base.identity)
        if made.strength != 1:
            raise CorrectionError(
                f"{model} is a correction of strength {made.strength:g}, and would teach at 1: give a folder of its "
                f"{CONFIG_FILE} and {WEIGHTS_FILE} alone, if that is what is meant"
            )
        return adapt(base, Path(model))
    teacher = load_base(model, dtype, device, threads)
    if teacher.identity.tokenizer != base.identity.tokenizer:
        raise UnsupportedModel(f"{teacher.name} has another tokenizer than {base.name}: it cannot teach it")
    teacher.tokenizer = base.tokenizer
    teacher.max_len = min(teacher.max_len, base.max_len)
    return teacher


def correction_of(model: str) -> Correction | None:
    """The correction that a teacher's folder holds, a PEFT folder included. Raises CorrectionError."""
    return load(model) if holds_correction(Path(model)) else None


def adapt(base: Base, folder: Path) -> Base:
    """The base with the LoRA of a PEFT folder on, always. A copy: the base itself is not changed."""
    from peft import PeftModel

    adapter = read_adapter(folder)  # which refuses what is no plain LoRA
    try:
        with without_peft_warnings():
            tuned = PeftModel.from_pretrained(copy_unpacked(base.model), str(folder))
    except (ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise CorrectionError(f"{folder} cannot be put on {base.name}: {error}") from error
    modules = dict(tuned.get_base_model().named_modules())
    for path in adapter.layers:
        if not hasattr(modules.get(path), "lora_A"):  # peft passes over what it finds no place for
            raise CorrectionError(
                f"{folder} acts on {path}, which {base.name} does not have or target_modules leaves out"
            )
    made = prepare(tuned.get_base_model(), base.tokenizer, f"{base.name} with {folder.name}")
    files = b"".join(adapter_files(adapter).values())  # the scale is in no weight
    both = hashlib.sha256(made.identity.fingerprint.encode() + files).hexdigest()[:32]
    made.identity = dataclasses.replace(made.identity, fingerprint=both)
    return made


def cache_targets(
    teacher: Base,
    problems: Mapping[str, Problem],
    items: Sequence[Item],
    features: Features,
    temperature: float,
    folder: Path,
    stage: str,
) -> Targets:
    """A row for each row of `features`, which are of these items. Computes what is missing in the folder."""
    begins = bounds(features, len(items))

    @torch.inference_mode()
    def read(group: Sequence[Item], first: int) -> dict[str, Tensor]:
        last = teacher.vocab - 1  # of its rows: the base may have more
        states = states_of(teacher, problems, [i._replace(tokens=[min(t, last) for t in i.tokens]) for i in group])
        begin, end = begins[first], begins[first + len(group)]
        before = torch.tensor([0, *(len(item.tokens) for item in group)]).cumsum(0)  # tokens of the completions before
        which = features.item[begin:end].cpu() - first
        at = (before[which] + features.position[begin:end].cpu()).to(teacher.device)
        ids = features.ids[begin:end].long().to(teacher.device)
        h = torch.cat(states)[at]
        parts = []
        for some, candidates in zip(*(torch.split(t, LOGIT_ROWS[h.device.type]) for t in (h, ids)), strict=True):
            log_p = teacher.logits(some).float().log_softmax(1)
            of = log_p.gather(1, candidates.clamp(max=teacher.vocab - 1))
            parts.append((of.masked_fill(candidates >= teacher.vocab, NEVER), (log_p / temperature).logsumexp(1)))
        log_p, lse = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        return {"log_p": log_p, "lse": lse}

    found = read_in_shards(items, folder, stage, READ_AT_ONCE[teacher.device.type], read)
    return Targets(*(found[name].to(features.logits.device) for name in Targets._fields))


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """peft reads attributes that transformers is about to rename, which is no news for our users; and warns of what
    `adapt` refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        yield
