"""Features: what the fit needs of each learned-from position, computed once by reading the completions again.

A head-tier correction is a function of the final hidden state and of the base's best logits, so these few numbers a
position replace the whole network while fitting. Invariant: a position's row is what the base computes before drawing
the token at it; candidates stand in the step kernel's order (logit descending, id ascending).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from trimtab.server.base import Base
from trimtab.steering.atomic import write_tensors
from trimtab.steering.config import CANDIDATES, FitConfig
from trimtab.steering.problem import Problem
from trimtab.steering.progress import Progress
from trimtab.steering.rollouts import encode
from trimtab.steering.selection import Item

SHARD = 64  # completions a file
READ_AT_ONCE = {"cpu": 8, "cuda": 64}  # completions a forward pass, by the device's type
LOGIT_ROWS = {"cpu": 256, "cuda": 2048}  # rows of [rows, vocab] float32 held at a time


class Features(NamedTuple):
    """A row a position. Kept: positions that the gate opens, and as many others drawn at random for a control."""

    h: Tensor  # [n, hidden] in the base's dtype
    ids: Tensor  # int32 [n, CANDIDATES]
    logits: Tensor  # float32 [n, CANDIDATES]
    lse: Tensor  # float32 [n]: logsumexp(z / T) over the vocabulary, T the sampling temperature
    chosen: Tensor  # int32 [n]: the sampled token
    advantage: Tensor  # float32 [n]: its completion's
    position: Tensor  # int32 [n]: how many tokens of its completion came before
    item: Tensor  # int32 [n]: index of its completion
    problem: Tensor  # int32 [n]: index of its problem
    held_out: Tensor  # bool [n]: not fitted
    gated: Tensor  # bool [n]: base entropy above tau
    random: Tensor  # bool [n]: in the random draw, of the same size as the gated ones of its completion

    def at(self, rows: Tensor) -> "Features":
        """The rows of a mask or of indices."""
        return Features(*(column[rows] for column in self))

    def to(self, device: torch.device) -> "Features":
        """On that device."""
        return Features(*(column.to(device) for column in self))


def cache_features(
    base: Base,
    problems: Mapping[str, Problem],
    items: Sequence[Item],
    config: FitConfig,
    folder: Path,
    stage: str = "features",
) -> Features:
    """Compute what is missing in the folder, then read it all. problems: by id."""
    numbers = {problem: i for i, problem in enumerate(dict.fromkeys(item.problem for item in items))}

    def read(group: Sequence[Item], first: int) -> dict[str, Tensor]:
        return _read(base, problems, group, first, numbers, config)._asdict()

    return Features(**read_in_shards(items, folder, stage, READ_AT_ONCE[base.device.type], read))


def read_in_shards(
    items: Sequence[Item],
    folder: Path,
    stage: str,
    at_once: int,
    read: Callable[[Sequence[Item], int], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Columns of rows, in the items' order, kept in a file for every SHARD completions; finished files are read.

    read: `at_once` completions and the index of the first -> their rows, on the CPU."""
    shards = [items[i : i + SHARD] for i in range(0, len(items), SHARD)]
    paths = [folder / f"{i:05d}.safetensors" for i in range(len(shards))]
    done = sum(len(shard) for shard, path in zip(shards, paths, strict=True) if path.exists())
    with Progress(stage, len(items), "completions", done) as progress:
        for index, (shard, path) in enumerate(zip(shards, paths, strict=True)):
            if path.exists():
                continue
            parts = []
            for at in range(0, len(shard), at_once):
                group = shard[at : at + at_once]
                parts.append(read(group, index * SHARD + at))
                progress.add(len(group))
            write_tensors(path, _stack(parts))
    return _stack([load_file(path) for path in paths])


def states_of(base: Base, problems: Mapping[str, Problem], items: Sequence[Item]) -> list[Tensor]:
    """Each completion's final hidden states [tokens, hidden]: row t is what token t was drawn from."""
    prompts = [encode(base, problems[item.problem]) for item in items]
    states = base.states([[*prompt, *item.tokens] for prompt, item in zip(prompts, items, strict=True)])
    return [sequence[len(prompt) - 1 : -1] for prompt, sequence in zip(prompts, states, strict=True)]


@torch.inference_mode()
def _read(
    base: Base,
    problems: Mapping[str, Problem],
    group: Sequence[Item],
    first: int,
    numbers: Mapping[str, int],
    config: FitConfig,
) -> Features:
    """The kept positions of a few completions; `first` is the index of the first one. One copy from the device."""
    h = torch.cat(states_of(base, problems, group))
    columns = [column.cpu() for column in (h, *_read_logits(base, h, config.temperature))]
    entropy = columns.pop()
    gated = entropy > config.tau
    lengths = torch.tensor([len(item.tokens) for item in group])

    def spread(values: list[Any], dtype: torch.dtype) -> Tensor:
        """A completion's value, at each of its positions."""
        return torch.tensor(values, dtype=dtype).repeat_interleave(lengths)

    rows = Features(
        *columns,
        chosen=torch.tensor([token for item in group for token in item.tokens], dtype=torch.int32),
        advantage=spread([item.advantage for item in group], torch.float32),
        position=torch.cat([torch.arange(int(n), dtype=torch.int32) for n in lengths]),
        item=spread(list(range(first, first + len(group))), torch.int32),
        problem=spread([numbers[item.problem] for item in group], torch.int32),
        held_out=spread([item.held_out for item in group], torch.bool),
        gated=gated,
        random=torch.cat(
            [
                _draw(len(opened), int(opened.sum()), _generator(config.seed, item))
                for item, opened in zip(group, gated.split(lengths.tolist()), strict=True)
            ]
        ),
    )
    return rows.at(rows.gated | rows.random)


def _draw(n: int, count: int, generator: torch.Generator) -> Tensor:
    """bool [n]: `count` positions at random."""
    drawn = torch.zeros(n, dtype=torch.bool)
    drawn[torch.randperm(n, generator=generator)[:count]] = True
    return drawn


def _read_logits(base: Base, h: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [n, hidden] -> candidates' ids and logits [n, CANDIDATES], logsumexp of z / T [n], entropy in nats [n]."""
    parts = []
    for rows in torch.split(h, LOGIT_ROWS[h.device.type]):
        z = base.logits(rows).float()
        log_p = z.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        ids, values = rank(z, CANDIDATES)
        parts.append((ids.int(), values, (z / temperature).logsumexp(-1), entropy))
    ids, values, lse, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, values, lse, entropy


def rank(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row in (logit descending, id ascending) order -> ids, logits.

    topk breaks ties as it likes, and logits of a bf16 head tie often: so take more, and sort those twice.
    """
    ids = z.topk(min(2 * k, z.shape[-1])).indices.sort(-1).values
    values, order = z.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order)[:, :k], values[:, :k]


def join(parts: Sequence[Features]) -> Features:
    """One after another."""
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


def bounds(features: Features, items: int) -> list[int]:
    """Where each completion's rows begin, and where the last one's end: rows stand in the completions' order."""
    counts = torch.bincount(features.item, minlength=items)
    return [0, *counts.cumsum(0).tolist()]


def _stack(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _generator(seed: int, item: Item) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/positions/{item.problem}/{item.sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
