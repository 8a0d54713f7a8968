"""The entry point of `vllm.general_plugins`, which every process of vLLM calls: what our processor could not see alone.

In a worker, once its model is loaded, the model's `compute_logits(h)` is wrapped, so that (h, z) of the rows about to
be drawn are at hand; in the API's process the folders are read, so that requests are checked before they are taken.

Invariant: without our processor on the command line nothing is changed: not a method, not a logit.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import EngineFailure, UnsupportedModel
from trimtab.server.vllm_plugin.base import check_front, check_weights, checkpoint
from trimtab.server.vllm_plugin.head import whole_head
from trimtab.server.vllm_plugin.settings import read_settings
from trimtab.server.vllm_plugin.support import check_engine, check_version
from trimtab.steering.bank import Bank
from trimtab.steering.folder import version_of

log = logging.getLogger("vllm.trimtab")

PACKAGE = __package__ or ""  # how the command line names our processor
_sights: dict[int, "Sight"] = {}  # by the engine's configuration, which a worker and its processor share
_served: list[Bank] = []  # of the engine that this process is the front of


class Sight:
    """What a worker's processor sees: the model's head, and h and z of the rows that are drawn from next."""

    def __init__(self, runner: Any, head: Tensor, tells: bool, rank: int) -> None:
        self.runner, self.head = runner, head
        self.tells, self.rank = tells, rank  # whether this rank tells what was done; its place among those that draw
        self.wanted: Callable[[], bool] = lambda: False  # whether any row may be steered
        self._last: tuple[Tensor, Tensor] | None = None

    def see(self, hidden: Tensor, logits: Tensor | None) -> None:
        """What was computed. float32 logits are edited in place before we are asked: ours must be the model's."""
        self._last = None
        if logits is not None and self.wanted():
            self._last = hidden, logits.clone() if logits.dtype == torch.float32 else logits

    def take(self, rows: int) -> tuple[Tensor, Tensor]:
        """(h, z) of the rows that are drawn from now; raises EngineFailure, as guessing would steer other rows."""
        last, self._last = self._last, None
        if last is None or len(last[1]) != rows:
            seen = "none" if last is None else f"those of {len(last[1])}"
            raise EngineFailure(f"trimtab's plugin was asked for {rows} rows and has seen the logits of {seen}")
        return last


def register() -> None:
    """Wrap what must be wrapped, once a process. A vLLM that we do not know is left alone: the processor says so."""
    import vllm

    try:
        check_version(vllm.__version__)
    except UnsupportedModel:
        return
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _after(WorkerWrapperBase, "init_device", lambda wrapper: _after(wrapper.worker, "load_model", _look))
    _after(InputProcessor, "__init__", _open)


def installed() -> bool:
    """Whether vLLM has called `register` in this process."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    return hasattr(WorkerWrapperBase.init_device, "trimtab")


def has_sight(vllm_config: Any) -> bool:
    """Whether the worker with this configuration has loaded a model that computes logits."""
    return id(vllm_config) in _sights


def sight_of(vllm_config: Any) -> Sight:
    """Of the worker with this configuration. Raises EngineFailure."""
    if not has_sight(vllm_config):
        raise EngineFailure("trimtab's plugin was not there when the model was loaded: it cannot steer it")
    return _sights[id(vllm_config)]


def served() -> Bank:
    """The corrections a request may name. Raises ValueError, as this is asked while one is checked."""
    if not _served:
        raise ValueError("trimtab's plugin was not loaded: VLLM_PLUGINS, if it is set, must name trimtab")
    return _served[-1]


def _after(owner: Any, method: str, then: Callable[[Any], None]) -> None:
    """owner.method, and `then` of what it was called on. owner: a class, or one object of it."""
    plain = getattr(owner, method)
    if hasattr(plain, "trimtab"):
        return

    @functools.wraps(plain)
    def both(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        then(args[0] if isinstance(owner, type) else owner)
        return result

    both.trimtab = True  # type: ignore[attr-defined]
    setattr(owner, method, both)


def _is_asked_for(vllm_config: Any) -> bool:
    asked = vllm_config.model_config.logits_processors or ()
    return any((one if isinstance(one, str) else one.__module__).startswith(PACKAGE) for one in asked)


def _open(front: Any) -> None:
    """An InputProcessor was made, which checks requests: read what they may name."""
    config = front.vllm_config
    if not _is_asked_for(config):
        return
    check_engine(config)
    settings = read_settings(config)
    corrections, model = settings.load(), config.model_config
    hidden = model.get_hidden_size()
    check_front(list(corrections.values()), hidden, model.model, front.tokenizer, settings.any_base)
    bank = Bank(hidden, "cpu")
    bank.add(*corrections.values())
    for correction in corrections.values():
        log.info("trimtab: %s, version %s, where %s", correction.name, version_of(correction), correction.gate)
    _served[:] = [bank]


def _look(worker: Any) -> None:
    """A worker has loaded its model: see its logits from now on, where it computes any."""
    config = worker.vllm_config
    if not _is_asked_for(config):
        return
    from vllm.distributed import get_pp_group, get_tp_group

    check_engine(config)
    if not get_pp_group().is_last_rank:
        return
    ranks, model = get_tp_group(), worker.get_model()
    settings, described = read_settings(config), config.model_config
    tells = ranks.rank_in_group == 0
    if tells:
        folder = checkpoint(described.model, described.revision)
        check_weights(list(settings.load().values()), described.model, folder, settings.any_base)

    def gather(part: Tensor) -> Tensor:
        whole: Tensor = ranks.all_gather(part.contiguous(), 0) if ranks.world_size > 1 else part
        return whole

    head = whole_head(model, described.get_vocab_size(), described.get_hidden_size(), gather)
    sight = _sights[id(config)] = Sight(worker.model_runner, head, tells, ranks.rank_in_group)
    compute_logits = model.compute_logits

    @functools.wraps(compute_logits)
    def computed(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = compute_logits(hidden, *args, **kwargs)
        # vLLM's sum over ranks on a CPU differs from rank to rank in its last bits: all draw from the first one's h
        alike = ranks.world_size > 1 and hidden.device.type == "cpu"
        sight.see(ranks.broadcast(hidden.clone(), 0) if alike else hidden, logits)
        return logits

    model.compute_logits = computed
    log.info("trimtab: sees the logits of %s, rank %d", type(model).__name__, ranks.rank_in_group)
