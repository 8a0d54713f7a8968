"""Corrections change under a running engine: requests keep what they began with, and nothing of the old is left."""

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch

from tiny import tiny_base, tiny_correction, tiny_lora
from trimtab.errors import CorrectionError, InvalidRequest, NotFound
from trimtab.kernels import reference
from trimtab.kernels.record import FIRED, StepInputs, StepRecord
from trimtab.kernels.trial import try_step
from trimtab.server import swap
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.engine import Engine
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request, SamplingParams, Steering
from trimtab.server.engine.rule import rule_for
from trimtab.server.swap import Swap
from trimtab.steering.bank import Bank
from trimtab.steering.correction import Correction
from trimtab.steering.gate import Gate

WAIT = 60
CONFIG = EngineConfig(slots=4, max_model_len=256)
PROMPT = tuple(range(60, 100))
BASE = tiny_base()
TIERS: dict[str, Callable[[int], Correction]] = {
    "head": lambda seed: tiny_correction(BASE, "x", seed=seed),
    "lora": lambda seed: tiny_lora(BASE, "x", seed=seed, gate=Gate("always")),
    "gated": lambda seed: tiny_lora(BASE, "x", seed=seed),
}


class Harness:
    """An engine over a bank that changes, and its answers."""

    def __init__(self) -> None:
        self.bank = Bank(BASE.hidden, "cpu")
        self.engine = Engine(BASE, self.bank, CONFIG)
        self.swap = Swap(self.engine, BASE, self.bank)
        self.events: list[Event] = []
        self.came = threading.Condition()
        self.engine.start(self._take)
        self._asked = 0

    def _take(self, events: list[Event]) -> None:
        with self.came:
            self.events += events
            self.came.notify_all()

    def begin(self, tokens: int = 8, steering: Steering | None = None) -> str:
        self._asked += 1
        name = f"r{self._asked}"
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        self.engine.submit(Request(name, PROMPT, sampling, steering or Steering("x")))
        return name

    def wait(self, name: str, tokens: int | None = None) -> list[int | None]:
        """All tokens of a request; or the first ones, once there are so many."""

        def ready() -> bool:
            mine = [event for event in self.events if event.request_id == name]
            return bool(mine) and (mine[-1].finish is not None if tokens is None else len(mine) >= tokens)

        with self.came:
            assert self.came.wait_for(ready, WAIT)
            return [event.token for event in self.events if event.request_id == name]


@pytest.fixture
def harness():
    made = Harness()
    yield made
    made.engine.close()


def alone(correction: Correction, tokens: int = 8) -> list[int | None]:
    bank = Bank(BASE.hidden, "cpu")
    bank.add(correction)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return [event.token for event in Core(BASE, bank, CONFIG).run([Request("r", PROMPT, sampling, Steering("x"))])]


@pytest.mark.parametrize("tier", TIERS)
def test_what_runs_ends_as_it_began_and_what_comes_is_the_new_versions(harness: Harness, tier: str) -> None:
    make = TIERS[tier]
    old, new = alone(make(0), 40), alone(make(1), 40)
    assert old != new, "the test wants corrections that matter"
    harness.swap.put(make(0))
    first = harness.begin(40)
    harness.wait(first, 3)
    entry, replaced = harness.swap.put(make(1))
    assert (replaced, entry.correction.name) == (True, "x")
    second = harness.begin(40)
    assert harness.wait(first) == old
    assert harness.wait(second) == new
    harness.swap.remove("x")
    with pytest.raises(NotFound):
        harness.begin()


@pytest.mark.parametrize("tier", TIERS)
def test_no_keys_and_values_of_the_old_version_are_read_by_the_new(harness: Harness, tier: str) -> None:
    """The same prompt again and again, over slots that keep what they held."""
    expected = [alone(TIERS[tier](seed)) for seed in (0, 1)]
    for turn in range(4):
        harness.swap.put(TIERS[tier](turn % 2))
        assert [harness.wait(harness.begin()) for _ in range(2)] == [expected[turn % 2]] * 2


@pytest.mark.parametrize("tier", TIERS)
def test_a_version_that_nobody_has_is_gone(harness: Harness, tier: str) -> None:
    harness.swap.put(TIERS[tier](0))
    entry = weakref.ref(harness.bank.entry("x"))
    name = harness.begin(40)
    harness.wait(name, 3)
    harness.swap.put(TIERS[tier](1))
    assert entry() is not None, "a request has it"
    harness.wait(name)
    harness.engine.between_steps(lambda core: core)  # its last step is over
    gc.collect()
    assert entry() is None
    if tier != "head":
        placed = harness.engine.between_steps(lambda core: dict(core._runner._shelf.placed))
        assert placed.keys() == {harness.bank.entry("x").index}


def test_rows_are_used_again_however_often_a_correction_changes(harness: Harness) -> None:
    for seed in range(12):
        harness.swap.put(tiny_correction(BASE, "x", seed=seed, rank=1 + seed % 3))
        harness.wait(harness.begin(2))
    tensors = harness.bank.tensors()
    assert tensors is not None
    assert len(tensors.A) <= 3


def test_a_request_keeps_what_it_was_read_with_even_before_it_is_submitted(harness: Harness) -> None:
    harness.swap.put(tiny_correction(BASE, "x", seed=0))
    rule = rule_for(Steering("x"), harness.bank)
    harness.swap.remove("x")
    harness.swap.put(tiny_correction(BASE, "y", seed=1))
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    harness.engine.submit(Request("r", PROMPT, sampling, Steering("x"), rule=rule))
    assert harness.wait("r") == alone(tiny_correction(BASE, "x", seed=0))


def test_what_does_not_fit_changes_nothing(harness: Harness) -> None:
    harness.swap.put(tiny_correction(BASE, "x", seed=0))
    before = harness.bank.entry("x")
    other = tiny_base(seed=1)
    lora = tiny_lora(BASE, "x")
    cut = {path: layer._replace(A=layer.A[:, :5]) for path, layer in lora.adapter.layers.items()}
    wrong = [
        tiny_correction(other, "x"),
        dataclasses.replace(tiny_correction(BASE, "x"), A=torch.zeros(4, 5), B=torch.zeros(5, 4), b=torch.zeros(5)),
        dataclasses.replace(lora, adapter=lora.adapter._replace(layers=cut)),
    ]
    for correction, message in zip(wrong, ("other weights", "hidden size 5", "maps 5 to"), strict=True):
        with pytest.raises(CorrectionError, match=message):
            harness.swap.put(correction)
    assert harness.bank.entry("x") is before
    assert harness.wait(harness.begin()) == alone(before.correction)


def test_a_device_that_is_full_is_told_and_the_engine_goes_on(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(harness.bank, "prepare", full)
    with pytest.raises(InvalidRequest, match="no memory is left"):
        harness.swap.put(tiny_correction(BASE, "x"))
    assert len(harness.wait(harness.begin(2, Steering()))) == 2


def test_what_a_new_head_compiles_is_compiled_before_a_request_can_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[bool, bool, bool, list[str], str]] = []
    widest: list[int] = []

    def step(inputs: StepInputs) -> StepRecord:
        record = reference.step(inputs)
        where = threading.current_thread().name
        fired = bool(record.status[0] & FIRED)
        tried.append((inputs.edits is not None, inputs.mask is not None, fired, harness.bank.names, where))
        assert inputs.corrections is not None
        widest.append(inputs.corrections.max_top_k)
        return record

    monkeypatch.setattr(swap, "trial_for", lambda device: partial(try_step, step))
    harness = Harness()
    harness.swap.put(tiny_lora(BASE, "adapter"))
    assert not tried
    harness.swap.put(tiny_correction(BASE, "x"))
    assert widest == [10] * 4
    assert {(edits, masks) for edits, masks, *_ in tried} == {(e, m) for e in (False, True) for m in (False, True)}
    assert all(fired and "x" not in names for _, _, fired, names, _ in tried)
    assert {where for *_, where in tried} == {threading.current_thread().name}
    harness.swap.put(tiny_correction(BASE, "wider", top_k=20))
    assert widest[4:] == [20] * 4
    harness.engine.close()


def test_the_built_in_contrast_stays() -> None:
    harness = Harness()
    with pytest.raises(InvalidRequest, match="built in"):
        harness.swap.remove("contrast")
    with pytest.raises(
        CorrectionError, match="contrast is the built-in correction's name: give this correction another name"
    ):
        harness.swap.put(tiny_correction(BASE, "contrast"))
    assert harness.bank.get("contrast").tier == "contrast"
    harness.engine.close()
