"""What a GPU runs, on the CPU: the kernels' references in the layers, and a capture that just calls."""

import itertools
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from tiny import FAMILIES, REFERENCE, take_gpus_path, tiny_base, tiny_correction, tiny_lora, tiny_model, tiny_tokenizer
from trimtab.errors import EngineFailure
from trimtab.kernels.capture import Capture
from trimtab.server.engine import runner
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.request import Request, SamplingParams, Steering, Structure
from trimtab.server.model import base as base_module
from trimtab.server.model.attention import PADDING, KVBatch, Span
from trimtab.server.model.base import Base, prepare
from trimtab.server.model.graphs import batch_sizes
from trimtab.steering.bank import Bank
from trimtab.steering.gate import Gate


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return take_gpus_path(monkeypatch)


def test_all_captures_warm_up_on_one_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps a workspace for every stream that it has seen."""
    monkeypatch.setattr(torch, "cuda", MagicMock())
    capture, ran = Capture(), []
    for size in range(3):
        capture(partial(ran.append, size))
    assert ran == [0, 0, 1, 1, 2, 2]
    assert torch.cuda.Stream.call_count == 1


def answers(base: Base, **config: Any) -> list[tuple[Any, ...]]:
    """Everything but the floats: greedy and sampled, of every tier and none, of several lengths."""
    bank = Bank(base.hidden, base.device)
    bank.add(tiny_correction(base, "c0"))
    bank.add(tiny_lora(base))
    steerings = [
        Steering(),
        Steering(),
        Steering("c0", strength=2.0, tau=1.0),
        Steering("contrast", tau=1.0, companion_prompt=(9, 8, 7)),
        Steering("lora", tau=1.0),
        Steering("lora", gate="always"),
    ]
    requests = [
        Request(
            str(i),
            tuple(range(3 + i, 8 + 7 * i)),
            SamplingParams(temperature=(0, 0.8)[i % 2], top_p=0.9, seed=i, max_tokens=9, ignore_eos=True),
            steerings[i % 6],
            n=1 + (i == 3),
            structure=Structure("regex", "[a-z]{3}[0-9]+") if i % 4 == 1 else None,
        )
        for i in range(12)
    ]
    core = Core(base, bank, EngineConfig(slots=5, step_tokens=24, max_model_len=80, **config))
    events = [(e.request_id, e.index, e.token, e.receipt and e.receipt.fired, e.error) for e in core.run(requests)]
    return sorted(events, key=lambda event: event[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpus_path_answers_as_the_cpus(family: str, on_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    fast = tiny_base(family)
    assert (fast._fused is not None) == (family != "gemma3_text")
    found = answers(fast)
    steps = len(on_gpu)
    assert steps > 5
    assert answers(fast, graphs=False) == found
    assert len(on_gpu) == steps
    monkeypatch.undo()
    assert answers(tiny_base(family)) == found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_answers_with_graphs_as_without_them_and_as_the_cpu(family: str) -> None:
    base = prepare(tiny_model(family).to("cuda"), tiny_tokenizer(), f"tiny-{family}")
    assert (base._fused is not None) == (family != "gemma3_text")
    found = answers(base)
    assert answers(base, graphs=False) == found
    assert answers(tiny_base(family)) == found


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("device", "most"), [("cpu", 3), pytest.param("cuda", 16, marks=pytest.mark.gpu)])
def test_layers_that_stream_their_weights_come_to_the_same(
    family: str, device: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of shapes that the kernels take, and with each number of rows that a step may have around the last they take."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if device == "cpu":
        take_gpus_path(monkeypatch)
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.1}
    model = tiny_model(family, dtype=torch.bfloat16, **wide)
    base = prepare(model.to(device), tiny_tokenizer(), f"tiny-{family}")
    assert base._fused is not None
    kernels, streamed = base._fused._kernels, []

    def step(rows: int) -> torch.Tensor:
        cache = base.new_cache(rows, 8)
        for at in range(3):
            states = base.forward(
                [7 * i + at for i in range(rows)], KVBatch(cache, [Span(i, at, at + 1) for i in range(rows)])
            )
        return states.float().cpu()

    def watch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        streamed.append(len(x))
        return kernels.stream(x, weight)

    for rows in (1, 2, most, most + 1):
        base._fused._kernels = kernels._replace(streams=lambda x, weight: False)
        expected = step(rows)
        base._fused._kernels = kernels._replace(stream=watch)
        torch.testing.assert_close(step(rows), expected, rtol=0.05, atol=0.05)
    assert set(streamed) == {1, 2, most}
    core = Core(base, Bank(base.hidden, base.device), EngineConfig(slots=most + 1, max_model_len=40))
    asked = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    told = list(core.run(Request(str(i), (i, 9, 8), asked) for i in range(most + 1)))
    assert len(told) == 20 * (most + 1)
    assert not [event.error for event in told if event.error]


SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
SCALED |= {"llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(("family", "config"), [("ministral3", {"rope_parameters": SCALED}), ("smollm3", {})])
def test_parts_of_known_names_that_do_more_are_not_fused(
    family: str, config: dict[str, Any], on_gpu: list[int]
) -> None:
    """What is left out may act beyond all positions that are compared when a model is loaded."""
    assert tiny_base(family, **config)._fused is None


def test_the_first_steps_use_every_slot_and_say_what_to_do_where_they_fail(
    on_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, most = tiny_base(), []
    bank = Bank(base.hidden, "cpu")
    config = EngineConfig(slots=6, step_tokens=40, max_model_len=64)

    def watch(self: runner.Runner, work: list[Any]) -> runner.Forward:
        most.append((len(work), sum(w.end - w.start for w in work)))
        if len(work) > limit:
            raise torch.OutOfMemoryError
        return forward(self, work)

    forward, limit = runner.Runner.forward, 6
    monkeypatch.setattr(runner.Runner, "forward", watch)
    Core(base, bank, config)
    assert max(rows for rows, _ in most) == 6
    assert max(tokens for _, tokens in most) == 40
    limit = 5
    with pytest.raises(EngineFailure, match="--max-num-seqs"):
        Core(base, bank, config)


@pytest.mark.parametrize("slots", [1, 2])
def test_the_first_steps_suit_few_slots_and_any_tier(slots: int, on_gpu: list[int]) -> None:
    base = tiny_base()
    bank = Bank(base.hidden, "cpu")
    bank.add(tiny_correction(base, "c0"), tiny_lora(base, gate=Gate("entropy", 1.0)))
    core = Core(base, bank, EngineConfig(slots=slots, step_tokens=16, max_model_len=32))
    assert not core.busy
    assert core.free_slots == slots


@pytest.mark.parametrize("graphs", [True, False])
def test_what_no_graph_holds_is_tried_with_every_number_of_rows(
    graphs: bool, on_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel is compiled for how many programs share a row's positions, and for queries that are rotated or not."""
    tried: set[tuple[int, bool]] = set()
    base = tiny_base()
    assert base._fused is not None
    core = Core(base, Bank(base.hidden, "cpu"), EngineConfig(slots=12, max_model_len=64, graphs=graphs))
    kernels = base._fused._kernels

    def attend(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        places, rotary = rest[4], rest[7] if len(rest) > 7 else None
        assert places.tiles is None
        assert (places.position == PADDING).all()
        tried.add((len(query), rotary is None))
        return kernels.attend(query, *rest)

    watched = kernels._replace(attend=attend)
    monkeypatch.setattr(base._fused, "_kernels", watched)
    monkeypatch.setattr(core._runner.cache, "kernels", watched)
    before = core._runner.cache.keys.clone()
    core._runner.try_decoding()
    assert tried == set(itertools.product(batch_sizes(12), (True,) if graphs else (False, True)))
    assert torch.equal(core._runner.cache.keys, before)


def test_fusing_changes_no_weight_and_holds_none_twice(on_gpu: list[int]) -> None:
    base = tiny_base("qwen2")
    attention = base.model.get_decoder().layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert base._fused is not None
    torch.testing.assert_close(torch.cat(parts), base._fused._layers[0].qkv.weight, rtol=0, atol=0)


def test_layers_that_come_out_otherwise_are_not_used(on_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = REFERENCE._replace(silu_mul=lambda gate_up: gate_up.chunk(2, -1)[1])
    monkeypatch.setattr(base_module, "layers_for", lambda device: broken)
    assert tiny_base()._fused is None


def test_batch_sizes_end_at_the_slots_and_waste_less_than_a_third() -> None:
    for rows in (1, 2, 3, 8, 48, 100, 256, 2048):
        sizes = batch_sizes(rows)
        assert sizes == sorted(set(sizes))
        assert (sizes[0], sizes[-1]) == (1, rows)
        for asked in range(9, rows):
            assert next(size for size in sizes if size >= asked) <= 1.5 * asked


def test_a_step_that_was_launched_ahead_is_masked_by_the_token_before_it(on_gpu: list[int]) -> None:
    base = tiny_base()
    core = Core(base, Bank(base.hidden, "cpu"), EngineConfig(slots=3, max_model_len=64))
    for name, regex in (("a", "(xy){6}"), ("b", "(yx){6}"), ("c", "[xy]{12}")):
        core.submit(Request(name, (1, 2, 3), SamplingParams(seed=1), structure=Structure("regex", regex)))
    texts, ahead = dict.fromkeys("abc", ""), 0
    while core.busy:
        for event in core.step():
            if event.finish is None:
                texts[event.request_id] += base.tokenizer.decode([event.token])
        ahead += core._ahead is not None
    assert ahead > 10
    assert (texts["a"], texts["b"]) == ("xy" * 6, "yx" * 6)
    assert len(texts["c"]) == 12
    assert set(texts["c"]) <= {"x", "y"}


def test_what_ends_or_changes_from_outside_spoils_no_step_that_was_launched_ahead(on_gpu: list[int]) -> None:
    base = tiny_base()
    core = Core(base, Bank(base.hidden, "cpu"), EngineConfig(slots=3, max_model_len=64))
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = {name: tuple(range(first, first + 7)) for name, first in (("a", 5), ("b", 50), ("c", 90))}
    for name, prompt in prompts.items():
        core.submit(Request(name, prompt, greedy))
    tokens: dict[str, list[int]] = {name: [] for name in prompts}

    def step() -> None:
        for event in core.step():
            tokens[event.request_id].append(event.token)

    for _ in range(4):
        step()
    assert core._ahead is not None
    core.abort("a", 0)
    core.submit(Request("d", prompts["a"], greedy))  # takes the slot that was left
    tokens["d"] = []
    step()
    tokens["b"][-1] = other = (tokens["b"][-1] + 1) % 200
    core.amend("b", 0, other)
    while core.busy:
        step()

    def alone(prompt: tuple[int, ...]) -> list[int]:
        fresh = Core(base, Bank(base.hidden, "cpu"), EngineConfig(slots=1, max_model_len=64))
        return [event.token for event in fresh.run([Request("x", prompt, greedy)])]

    assert tokens["c"] == alone(prompts["c"])
    assert tokens["d"] == alone(prompts["a"])
    assert tokens["a"] == alone(prompts["a"])[:4]
    assert tokens["b"][5:] == alone(prompts["b"] + tuple(tokens["b"][:5]))[:7]
