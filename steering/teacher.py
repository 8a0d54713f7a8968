"""Teachers: tuned models that a correction is distilled from. A model of its own, or the base with a PEFT LoRA on.

Invariant: a teacher reads the base's prompts, made by the base's tokenizer and chat template. The base stays as it is:
a LoRA is added to the outputs of a copy's layers (merged into bfloat16 weights, the update would be rounded away).

    teacher = load_teacher("runs/lora", base)
    targets = cache_targets(teacher, problems, items, features, folder, "teacher")      # logits [n, CANDIDATES]
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
from trimtab.steering.features import Features, read_in_shards, states_of
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
    """The teacher's logits of the base's candidates, float32 [n, CANDIDATES]: a row for each row of `features`, which
    are of these items. Computes what is missing in the folder."""

    @torch.inference_mode()
    def read(group: Sequence[Item], first: int) -> dict[str, Tensor]:
        parts = []
        for number, h in enumerate(states_of(teacher, problems, group), start=first):
            here = features.item == number
            ids = features.ids[here].long().to(h.device)
            logits = teacher.logits(h[features.position[here].long().to(h.device)]).float()
            parts.append(logits.gather(1, ids).cpu())
        return {"logits": torch.cat(parts)}

    return read_in_shards(items, folder, stage, read)["logits"].to(features.logits.device)


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """peft reads attributes that transformers is about to rename, which is no news for our users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
