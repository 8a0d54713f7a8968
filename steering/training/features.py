"""Features: what the fit needs of each learned-from position, computed once by reading the completions again.

A head-tier correction is a function of the final hidden state and of the base's best logits, so these few numbers a
position replace the whole network while fitting. Invariant: a position's row is what the base computes before drawing
the token at it; candidates stand in the step kernel's order (logit descending, id ascending).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.server.model.base import Base
from trimtab.steering.atomic import read_tensors, write_tensors
from trimtab.steering.gate import Gate
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.training.config import CANDIDATES, FitConfig
from trimtab.steering.training.progress import Progress
from trimtab.steering.training.rollouts import encode
from trimtab.steering.training.selection import Item

SHARD = 64  # completions a file
READ_AT_ONCE = {"cpu": 16, "cuda": 64}  # completions a forward pass, by the device's type; fewer where they are long
PLACES_AT_ONCE = {"cpu": 16_384, "cuda": 65_536}  # in its cache
LOGIT_ROWS = {"cpu": 256, "cuda": 2048}  # rows of [rows, vocab] float32 held at a time
# Of those, what a statistic's passes take together: on a CPU so many numbers stay in its cache from one to the next.
STATISTIC_NUMBERS = {"cpu": 2**20, "cuda": 2**31}


class Features(NamedTuple):
    """A row a position. Kept: positions that the gate opens, as many others drawn at random for a control, and of what
    is held out all those where a correction acts."""

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
    gated: Tensor  # bool [n]: the gate opens (always open: base entropy above tau)
    random: Tensor  # bool [n]: in the random draw, of the same size as the gated ones of its completion
    acts: Tensor  # bool [n]: served, the correction acts here: KL is measured at those that are held out

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
    return read_shards(folder)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All columns that a stage left in its folder."""
    return _stack([read_tensors(path) for path in sorted(folder.glob("*.safetensors"))])


def states_of(base: Base, problems: Mapping[str, Problem], items: Sequence[Item]) -> list[Tensor]:
    """Each completion's final hidden states [tokens, hidden]: row t is what token t was drawn from."""
    found: list[Tensor] = []
    prompts = [encode(base, problems[item.problem]) for item in items]
    for few in _fitting(
        [len(prompt) + len(item.tokens) for prompt, item in zip(prompts, items, strict=True)],
        PLACES_AT_ONCE[base.device.type],
    ):
        found += base.drawn_from(prompts[few], [item.tokens for item in items[few]])
    return found


def _fitting(lengths: Sequence[int], places: int) -> Iterator[slice]:
    """Consecutive parts that fit when each sequence is given as many places as the longest; of one at least."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - start) * max(lengths[start : end + 1]) > places:
            yield slice(start, end)
            start = end


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
    states = torch.cat(states_of(base, problems, group))
    h, ids, logits, lse, found = (column.cpu() for column in (states, *_read_logits(base, states, config)))
    lengths = [len(item.tokens) for item in group]

    def spread(values: list[Any], dtype: torch.dtype) -> Tensor:
        """A completion's value, at each of its positions."""
        return torch.tensor(values, dtype=dtype).repeat_interleave(torch.tensor(lengths))

    gated = found > config.tau
    acts = torch.ones_like(gated) if config.gate == "always" else gated
    opened = torch.split(gated, lengths)
    rows = Features(
        h=h,
        ids=ids,
        logits=logits,
        lse=lse,
        chosen=torch.tensor([token for item in group for token in item.tokens], dtype=torch.int32),
        advantage=spread([item.advantage for item in group], torch.float32),
        position=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        item=spread(list(range(first, first + len(group))), torch.int32),
        problem=spread([numbers[item.problem] for item in group], torch.int32),
        held_out=spread([item.held_out for item in group], torch.bool),
        gated=gated,
        random=torch.cat([_draw(one, _generator(config.seed, item)) for one, item in zip(opened, group, strict=True)]),
        acts=acts,
    )
    return rows.at(rows.gated | rows.random | (rows.acts & rows.held_out))


def _draw(opened: Tensor, generator: torch.Generator) -> Tensor:
    """As many positions as are open, at random: bool [n], as `opened`."""
    drawn = torch.zeros_like(opened)
    drawn[torch.randperm(len(opened), generator=generator)[: int(opened.sum())]] = True
    return drawn


def _read_logits(base: Base, h: Tensor, config: FitConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [n, hidden] -> candidates' ids and logits [n, CANDIDATES], logsumexp of z / T [n], the gate's statistic [n]."""
    parts = []
    at_once = max(1, STATISTIC_NUMBERS[h.device.type] // base.vocab)
    for rows in torch.split(h, LOGIT_ROWS[h.device.type]):
        for z in torch.split(base.logits(rows), at_once):
            z = z.float()
            ids, values = rank(z, CANDIDATES)
            parts.append((ids.int(), values, (z / config.temperature).logsumexp(-1), statistic(z, config.gate)))
    ids, values, lse, found = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, values, lse, found


def statistic(z: Tensor, gate: str) -> Tensor:
    """What a gate of that kind compares with tau (gate.py), of base logits [n, vocab] in float32 -> [n].

    A gate that is always open has none: the entropy then tells the positions to learn from."""
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    if gate == "margin":
        best = p.topk(2).values
        return best[:, 1] - best[:, 0]
    entropy = -(p * log_p).sum(-1)
    if gate == "varentropy":
        return (p * (log_p + entropy[:, None]) ** 2).sum(-1)
    return entropy


def gate_of(config: FitConfig) -> Gate:
    """The gate of the corrections that a fit makes."""
    return Gate(config.gate, config.tau)  # type: ignore[arg-type]  # FitConfig knows no other kinds


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
