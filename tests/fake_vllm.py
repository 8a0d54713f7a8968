"""The few classes of vLLM that the plugin meets, and two model runners that treat it as vLLM's do. Greedy, tiny.

    vllm = FakeVllm(monkeypatch, base);  plugin = vllm.load()
    engine = vllm.engine(V1Runner, folders, chunk=3)
    engine.add("a", prompt, {"correction": "c0"});  tokens = engine.run(max_tokens=8)

Invariant: the runners use no more of the plugin than vLLM does, in its order: the batch's changes, h, logits, then the
processor on float32 logits. A prompt is read `chunk` tokens a step; until it is read, its row's token is thrown away.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tiny import read_states
from trimtab.server.model.base import Base

PLUGIN = "trimtab.server.vllm_plugin"
PROCESSOR = f"{PLUGIN}:Processor"


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: Sequence[int] = ()
    added: Sequence[tuple[int, Any, list[int] | None, list[int]]] = ()
    moved: Sequence[tuple[int, int, MoveDirectionality]] = ()


@dataclass
class SamplingParams:
    extra_args: dict[str, Any] | None = None
    structured_outputs: Any = None


class FakeModel(nn.Module):
    """An LM head, whole or in parts, and what vLLM calls to get logits."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.lm_head = nn.Module()
        self.lm_head.weight = nn.Parameter(base.head_weight.clone(), requires_grad=False)
        self._base = [base]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._base[0].logits(hidden)


class Worker:
    def __init__(self, engine: "Engine") -> None:
        self.vllm_config, self._engine = engine.config, engine

    def init_device(self) -> None:
        self.model_runner = self._engine.runner

    def load_model(self) -> None:
        self.model = FakeModel(self._engine.base)
        self.model_runner.model = self.model

    def get_model(self) -> FakeModel:
        return self.model


class FakeVllm:
    """vllm in sys.modules, for one test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base: Base, version: str = "0.32.0+cpu") -> None:
        self.base = base

        class WorkerWrapperBase:
            def __init__(self, worker: Worker) -> None:
                self.worker = worker

            def init_device(self) -> None:
                self.worker.init_device()

        class InputProcessor:
            def __init__(self, vllm_config: Any, tokenizer: Any) -> None:
                self.vllm_config, self.tokenizer = vllm_config, tokenizer

        self.wrapper, self.front = WorkerWrapperBase, InputProcessor
        group = SimpleNamespace(is_last_rank=True, rank_in_group=0, world_size=1)
        v1 = {"BatchUpdate": BatchUpdate, "MoveDirectionality": MoveDirectionality}
        modules: dict[str, dict[str, Any]] = {
            "vllm": {"__version__": version},
            "vllm.distributed": {"get_pp_group": lambda: group, "get_tp_group": lambda: group},
            "vllm.v1.sample.logits_processor": {"LogitsProcessor": type("LogitsProcessor", (), {}), **v1},
            "vllm.v1.worker.gpu.sample.logits_processor": {"LogitsProcessor": type("LogitsProcessor", (), {})},
            "vllm.v1.worker.worker_base": {"WorkerWrapperBase": WorkerWrapperBase},
            "vllm.v1.engine.input_processor": {"InputProcessor": InputProcessor},
        }
        self.group = group
        for name in modules:
            for at in range(name.count(".") + 1):
                part = ".".join(name.split(".")[: at + 1])
                if part not in modules or part == name:
                    module = ModuleType(part)
                    module.__path__ = []
                    vars(module).update(modules.get(part, {}))
                    monkeypatch.setitem(sys.modules, part, module)
        for name in ("hook", "processor"):  # which hold what they met of another test's vllm
            monkeypatch.delitem(sys.modules, f"{PLUGIN}.{name}", raising=False)

    def load(self) -> Any:
        """The plugin's hook, after vLLM has called it."""
        hook = importlib.import_module(f"{PLUGIN}.hook")  # not the package's attribute, which another test has set
        hook.register()
        return hook

    def config(self, folders: Mapping[str, Path | str], **changes: Any) -> SimpleNamespace:
        model = SimpleNamespace(
            logits_processors=[PROCESSOR],
            runner_type="generate",
            model="tiny",
            revision=None,
            served_model_name="m",
            get_hidden_size=lambda: self.base.hidden,
            get_vocab_size=lambda: self.base.vocab,
        )
        parallel = SimpleNamespace(distributed_executor_backend="mp", pipeline_parallel_size=1)
        told = SimpleNamespace(
            model_config=model,
            parallel_config=parallel,
            speculative_config=None,
            scheduler_config=SimpleNamespace(max_num_seqs=8),
            additional_config={"trimtab": {"corrections": {k: str(v) for k, v in folders.items()}}},
        )
        for path, value in changes.items():
            owner, _, name = path.rpartition("__")
            setattr(getattr(told, owner) if owner else told, name, value)
        return told


@dataclass
class Running:
    id: str
    prompt: list[int]
    params: SamplingParams
    output: list[int] = field(default_factory=list)
    computed: int = 0  # tokens in the cache
    slot: int = -1


class Engine:
    """One worker, and the API's process in front of it."""

    def __init__(self, vllm: FakeVllm, config: Any, chunk: int) -> None:
        self.base, self.config, self.chunk = vllm.base, config, chunk
        self.requests: list[Running] = []
        self.done: dict[str, list[int]] = {}
        self.runner: Any = self
        vllm.front(config, vllm.base.tokenizer)
        self.processor = self.make_processor(sys.modules[PLUGIN].Processor)
        wrapper = vllm.wrapper(Worker(self))
        wrapper.init_device()
        wrapper.worker.load_model()
        self.model = wrapper.worker.get_model()

    def make_processor(self, kind: Any) -> Any:
        raise NotImplementedError

    def batch(self, rows: list[Running]) -> Any:
        raise NotImplementedError

    def take_in(self) -> None:
        raise NotImplementedError

    def leave(self, request: Running) -> None:
        raise NotImplementedError

    def add(self, id: str, prompt: Sequence[int], asked: dict[str, Any] | None = None) -> None:
        params = SamplingParams(asked)
        type(self.processor).validate_params(params)
        self.requests.append(Running(id, list(prompt), params))

    def edit(self, request: Running, logits: Tensor) -> None:
        """What a mask or a bias does before the processor is asked: float32 logits in place."""

    @torch.inference_mode()
    def step(self) -> None:
        """One forward and one draw."""
        self.take_in()
        rows = self.rows()
        ends = [min(r.computed + self.chunk, len(r.prompt) + len(r.output)) for r in rows]
        self.lengths = ends
        tokens = [(r.prompt + r.output)[:end] for r, end in zip(rows, ends, strict=True)]
        hidden = torch.stack([read_states(self.base, known)[-1] for known in tokens])
        logits = self.model.compute_logits(hidden)
        for request, row in zip(rows, logits, strict=True):
            self.edit(request, row)
        logits = self.draw_from(logits.float(), rows)
        for request, end, row in zip(rows, ends, logits, strict=True):
            request.computed = end
            if end == len(request.prompt) + len(request.output):
                request.output.append(int(row.argmax()))

    def rows(self) -> list[Running]:
        raise NotImplementedError

    def draw_from(self, logits: Tensor, rows: list[Running]) -> Tensor:
        raise NotImplementedError

    def run(self, lengths: Mapping[str, int]) -> dict[str, list[int]]:
        """Every request to its length. They leave as they end, and the batch changes shape."""
        while self.requests:
            self.step()
            for request in list(self.requests):
                if len(request.output) >= lengths[request.id]:
                    self.done[request.id] = request.output
                    self.requests.remove(request)
                    self.leave(request)
        return self.done


class V1Runner(Engine):
    """Rows are slots; the last row moves into a hole, and two rows swap now and then."""

    def make_processor(self, kind: Any) -> Any:
        self._rows: list[Running] = []
        self._removed: list[int] = []
        self._steps = 0
        self.input_batch = SimpleNamespace(num_prompt_tokens=np.zeros(8, dtype=np.int64), req_ids=[])
        self.discard_request_mask = SimpleNamespace(np=np.zeros(8, dtype=np.bool_))
        self.optimistic_seq_lens_cpu = torch.zeros(8, dtype=torch.int32)
        return kind(self.config, torch.device("cpu"), False)

    def take_in(self) -> None:
        """Holes are filled by new requests, then by the last rows."""
        removed, added, moved = sorted(self._removed), [], []
        rows: dict[int, Running] = dict(enumerate(self._rows))
        for row in removed:
            rows.pop(row, None)
        here = {id(r) for r in rows.values()}
        holes = list(removed)
        for request in [r for r in self.requests if id(r) not in here]:
            row = holes.pop(0) if holes else len(self._rows) + sum(a[0] >= len(self._rows) for a in added)
            rows[row] = request
            added.append((row, request.params, request.prompt, request.output))
        gone = [row for row in removed if row not in rows]
        while rows and max(rows) >= len(rows):
            last, hole = max(rows), min(set(range(len(rows))) - set(rows))
            rows[hole] = rows.pop(last)
            moved.append((last, hole, MoveDirectionality.UNIDIRECTIONAL))
        self._steps += 1
        if self._steps % 3 == 0 and len(rows) > 1:
            last = len(rows) - 1
            rows[0], rows[last] = rows[last], rows[0]
            moved.append((0, last, MoveDirectionality.SWAP))
        changed = bool(removed or added or moved)
        self._rows, self._removed = [rows[i] for i in range(len(rows))], []
        self.processor.update_state(BatchUpdate(len(rows), gone, added, moved) if changed else None)

    def rows(self) -> list[Running]:
        return self._rows

    def leave(self, request: Running) -> None:
        self._removed.append(next(i for i, r in enumerate(self._rows) if r is request))

    def draw_from(self, logits: Tensor, rows: list[Running]) -> Tensor:
        self.input_batch.req_ids = [r.id for r in rows]
        for i, (request, end) in enumerate(zip(rows, self.lengths, strict=True)):
            self.input_batch.num_prompt_tokens[i] = len(request.prompt)
            self.optimistic_seq_lens_cpu[i] = end
            self.discard_request_mask.np[i] = end < len(request.prompt) + len(request.output)
        return self.processor.apply(logits)  # type: ignore[no-any-return]


class V2Runner(Engine):
    """A request keeps its slot; rows come in another order at every step, and nobody says that a slot was left."""

    def make_processor(self, kind: Any) -> Any:
        self._free = [5, 2, 7, 0, 3, 1, 4, 6]
        lengths = lambda: SimpleNamespace(np=np.zeros(8, dtype=np.int32))  # noqa: E731
        self.req_states = SimpleNamespace(
            device=torch.device("cpu"),
            max_num_reqs=8,
            prompt_len=lengths(),
            prefill_len=lengths(),
            index_to_req_id={},
        )
        self._wants: dict[int, bool] = {}
        self._steps = 0
        return kind(self.config, self.req_states)

    def take_in(self) -> None:
        self._steps += 1
        for request in self.requests:
            if request.slot < 0:
                request.slot = self._free.pop(0)
                self.req_states.index_to_req_id[request.slot] = request.id
                self.req_states.prompt_len.np[request.slot] = len(request.prompt)
                self.req_states.prefill_len.np[request.slot] = len(request.prompt)
                self._wants[request.slot] = self.processor.add_request(request.slot, request.params)

    def rows(self) -> list[Running]:
        turn = self._steps % len(self.requests)
        return self.requests[turn:] + self.requests[:turn]

    def leave(self, request: Running) -> None:
        self._free.insert(0, request.slot)

    def draw_from(self, logits: Tensor, rows: list[Running]) -> Tensor:
        slots = np.array([r.slot for r in rows])
        if not any(self._wants[slot] for slot in slots.tolist()):
            return logits
        context = SimpleNamespace(idx_mapping_np=slots, seq_lens_upper_bound_np=np.array(self.lengths))
        return self.processor.apply(logits, context)  # type: ignore[no-any-return]
