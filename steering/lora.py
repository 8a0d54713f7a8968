"""A LoRA by the paper's method: advantage-weighted likelihood where the base is unsure, an anchor everywhere else.

For a completion of advantage A, with pi the adapted model and p the base at temperature 1:

    - A * mean over open positions of log pi(sampled token)  +  lora_kl * mean over the others of KL(p || pi)

A step takes the mean over `lora_batch` completions: accumulation over batches of one. Those that say most come first:
by |A| * share of open positions.

Invariant: the folder ends as plain PEFT files (adapter_config.json, adapter_model.safetensors; no pickle), the same
bytes whether or not the run was killed on the way: a checkpoint holds all that the next step depends on.

    train(base, lessons(base, problems, items, features), config, folder)
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from trimtab.errors import InvalidRequest, TaskError
from trimtab.server.base import Base, read_logits
from trimtab.server.linear import copy_unpacked
from trimtab.steering.adapter import CONFIG_FILE, WEIGHTS_FILE
from trimtab.steering.atomic import write_json, write_tensors
from trimtab.steering.config import FitConfig
from trimtab.steering.features import Features
from trimtab.steering.problem import Problem
from trimtab.steering.progress import Progress
from trimtab.steering.rollouts import encode
from trimtab.steering.selection import Item
from trimtab.steering.teacher import without_peft_warnings

CHECKPOINT_EVERY = 10  # steps
GRADIENT_LIMIT = 1.0  # norm of a step's gradient
TOKENS_AT_ONCE = 2048  # padded tokens a forward pass; a step of more takes several


class Lesson(NamedTuple):
    """One completion to learn from."""

    prompt: tuple[int, ...]
    tokens: Sequence[int]
    open: list[bool]  # a token: the base's entropy before it was above tau
    advantage: float


class Objective(NamedTuple):
    """The two parts of the loss, summed over completions."""

    likelihood: Tensor
    anchor: Tensor


def lessons(base: Base, problems: Mapping[str, Problem], items: Sequence[Item], features: Features) -> list[Lesson]:
    """The completions that are not held out, in the order in which they are learned. features: of these items."""
    found = [Lesson(encode(base, problems[i.problem]), i.tokens, [False] * len(i.tokens), 0.0) for i in items]
    columns = (features.item, features.position, features.advantage)
    rows = (column[features.gated].tolist() for column in columns)
    for item, position, advantage in zip(*rows, strict=True):
        found[item].open[position] = True
        found[item] = found[item]._replace(advantage=advantage)
    fitted = [lesson for lesson, item in zip(found, items, strict=True) if not item.held_out]
    return sorted(fitted, key=lambda one: -abs(one.advantage) * sum(one.open) / len(one.open))


def train(base: Base, taught: Sequence[Lesson], config: FitConfig, folder: Path, stage: str = "lora") -> None:
    """Make the PEFT folder, unless it is there; go on from its checkpoint. Raises TaskError when the loss diverges."""
    checkpoint = folder / "checkpoint.safetensors"
    if (folder / CONFIG_FILE).exists():
        checkpoint.unlink(missing_ok=True)
        return
    tuned = put_on(base, config)
    named = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(named.values()), lr=config.lora_rate, weight_decay=0.0)
    done = _resume(checkpoint, named, optimizer) if checkpoint.exists() else 0
    steps = max(1, round(config.lora_epochs * len(taught) / config.lora_batch))
    with Progress(stage, steps, "steps", done) as progress:
        for step in range(done, steps):
            start = step * config.lora_batch
            batch = [taught[(start + i) % len(taught)] for i in range(config.lora_batch)]
            for group in optimizer.param_groups:
                group["lr"] = config.lora_rate * min(1.0, (step + 1) / config.lora_warmup)
            optimizer.zero_grad()
            likelihood, anchor = 0.0, 0.0
            for part in _split(batch):
                found = objective(tuned, part)
                loss = (found.likelihood + config.lora_kl * found.anchor) / len(batch)
                loss.backward()  # type: ignore[no-untyped-call]
                likelihood += float(found.likelihood.detach())
                anchor += float(found.anchor.detach())
            norm = torch.nn.utils.clip_grad_norm_(list(named.values()), GRADIENT_LIMIT)
            if not torch.isfinite(norm):
                raise TaskError(f"the LoRA's loss diverged at step {step + 1} of {steps}: lower --lora-rate")
            optimizer.step()
            shown = f"loss {likelihood / len(batch):+.3f}, KL elsewhere {anchor / len(batch):.4f}"
            progress.add(1, f"{shown}, gradient {float(norm):.2f}")
            if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < steps:
                _checkpoint(checkpoint, step + 1, named, optimizer)
    write(tuned, base, folder)
    checkpoint.unlink(missing_ok=True)


def put_on(base: Base, config: FitConfig) -> Any:
    """A PeftModel on a copy of the base, its adapter in float32 and without effect yet."""
    model = copy_unpacked(base.model)
    if base.dtype == torch.float16:
        model = model.float()  # gradients underflow in float16
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
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


def objective(tuned: Any, batch: Sequence[Lesson]) -> Objective:
    """The loss's parts of a few completions."""
    rows = [(i, t) for i, lesson in enumerate(batch) for t in range(len(lesson.tokens))]
    device = tuned.device
    is_open = torch.tensor([batch[i].open[t] for i, t in rows], device=device)
    sampled = torch.tensor([batch[i].tokens[t] for i, t in rows], device=device)
    advantage = torch.tensor([batch[i].advantage for i, _ in rows], device=device)
    counts = [(max(1, sum(one.open)), max(1, len(one.open) - sum(one.open))) for one in batch]
    share = torch.tensor([1 / counts[i][0 if batch[i].open[t] else 1] for i, t in rows], device=device)
    log_pi = _log_probabilities(tuned, batch, rows)
    chosen = log_pi[is_open].gather(1, sampled[is_open, None])[:, 0]
    likelihood = -(advantage * share)[is_open] @ chosen
    with torch.no_grad(), tuned.disable_adapter():
        log_p = _log_probabilities(tuned, batch, [row for row, o in zip(rows, is_open.tolist(), strict=True) if not o])
    anchor = share[~is_open] @ (log_p.exp() * (log_p - log_pi[~is_open])).sum(1)
    return Objective(likelihood, anchor)


def _log_probabilities(tuned: Any, batch: Sequence[Lesson], rows: Sequence[tuple[int, int]]) -> Tensor:
    """log pi(. | what came before token t of completion i), [rows, vocab] in float32."""
    model = tuned.get_base_model()
    sequences = [[*lesson.prompt, *lesson.tokens[:-1]] for lesson in batch]
    length = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (length - len(s)) for s in sequences], device=tuned.device)
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences], device=tuned.device)
    states = model.get_decoder()(ids, attention_mask=mask, use_cache=False).last_hidden_state
    index = torch.tensor([(i, len(batch[i].prompt) - 1 + t) for i, t in rows], dtype=torch.long, device=tuned.device)
    index = index.view(-1, 2)  # there may be no row
    log_pi: Tensor = read_logits(model, states[index[:, 0], index[:, 1]]).float().log_softmax(-1)
    return log_pi


def _split(batch: Sequence[Lesson]) -> Iterator[Sequence[Lesson]]:
    """Parts of at most TOKENS_AT_ONCE padded tokens, of one completion at least."""
    longest = max(len(lesson.prompt) + len(lesson.tokens) for lesson in batch)
    size = max(1, TOKENS_AT_ONCE // longest)
    return (batch[i : i + size] for i in range(0, len(batch), size))


def _checkpoint(path: Path, step: int, named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, p in named.items():
        state = optimizer.state[p]
        tensors |= {name: p, f"{name}/first": state["exp_avg"], f"{name}/second": state["exp_avg_sq"]}
    write_tensors(path, tensors)


def _resume(path: Path, named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Set parameters and moments as they were. -> the steps done."""
    tensors = load_file(path)
    for name, p in named.items():
        p.data.copy_(tensors[name])
        optimizer.state[p] = {
            "step": tensors["step"].float(),
            "exp_avg": tensors[f"{name}/first"].to(p.device),
            "exp_avg_sq": tensors[f"{name}/second"].to(p.device),
        }
    return int(tensors["step"])


def write(tuned: Any, base: Base, folder: Path) -> None:
    """PEFT's two files; the one that makes the folder complete comes last."""
    described: dict[str, Any] = tuned.peft_config["default"].to_dict()
    described |= {"base_model_name_or_path": base.name, "inference_mode": True}
    write_tensors(folder / WEIGHTS_FILE, get_peft_model_state_dict(tuned, save_embedding_layers=False))
    write_json(folder / CONFIG_FILE, {k: sorted(v) if isinstance(v, set) else v for k, v in described.items()})
