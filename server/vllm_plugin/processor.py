"""The logits processor that vLLM is told of: gate and correct the rows whose requests ask for it, before the draw.

    vllm serve MODEL --logits-processors trimtab.server.vllm_plugin:Processor

One class for both of vLLM's model runners, which call different methods of it. The mathematics are kernels/steer.py's.

Invariant: a row that is not steered is not touched, and a row's logits depend on that row alone; every rank computes
the same from the same, so all draw the same token.
"""

from typing import Any

import torch
from torch import Tensor
from vllm import __version__
from vllm.v1.sample.logits_processor import LogitsProcessor as ForV1

from trimtab.errors import UnsupportedModel
from trimtab.kernels.dispatch import steer_for
from trimtab.kernels.record import StepInputs
from trimtab.kernels.steer import rewrite
from trimtab.server.vllm_plugin.ask import ask
from trimtab.server.vllm_plugin.batch import Batch, read_v1, read_v2
from trimtab.server.vllm_plugin.hook import Sight, has_sight, installed, served, sight_of
from trimtab.server.vllm_plugin.receipts import Receipts
from trimtab.server.vllm_plugin.settings import read_settings
from trimtab.server.vllm_plugin.support import check_engine, check_version
from trimtab.server.vllm_plugin.table import Table
from trimtab.steering.bank import Bank

check_version(__version__)

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ForV2  # noqa: E402  # newer than some versions


class Processor(ForV2, ForV1):  # type: ignore[misc]  # vllm is not there when types are checked
    """One a worker. V1 tells which row a request takes; V2, which slot, and in `apply` the rows."""

    def __init__(self, vllm_config: Any, *where: Any) -> None:
        """where: V1's device and whether memory is pinned, or V2's request states. Raises TrimtabErrors."""
        check_engine(vllm_config)
        if not installed():
            raise UnsupportedModel("trimtab's plugin was not loaded: VLLM_PLUGINS, if it is set, must name trimtab")
        self._config, self._settings = vllm_config, read_settings(vllm_config)
        on_v1 = len(where) == 2
        self._device = torch.device(where[0] if on_v1 else where[0].device)
        slots = vllm_config.scheduler_config.max_num_seqs if on_v1 else where[0].max_num_reqs
        self._bank = Bank(vllm_config.model_config.get_hidden_size(), self._device)
        self._bank.add(*self._settings.load().values())
        self._table = Table(slots)
        self._steer = steer_for(self._device)
        self._sight: Sight | None = None
        self._receipts: Receipts | None = None

    @classmethod
    def validate_params(cls, params: Any) -> None:
        """In the API's process. Raises ValueError, which becomes HTTP 400."""
        ask(params, served())

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, update: Any) -> None:
        """V1: the batch has changed. In this order: removed, added, moved."""
        self._look()
        if update is None:
            return
        for row in update.removed:
            self._table.set(row, None)
        for row, params, *_ in update.added:
            self._table.set(row, ask(params, self._bank))
        for source, target, how in update.moved:
            self._table.move(source, target, how.name == "SWAP")

    def add_request(self, slot: int, params: Any) -> bool:
        """V2: a request takes a slot, whose last owner left without a word. -> whether it must see `apply`."""
        self._look()
        asked = ask(params, self._bank)
        self._table.set(slot, asked)
        return asked is not None

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """float32 logits [rows, vocab], changed in place. context: V2's."""
        if not self._table.asked:
            return logits
        sight = self._look() or sight_of(self._config)
        rows = len(logits)
        batch = read_v1(sight.runner, rows) if context is None else read_v2(sight.runner, rows, context)
        chosen = (self._table.steered[batch.slots] & batch.draws).nonzero()[0]
        if len(chosen):
            self._steer_rows(logits, sight, batch, chosen)
        return logits

    def _steer_rows(self, logits: Tensor, sight: Sight, batch: Batch, chosen: Any) -> None:
        hidden, base = sight.take(len(logits))
        every = len(chosen) == len(logits)
        at = torch.from_numpy(chosen).to(self._device, non_blocking=True)
        steered = self._steer(
            StepInputs(
                logits=base if every else base[at],
                hidden=hidden if every else hidden[at],
                head=sight.head,
                params=self._table.gather(batch.slots[chosen], self._device),
                edits=None,
                corrections=self._bank.tensors(),
                alternatives=0,
            )
        )
        part = logits if every else logits[at]
        rewrite(part, steered)
        if not every:
            logits[at] = part
        if self._receipts is not None:
            who = [
                (batch.ids[row], int(batch.positions[row]), self._table.asked[int(batch.slots[row])]) for row in chosen
            ]
            self._receipts.put(steered.record, who)

    def _look(self) -> Sight | None:
        """What the worker's model shows, from the first request on; None on ranks that compute no logits."""
        if self._sight is None and has_sight(self._config):
            sight = self._sight = sight_of(self._config)
            sight.wanted = lambda: bool(self._table.asked)
            path = self._settings.receipts
            if sight.tells or (path is not None and "{rank}" in path):
                model = self._config.model_config.served_model_name
                name = model[0] if isinstance(model, list) else model
                path = path and path.replace("{rank}", str(sight.rank))
                self._receipts = Receipts(path, str(name), counts=sight.tells)
        return self._sight
