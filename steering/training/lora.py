"""A LoRA on the base, learned from rewards by the paper's method, or from what a tuned model does.

For a completion of advantage A, with pi the adapted model and p the base at temperature 1:

    - A * mean over open positions of log pi(sampled token)  +  lora_kl * mean over the others of KL(p || pi)

For a lesson of a teacher's, the first part is the mean over open positions of KL(teacher || pi), where tokens beyond
the base's CANDIDATES best ones count as one. A step takes the mean over `lora_batch` completions: accumulation over
batches of one. Those that say most come first: by |A| * share of open positions. -A log pi has no lower bound where
A < 0, so a LoRA may run away from its base: it then ends as it was at its last calm checkpoint.

What the authors' code does and we do not: after the warm-up their rate falls, to 0 at the end of a whole pass, with
which the demo's LoRA learned far less; a prompt's positions are anchored too; the longest completions are dropped of
all problems together.

On a CPU under Linux a step is quicker where what it frees is kept for the next one, for which there must be memory:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 in the environment. A fit that is killed for want of it goes on.

Invariant: the folder ends as plain PEFT files (adapter_config.json, adapter_model.safetensors; no pickle), the same
bytes whether or not the run was killed on the way: a checkpoint holds all that the next step depends on. (On CUDA the
backward pass adds in an order of its own, so two runs agree up to rounding.)

    train(base, lessons(base, problems, items, features), config, folder)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute
from transformers.modeling_layers import GradientCheckpointingLayer

from trimtab.errors import Diverged, InvalidRequest
from trimtab.server.model.base import Base
from trimtab.server.model.linear import copy_unpacked
from trimtab.steering.adapter import CONFIG_FILE, WEIGHTS_FILE
from trimtab.steering.atomic import write_json, write_tensors
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.training import checkpoint
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.features import Features, bounds
from trimtab.steering.training.lora_loss import Lesson, Target, objective
from trimtab.steering.training.progress import Progress, say
from trimtab.steering.training.rollouts import encode
from trimtab.steering.training.selection import Item
from trimtab.steering.training.teacher import without_peft_warnings

RECENT = 8  # steps whose mean distance from the base is watched: one step says little
CHECKPOINT_EVERY = 10  # steps
CALM = 1 / 3  # of the limit of that distance: a LoRA that runs away goes back to the last checkpoint within so much
GRADIENT_LIMIT = 1.0  # norm of a step's gradient
# Padded tokens a forward pass; a step of more takes several: what is kept for the backward pass grows with them.
TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 4096}
# A completion longer than this keeps only what goes into each layer, and computes the layers again in the backward
# pass, a third more work: on CUDA attention alone would keep 19 GB of one of 2,048 tokens for a model of 7B.
KEPT_WHOLE = 1024


def lessons(base: Base, problems: Mapping[str, Problem], items: Sequence[Item], features: Features) -> list[Lesson]:
    """The completions that are not held out, in the order in which they are learned. features: of these items."""
    found = [lesson for lesson, item in _lessons(base, problems, items, features) if not item.held_out]
    return sorted(found, key=lambda one: -abs(one.advantage) * sum(one.open) / len(one.open))


def imitations(
    base: Base, problems: Mapping[str, Problem], parts: Sequence[tuple[Sequence[Item], Features, Tensor]], seed: int
) -> list[Lesson]:
    """The same to imitate a teacher, in an order drawn at random.

    parts: completions, their features, and the teacher's log-probabilities [n, CANDIDATES] at the features' rows."""
    found = []
    for items, features, targets in parts:
        begins = bounds(features, len(items))
        ids, log_p, gated = features.ids.cpu(), targets.cpu(), features.gated.cpu()
        for number, (lesson, item) in enumerate(_lessons(base, problems, items, features)):
            rows = slice(begins[number], begins[number + 1])
            opened = gated[rows]
            if not item.held_out:
                found.append(lesson._replace(target=Target(ids[rows][opened], log_p[rows][opened])))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in order.tolist()]


def _lessons(
    base: Base, problems: Mapping[str, Problem], items: Sequence[Item], features: Features
) -> Iterator[tuple[Lesson, Item]]:
    """A lesson for each item. Features, not items, say the advantage: a control deals it anew."""
    prompts = {i.problem: encode(base, problems[i.problem]) for i in items}
    found = [Lesson(prompts[i.problem], i.tokens, [False] * len(i.tokens), 0.0) for i in items]
    columns = (features.item, features.position, features.advantage)
    rows = (column[features.gated].tolist() for column in columns)
    for item, position, advantage in zip(*rows, strict=True):
        found[item].open[position] = True
        found[item] = found[item]._replace(advantage=advantage)
    return zip(found, items, strict=True)


def train(base: Base, taught: Sequence[Lesson], config: FitConfig, folder: Path, stage: str = "lora") -> None:
    """Make the PEFT folder, unless it is there; go on from its checkpoint. Raises Diverged when the loss is no number,
    or the LoRA runs away before there is a checkpoint to go back to."""
    path, calm = folder / "checkpoint.safetensors", folder / "calm.safetensors"
    if (folder / CONFIG_FILE).exists():
        path.unlink(missing_ok=True)
        calm.unlink(missing_ok=True)
        return
    tuned = put_on(base, config)
    named = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(named.values()), lr=config.lora_rate, weight_decay=0.0)
    done, recent = checkpoint.resume(path, named, optimizer) if path.exists() else (0, [])
    steps = max(1, round(config.lora_epochs * len(taught) / config.lora_batch))
    if all(all(lesson.open) for lesson in taught):
        say(stage, "every position is open: no KL holds the LoRA near its base, and nothing tells when it runs away")
    with Progress(stage, steps, "steps", done) as progress:
        for step in range(done, steps):
            start = step * config.lora_batch
            batch = [taught[(start + i) % len(taught)] for i in range(config.lora_batch)]
            for group in optimizer.param_groups:
                group["lr"] = config.lora_rate * min(1.0, (step + 1) / config.lora_warmup)
            optimizer.zero_grad()
            parts = []
            for part in _split(batch, TOKENS_AT_ONCE[base.device.type]):
                with _recomputed(tuned, max(map(_length, part)) > KEPT_WHOLE):
                    found = objective(tuned, part)
                loss = (found.likelihood + config.lora_kl * found.anchor) / len(batch)
                loss.backward()  # type: ignore[no-untyped-call]
                parts.append(torch.stack(found).detach())
            norm = torch.nn.utils.clip_grad_norm_(list(named.values()), GRADIENT_LIMIT)
            first, anchor = (torch.stack(parts).sum(0) / len(batch)).tolist()
            if not math.isfinite(first + anchor + float(norm)):
                raise Diverged(f"the LoRA's loss is no number at step {step + 1} of {steps}: lower --lora-rate")
            recent = [*recent, anchor][-RECENT:]
            distance = sum(recent) / RECENT
            if config.lora_kl_limit and distance > config.lora_kl_limit:
                away = (
                    f"the LoRA runs away: away from open positions it is {distance:.2f} nats from the base at step "
                    f"{step + 1} of {steps} (at most {config.lora_kl_limit:g}, --lora-kl-limit)"
                )
                if not calm.exists():
                    raise Diverged(f"{away}: lower --lora-rate or --lora-epochs, or give more problems")
                kept, _ = checkpoint.resume(calm, named, optimizer)
                say(stage, f"{away}: it ends as it was after step {kept}")
                break
            optimizer.step()
            progress.add(1, f"loss {first:+.3f}, KL elsewhere {anchor:.4f}, gradient {float(norm):.2f}")
            if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < steps:
                if distance <= CALM * config.lora_kl_limit:
                    checkpoint.save(calm, step + 1, named, optimizer, recent)
                checkpoint.save(path, step + 1, named, optimizer, recent)
    write(tuned, base, folder)
    path.unlink(missing_ok=True)
    calm.unlink(missing_ok=True)


def put_on(base: Base, config: FitConfig) -> Any:
    """A PeftModel on a copy of the base, its adapter in float32 and without effect yet."""
    # gradients underflow in float16
    model = copy_unpacked(base.model, torch.float32 if base.dtype == torch.float16 else base.dtype)
    fused = model._supports_sdpa and base.device.type == "cpu"  # on CUDA its gradients differ from run to run
    model.set_attn_implementation("sdpa" if fused else "eager")
    shape = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=sorted(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), without_peft_warnings():
        torch.manual_seed(config.seed)
        try:
            return get_peft_model(model, shape)
        except ValueError as error:  # no layer of that name, or not a linear one
            raise InvalidRequest(f"lora_targets {config.lora_targets}: {error}", "lora_targets") from error


@contextmanager
def _recomputed(tuned: Any, wanted: bool) -> Iterator[None]:
    """Of a forward pass in here the layers, where that is wanted, keep what goes into them and nothing else."""
    layers = [m for m in tuned.modules() if isinstance(m, GradientCheckpointingLayer)] if wanted else []
    for layer in layers:
        layer.forward = partial(recompute, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _split(batch: Sequence[Lesson], tokens: int) -> Iterator[Sequence[Lesson]]:
    """Parts of at most so many padded tokens, of one completion at least; the short ones together."""
    part: list[Lesson] = []
    for lesson in sorted(batch, key=_length):
        if part and _length(lesson) * (len(part) + 1) > tokens:
            yield part
            part = []
        part.append(lesson)
    yield part


def _length(lesson: Lesson) -> int:
    return len(lesson.prompt) + len(lesson.tokens)


def write(tuned: Any, base: Base, folder: Path) -> None:
    """PEFT's two files; the one that makes the folder complete comes last."""
    described: dict[str, Any] = tuned.peft_config["default"].to_dict()
    described |= {"base_model_name_or_path": base.name, "inference_mode": True}
    write_tensors(folder / WEIGHTS_FILE, get_peft_model_state_dict(tuned, save_embedding_layers=False))
    write_json(folder / CONFIG_FILE, {k: sorted(v) if isinstance(v, set) else v for k, v in described.items()})
