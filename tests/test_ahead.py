"""The model's next step, launched before anyone knows this one's tokens: what ends meanwhile is left out of it."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tiny import take_gpus_path, tiny_base, tiny_correction, tiny_model, tiny_tokenizer
from trimtab.server.engine import runner
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request, SamplingParams, Steering
from trimtab.server.model.attention import PADDING
from trimtab.server.model.base import Base, prepare
from trimtab.server.model.graphs import DecodeGraphs
from trimtab.steering.bank import Bank

STOPS = list(range(20))
SICK = range(60, 90)  # tokens after which a row's logits are NaN


@pytest.fixture(params=["simulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def base(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Base]:
    """On a GPU, or on its path."""
    if request.param == "simulated":
        take_gpus_path(monkeypatch)
        yield tiny_base(eos_token_id=STOPS)
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    else:
        yield prepare(tiny_model("llama", eos_token_id=STOPS).to("cuda"), tiny_tokenizer(), "tiny-llama")


def make_core(base: Base, graphs: bool = True, pause: int | None = 0) -> Core:
    bank = Bank(base.hidden, base.device)
    bank.add(tiny_correction(base))
    return Core(base, bank, EngineConfig(slots=4, max_model_len=40, graphs=graphs, pause=pause))


def requests() -> list[Request]:
    """More than there are slots, plain and steered ones; they end by a stop token or their length."""
    return [
        Request(
            str(i),
            tuple(range(100 + i, 105 + 2 * i)),
            SamplingParams(temperature=0.9, seed=i, max_tokens=5 + i),
            Steering("c0", tau=1.0) if i % 2 else Steering(),
        )
        for i in range(12)
    ]


def told(events: list[Event]) -> list[tuple[Any, ...]]:
    by_request = sorted(events, key=lambda event: event.request_id)
    return [(e.request_id, e.token, e.finish, e.receipt and e.receipt.fired) for e in by_request]


def run(core: Core) -> tuple[list[Event], int, set[str]]:
    """-> the events, how many steps were launched ahead, and how rows ended where others went on in the next one."""
    events: list[Event] = []
    ahead, ends = 0, set()
    for request in requests():
        core.submit(request)
    while core.busy:
        came = core.step()
        events += came
        if core._ahead is not None:
            ahead += 1
            ends |= {event.finish for event in came if event.finish}
            assert set(core._ahead.sampling.sequences) == set(core._scheduler.running.values())
    return events, ahead, ends


def test_answers_are_those_of_an_engine_that_waits(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, padded = DecodeGraphs.run, []

    def watch(self: DecodeGraphs, ids: Any, slots: Any, positions: Any) -> Any:
        padded.append(PADDING in list(positions))
        return launch(self, ids, slots, positions)

    monkeypatch.setattr(DecodeGraphs, "run", watch)
    events, ahead, ends = run(make_core(base))
    assert ahead > 10
    assert ends == {"stop", "length"}
    assert any(padded)  # a row that its length ends writes nothing more
    waiting, none, _ = run(make_core(base, graphs=False))
    assert none == 0
    assert told(waiting) == told(events)


def test_who_is_given_up_is_left_out_of_what_runs_ahead(base: Base) -> None:
    """At a step's end, as when a stop string came or a caller left; also one that waits, and one that is gone."""
    given_up = {3: "1", 5: "2", 6: "11", 8: "0"}

    def run_and_leave(core: Core) -> tuple[list[Event], list[bool]]:
        events: list[Event] = []
        kept, steps = [], 0
        for request in requests():
            core.submit(request)
        while core.busy:
            events += core.step()
            steps += 1
            if (name := given_up.get(steps)) is not None:
                ran = core._ahead is not None
                core.abort(name, 0)
                if ran:
                    kept.append(core._ahead is not None)
        return events, kept

    events, kept = run_and_leave(make_core(base))
    assert len(kept) > 1
    assert all(kept), "nobody else is computed again"
    waiting, _ = run_and_leave(make_core(base, graphs=False))
    ended = {event.request_id for event in waiting if event.finish}
    assert ended >= {"3", "4", "5", "6", "7"}
    assert told([e for e in events if e.request_id in ended]) == told([e for e in waiting if e.request_id in ended])


def test_a_device_that_cannot_leave_one_out_computes_the_others_again(
    base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = make_core(base)
    for request in requests()[:3]:
        core.submit(request)
    events: list[Event] = []
    while core._ahead is None:
        events += core.step()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    with monkeypatch.context() as patch:
        patch.setattr(runner.Runner, "leave_out", fail)
        core.abort("0", 0)
    assert "0 could not be left out of the step that runs ahead" in caplog.text
    while core.busy:
        events += core.step()
    waiting = make_core(base, graphs=False)
    expected = told(list(waiting.run(requests()[1:3])))
    assert told([event for event in events if event.request_id != "0"]) == expected


@pytest.mark.parametrize("pause", [2, 3, 4])
def test_where_choices_wait_prompts_are_read_after_so_many_steps(base: Base, pause: int) -> None:
    core, gaps, alone = make_core(base, pause=pause), [], 0
    core._scheduler._roomy = 4  # it pauses as long as anything runs
    for request in requests():
        core.submit(request)
    events: list[Event] = []
    while core.busy:
        events += core.step()
        if core._scheduler._since:
            alone += 1
        else:
            gaps.append(alone)
            alone = 0
    assert min(gaps[1:]) == pause
    assert told(events) == told(run(make_core(base))[0])


def test_a_row_that_dies_leaves_the_others_and_nothing_in_its_slot(base: Base) -> None:
    with torch.no_grad():
        base.model.get_input_embeddings().weight[list(SICK)] = math.nan
    cores = [make_core(base), make_core(base, graphs=False)]
    (events, ahead, ends), (waiting, _, _) = map(run, cores)
    assert ahead > 5
    assert "error" in ends
    assert told(events) == told(waiting)
    held = [[core._scheduler._slots.held(slot) for slot in range(4)] for core in cores]
    assert held[0] == held[1]


@pytest.mark.parametrize("place", ["sample", "forward_again", "settle"])
def test_a_step_that_fails_takes_what_was_launched_ahead_with_it(
    base: Base, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, count = make_core(base), 0
    does = getattr(runner.Runner, place)

    def fail(self: runner.Runner, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        done = does(self, *arguments)
        if count == 5:
            raise RuntimeError("it broke")
        return done

    monkeypatch.setattr(runner.Runner, place, fail)
    for request in requests()[:4]:
        core.submit(request)
    while not any(event.finish == "error" for event in core.step()):
        assert core.busy
    assert core._ahead is None
    assert not core.busy
    assert told(run(core)[0]) == told(run(make_core(base))[0])
