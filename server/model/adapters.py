"""LoRAs in the forward: each token's linear layers gain the update of the adapter that its sequence runs under.

Invariant: the layers compute all tokens of a step together, as without adapters, and an update is added to the outputs
of its own tokens alone; so tokens without an adapter come out bit for bit as from a model that knows none. The model's
modules stay as they are: a hook on each adapted layer reads what acts in this thread's forward, and is idle otherwise.

    layers = AdaptedLayers(model);  placed = layers.bring(adapter);  layers.attach(placed)
    with layers.acting([Group(placed, slice(0, 4))]): decoder(...)
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import CorrectionError
from trimtab.server.model.linear import PackedLinear
from trimtab.server.model.staging import stage
from trimtab.steering.adapter import Adapter, LoraLayer
from trimtab.steering.bank import Entry

Placed = Mapping[str, tuple[Tensor, Tensor]]  # by a layer's path: A^T [in, rank], and B^T [rank, out] with its scale


class Group(NamedTuple):
    """The tokens of a step that run under one adapter."""

    placed: Placed
    tokens: Tensor | slice  # int64, or a range: which of the packed tokens


class AdaptedLayers:
    """The linear layers of one transformers model that adapters act on."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hooked: set[str] = set()
        self._lock = threading.Lock()
        self._now = threading.local()

    def bring(self, adapter: Adapter) -> Placed:
        """An adapter on the model's device, in its dtype. Raises CorrectionError for a layer that is not there.

        It takes time and changes nothing: any thread's, while forwards run.
        """
        inside = set(self._model.get_decoder().modules())  # read now: some were packed after this was made
        return {path: self._place(path, layer, inside) for path, layer in adapter.layers.items()}

    def attach(self, placed: Placed) -> None:
        """Hook the layers that it acts on. This changes the modules: not while a forward runs."""
        with self._lock:
            for path in placed.keys() - self._hooked:
                self._model.get_submodule(path).register_forward_hook(self._hook(path))
                self._hooked.add(path)

    @contextmanager
    def acting(self, groups: Sequence[Group]) -> Iterator[None]:
        """What this thread's forward computes under which adapters."""
        self._now.groups = groups
        try:
            yield
        finally:
            self._now.groups = ()

    def _place(self, path: str, update: LoraLayer, inside: set[nn.Module]) -> tuple[Tensor, Tensor]:
        A, B, scale = update
        try:
            layer = self._model.get_submodule(path)
        except AttributeError:
            raise CorrectionError(f"the adapter acts on {path}, which this model does not have") from None
        if not isinstance(layer, nn.Linear | PackedLinear) or layer not in inside:
            raise CorrectionError(f"the adapter acts on {path}, which is no linear layer inside the decoder")
        sizes, expected = (A.shape[1], B.shape[0]), (layer.in_features, layer.out_features)
        if sizes != expected:
            raise CorrectionError(f"the adapter's {path} maps {sizes[0]} to {sizes[1]} numbers; the model's {expected}")
        where = {"device": self._model.device, "dtype": self._model.dtype}
        return A.T.contiguous().to(**where), (B.T.float() * scale).contiguous().to(**where)

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        now = self._now

        def add_updates(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            """inputs [1, tokens, in], outputs [1, tokens, out]."""
            for placed, tokens in getattr(now, "groups", ()):
                if path not in placed:
                    continue
                A, B = placed[path]
                if isinstance(tokens, slice):
                    outputs[0, tokens] += (inputs[0][0, tokens] @ A) @ B
                else:
                    outputs[0].index_add_(0, tokens, (inputs[0][0].index_select(0, tokens) @ A) @ B)

        return add_updates


class Shelf:
    """Placed adapters by the number of their bank's entry, each for as long as somebody has the entry."""

    def __init__(self) -> None:
        self.placed: dict[int, Placed] = {}
        self._watched: list[weakref.ref[Entry]] = []

    def put(self, entry: Entry, placed: Placed) -> None:
        held, number = self.placed, entry.index
        held[number] = placed
        self._watched = [watch for watch in self._watched if watch() is not None]
        # Not a finalizer: that would keep what it calls, and so the adapters of a core that is gone.
        self._watched.append(weakref.ref(entry, lambda _: held.pop(number, None)))


def group_tokens(
    owners: Sequence[int], counts: Sequence[int], placed: Mapping[int, Placed], device: torch.device
) -> list[Group]:
    """owners: the adapter of each span of packed tokens, negative for none; counts: its tokens."""
    ranges: dict[int, list[range]] = {}
    at = 0
    for adapter, count in zip(owners, counts, strict=True):
        if adapter >= 0:
            ranges.setdefault(adapter, []).append(range(at, at + count))
        at += count
    groups = []
    for adapter, parts in sorted(ranges.items()):
        tokens = [token for part in parts for token in part]
        if len(tokens) == tokens[-1] + 1 - tokens[0]:
            groups.append(Group(placed[adapter], slice(tokens[0], tokens[-1] + 1)))
        else:
            groups.append(Group(placed[adapter], stage([np.array(tokens)], device)[0]))
    return groups
