"""Teachers: tuned models that a correction is distilled from. A model of its own, or the base with a PEFT LoRA on.

Invariant: a teacher reads the base's prompts, made by the base's tokenizer and chat template. The base stays as it is:
a LoRA is added to the outputs of a copy's layers (merged into bfloat16 weights, the update would be rounded away).

    teacher = load_teacher("runs/lora", base)
    targets = cache_targets(teacher, problems, items, features, folder, "teacher")      # log p [n, CANDIDATES]
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from trimtab.errors import CorrectionError, UnsupportedModel
from trimtab.server.base import Base, load_base, prepare
from trimtab.server.linear import copy_unpacked
from trimtab.steering.adapter import CONFIG_FILE, WEIGHTS_FILE
from trimtab.steering.features import LOGIT_ROWS, READ_AT_ONCE, Features, bounds, read_in_shards, states_of
from trimtab.steering.problem import Problem
from trimtab.steering.selection import Item


def load_teacher(model: str, base: Base, dtype: str = "auto", device: str = "auto", threads: int = 1) -> Base:
    """MODEL: a PEFT folder made for this base, or what load_base takes. Raises CorrectionError, UnsupportedModel."""
    if (Path(model) / CONFIG_FILE).is_file():
        return adapt(base, Path(model))
    teacher = load_base(model, dtype, device, threads)
    if teacher.identity.tokenizer != base.identity.tokenizer:
        raise UnsupportedModel(f"{teacher.name} has another tokenizer than {base.name}: it cannot teach it")
    teacher.tokenizer = base.tokenizer
    return teacher


def adapt(base: Base, folder: Path) -> Base:
    """The base with the LoRA of a PEFT folder on, always. A copy: the base itself is not changed."""
    from peft import PeftModel

    if not (folder / WEIGHTS_FILE).is_file():
        raise CorrectionError(f"{folder} has no {WEIGHTS_FILE}: pickled adapters are not read, save it as safetensors")
    try:
        with without_peft_warnings():
            tuned = PeftModel.from_pretrained(copy_unpacked(base.model), str(folder))
    except (ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise CorrectionError(f"{folder} cannot be put on {base.name}: {error}") from error
    return prepare(tuned.get_base_model(), base.tokenizer, f"{base.name} with {folder.name}")


def cache_targets(
    teacher: Base,
    problems: Mapping[str, Problem],
    items: Sequence[Item],
    features: Features,
    folder: Path,
    stage: str,
) -> Tensor:
    """The teacher's log-probabilities, over its whole vocabulary, of the base's candidates: float32 [n, CANDIDATES], a
    row for each row of `features`, which are of these items. Computes what is missing in the folder."""
    begins = bounds(features, len(items))

    @torch.inference_mode()
    def read(group: Sequence[Item], first: int) -> dict[str, Tensor]:
        states = states_of(teacher, problems, group)
        begin, end = begins[first], begins[first + len(group)]
        before = torch.tensor([0, *(len(item.tokens) for item in group)]).cumsum(0)  # tokens of the completions before
        which = features.item[begin:end].cpu() - first
        at = (before[which] + features.position[begin:end].cpu()).to(teacher.device)
        ids = features.ids[begin:end].long().to(teacher.device)
        h = torch.cat(states)[at]
        parts = []
        for some, candidates in zip(*(torch.split(t, LOGIT_ROWS[h.device.type]) for t in (h, ids)), strict=True):
            z = teacher.logits(some).float()
            parts.append(z.gather(1, candidates) - z.logsumexp(1, keepdim=True))
        return {"log_p": torch.cat(parts).cpu()}

    found = read_in_shards(items, folder, stage, READ_AT_ONCE[teacher.device.type], read)
    return found["log_p"].to(features.logits.device)


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """peft reads attributes that transformers is about to rename, which is no news for our users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
