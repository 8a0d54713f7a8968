"""Features are what the engine computed when it drew the tokens, at the positions the gate opened."""

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

from trimtab.errors import TaskError
from trimtab.server.engine.core import Core
from trimtab.server.engine.event import Receipt
from trimtab.server.engine.request import Request, SamplingParams
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.training import features as features_module
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.features import Features, cache_features, states_of
from trimtab.steering.training.rollouts import encode, open_core
from trimtab.steering.training.selection import Item

PROMPTS = {name: Problem(name, None, prompt=text) for name, text in {"a": "Hello", "b": "Once upon a time"}.items()}
TAU = 1.5


def sample(base: Base) -> tuple[list[Item], dict[tuple[str, int], list[Receipt]]]:
    core = Core(base, Bank(base.hidden, "cpu"))
    drawn = SamplingParams(seed=3, max_tokens=9)
    requests = [Request(name, encode(base, problem), drawn, n=2) for name, problem in PROMPTS.items()]
    tokens: dict[tuple[str, int], list[int]] = {}
    receipts: dict[tuple[str, int], list[Receipt]] = {}
    for event in core.run(requests):
        assert event.token is not None
        assert event.receipt is not None
        tokens.setdefault((event.request_id, event.index), []).append(event.token)
        receipts.setdefault((event.request_id, event.index), []).append(event.receipt)
    items = [Item(name, i, tokens[name, i], 1.0 if i else -1.0, name == "b") for name in PROMPTS for i in range(2)]
    return items, receipts


def expected_gate(items: Sequence[Item], receipts: dict[tuple[str, int], list[Receipt]]) -> list[list[bool]]:
    return [[r.entropy > TAU for r in receipts[item.problem, item.sample]] for item in items]


def rows_of(features: Features, index: int, column: str) -> torch.Tensor:
    values: torch.Tensor = getattr(features, column)[(features.item == index) & features.gated]
    return values


def test_rows_are_what_the_engine_saw(base: Base, tmp_path: Path) -> None:
    items, receipts = sample(base)
    config = FitConfig(tau=TAU, temperature=1.0)
    features = cache_features(base, PROMPTS, items, config, tmp_path)
    gates = expected_gate(items, receipts)
    assert 0 < sum(map(sum, gates)) < sum(map(len, gates))
    for index, (item, gate) in enumerate(zip(items, gates, strict=True)):
        seen = [r for r, is_open in zip(receipts[item.problem, item.sample], gate, strict=True) if is_open]
        tokens = [t for t, is_open in zip(item.tokens, gate, strict=True) if is_open]
        assert rows_of(features, index, "chosen").tolist() == tokens
        assert rows_of(features, index, "ids")[:, 0].tolist() == [r.base_token for r in seen]
        assert set(rows_of(features, index, "advantage").tolist()) <= {item.advantage}
        assert set(rows_of(features, index, "held_out").tolist()) <= {item.held_out}
        logits, ids = rows_of(features, index, "logits"), rows_of(features, index, "ids")
        for row, (receipt, token) in enumerate(zip(seen, tokens, strict=True)):
            at = (ids[row] == token).nonzero()
            if len(at):
                logprob = float(logits[row, at[0, 0]] - rows_of(features, index, "lse")[row])
                assert logprob == pytest.approx(receipt.base_logprob, abs=1e-4)
        here = features.item == index
        assert int(features.random[here].sum()) == sum(gate), "as many random positions as open ones"


def test_a_gate_that_is_always_open_is_measured_at_every_held_out_position(base: Base, tmp_path: Path) -> None:
    items, _ = sample(base)
    gated, always = (
        cache_features(base, PROMPTS, items, FitConfig(gate=gate, tau=TAU), tmp_path / gate)
        for gate in ("entropy", "always")
    )
    assert torch.equal(gated.acts, gated.gated)
    assert always.acts.all()
    held_out = always.at(always.held_out)
    assert held_out.position.tolist() == [t for item in items if item.held_out for t in range(len(item.tokens))]
    for mask in ("gated", "random"):
        assert torch.equal(always.at(getattr(always, mask)).chosen, gated.at(getattr(gated, mask)).chosen)


def test_long_completions_are_read_fewer_at_a_time(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items, _ = sample(base)
    together = states_of(base, PROMPTS, items)
    monkeypatch.setattr(features_module, "PLACES_AT_ONCE", {"cpu": 2 * 14})  # two after the shorter prompt
    with mock.patch.object(base, "drawn_from", wraps=base.drawn_from) as read:
        alone = states_of(base, PROMPTS, items)
    assert [len(call.args[0]) for call in read.call_args_list] == [2, 1, 1]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_finished_file_is_read_and_not_computed_again(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, _ = sample(base)
    config = FitConfig(tau=TAU)
    before = cache_features(base, PROMPTS, items, config, tmp_path)
    monkeypatch.setattr(base, "drawn_from", None)
    after = cache_features(base, PROMPTS, items, config, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_prompt_that_fills_the_context_is_named(base: Base) -> None:
    long = Problem("long", None, prompt="x" * 600)
    with pytest.raises(TaskError, match="'long' has 600 tokens"):
        open_core(base, Bank(base.hidden, "cpu"), [*PROMPTS.values(), long], 8, 4, 1)


def test_messages_go_through_the_chat_template(base: Base) -> None:
    chat = Problem("c", None, messages=({"role": "user", "content": "Hi"},))
    text = base.tokenizer.decode(encode(base, chat))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    template, base.tokenizer.chat_template = base.tokenizer.chat_template, None
    try:
        with pytest.raises(TaskError, match="'c' has messages, but tiny-llama has no chat template"):
            encode(base, chat)
    finally:
        base.tokenizer.chat_template = template
