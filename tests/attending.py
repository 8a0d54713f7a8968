"""Random steps of attention over KV slots, and running them: for the tests of both implementations."""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.places import Places, Rotary

TOKENS_A_TILE = 2  # no more than the kernels' tiles hold of any group here


class Case(NamedTuple):
    """The arguments of `attend`, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    places: Places
    scale: float
    window: int | None
    rotary: Rotary | None


def run(module: str, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """What `module` makes of a copy of the case: its result, and the cache that it leaves."""
    keys, values = case.keys.clone(), case.values.clone()
    attended = importlib.import_module(module).attend(*case._replace(keys=keys, values=values))
    return attended, keys, values


def make_case(
    decode: int,
    chunks: list[tuple[int, int]],
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 8,
    length: int = 200,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    rotates: bool = False,
    norms: bool = False,
    seed: int = 0,
) -> Case:
    """`decode` rows at random positions, the second of them padding; chunks as (start, end). Slots in random order.

    Queries, keys and values lie beside one another, as one product makes them. Whatever no token may read is NaN.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    slots = torch.randperm(decode + len(chunks) + 1, generator=g).tolist()
    slot = slots[:decode]
    position = [-1 if i == 1 else int(torch.randint(0, length, (1,), generator=g)) for i in range(decode)]
    tiles = []
    for home, (start, end) in zip(slots[decode:], chunks, strict=False):
        first = len(slot) - start
        tiles += [(home, first + at, min(TOKENS_A_TILE, end - at), at) for at in range(start, end, TOKENS_A_TILE)]
        slot += [home] * (end - start)
        position += range(start, end)
    query, key, value = draw(len(slot), heads + 2 * kv_heads, size).split([heads, kv_heads, kv_heads], dim=1)
    keys, values = draw(len(slots), length, kv_heads, size), draw(len(slots), length, kv_heads, size)
    for home in slots:
        new = [at for where, at in zip(slot, position, strict=True) if where == home and at >= 0]
        keys[home, min(new, default=0) :], values[home, min(new, default=0) :] = torch.nan, torch.nan
    rotary = None
    if rotates:
        angle = torch.rand(len(slot), size // 2, generator=g) * 6
        cos, sin = (torch.cat([half, half], dim=1).to(dtype) for half in (angle.cos(), angle.sin()))
        rotary = Rotary(cos, sin, draw(size) if norms else None, draw(size) if norms else None, 1e-6)
    places = Places(
        torch.tensor(slot), torch.tensor(position), decode, torch.tensor(tiles, dtype=torch.int32) if tiles else None
    )
    return Case(query, key, value, keys, values, places, 0.3, window, rotary)
