"""What the next step computes, without any model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.server.engine.request import Request
from trimtab.server.engine.rule import Rule
from trimtab.server.engine.scheduler import WORTH, Scheduler
from trimtab.server.engine.sequence import Row, Sequence
from trimtab.server.engine.slots import BLOCK


def sequence(name: str, prompt: list[int], index: int = 0, n: int = 1, beside: Row | None = None) -> Sequence:
    request, rule = Request(name, tuple(prompt), n=n), Rule()
    return Sequence(request, index, 0, 100, rule, frozenset(), Row(list(prompt)), beside)


def run_step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    work = scheduler.plan()
    for w in work:
        scheduler.computed(w)
        if w.samples:
            w.sequence.append(99)
            if w.sequence.sampled == 1:
                scheduler.vouch(w.sequence)
    return [(w.sequence.request.id, w.start, w.end) for w in work]


def test_decode_goes_first_and_chunks_share_what_is_left() -> None:
    scheduler = Scheduler(slots=3, step_tokens=8, copy=lambda *_: None)
    scheduler.add(sequence("a", [1] * 5))
    assert run_step(scheduler) == [("a", 0, 5)]
    scheduler.add(sequence("b", list(range(2, 14))))
    scheduler.add(sequence("c", list(range(30, 34))))
    assert run_step(scheduler) == [("a", 5, 6), ("b", 0, 7)]
    assert run_step(scheduler) == [("a", 6, 7), ("b", 7, 12), ("c", 0, 2)]
    assert run_step(scheduler) == [("a", 7, 8), ("b", 12, 13), ("c", 2, 4)]


def test_a_shared_prefix_is_copied_and_only_the_rest_is_computed() -> None:
    copies: list[tuple[int, int, int]] = []
    scheduler = Scheduler(slots=2, step_tokens=64, copy=lambda *args: copies.append(args))
    scheduler.add(sequence("a", [1, 2, 3, 4, 5, 6]))
    run_step(scheduler)
    scheduler.add(sequence("b", [1, 2, 3, 4, 9]))
    assert run_step(scheduler) == [("a", 6, 7), ("b", 4, 5)]
    assert copies == [(0, 1, 4)]


def test_samples_of_one_request_prefill_once() -> None:
    copies: list[tuple[int, int, int]] = []
    scheduler = Scheduler(slots=4, step_tokens=4, copy=lambda *args: copies.append(args))
    for index in range(3):
        scheduler.add(sequence("a", [1, 2, 3, 4, 5, 6], index, n=3))
    assert run_step(scheduler) == [("a", 0, 4)]
    assert run_step(scheduler) == [("a", 4, 6)]
    assert run_step(scheduler) == [("a", 6, 7), ("a", 5, 6), ("a", 5, 6)]
    assert copies == [(0, 1, 5), (0, 2, 5)]


def test_samples_wait_for_their_first_while_it_waits() -> None:
    copies: list[tuple[int, int, int]] = []
    scheduler = Scheduler(slots=4, step_tokens=64, copy=lambda *args: copies.append(args))
    scheduler.add(sequence("a", SYSTEM))
    for index in range(2):
        scheduler.add(sequence("b", [*SYSTEM, *range(10)], index, n=2))
    assert run_step(scheduler) == [("a", 0, 64)]
    assert run_step(scheduler) == [("a", 64, 80)]
    assert run_step(scheduler) == [("a", 80, 81), ("b", 80, 90)]
    assert run_step(scheduler) == [("a", 81, 82), ("b", 90, 91), ("b", 89, 90)]
    assert copies == [(0, 1, 80), (1, 2, 89)]


def test_among_many_with_one_beginning_the_longest_is_copied() -> None:
    copies: list[tuple[int, int, int]] = []
    scheduler = Scheduler(slots=32, step_tokens=999, copy=lambda *args: copies.append(args))
    for i in range(20):
        scheduler.add(sequence(f"r{i}", [*SYSTEM, i, i]))
    run_step(scheduler)
    run_step(scheduler)
    copies.clear()
    scheduler.add(sequence("late", [*SYSTEM, 17, 17, 5]))
    assert ("late", 82, 83) in run_step(scheduler)
    assert copies == [(17, 20, 82)]


SYSTEM = list(range(100, 100 + 5 * BLOCK))  # how many prompts begin


def test_a_rush_after_one_system_prompt_computes_it_once() -> None:
    copies: list[tuple[int, int, int]] = []
    scheduler = Scheduler(slots=8, step_tokens=50, copy=lambda *args: copies.append(args))
    for i in range(4):
        scheduler.add(sequence(f"r{i}", [*SYSTEM, i, i]))
    assert run_step(scheduler) == [("r0", 0, 50)]
    assert run_step(scheduler) == [("r0", 50, 82)]
    assert run_step(scheduler) == [("r0", 82, 83), ("r1", 80, 82), ("r2", 80, 82), ("r3", 80, 82)]
    assert copies == [(0, slot, 80) for slot in (1, 2, 3)]


def test_little_in_common_is_not_waited_for() -> None:
    scheduler = Scheduler(slots=4, step_tokens=256, copy=lambda *_: None)
    for i in range(2):
        scheduler.add(sequence(f"r{i}", [*SYSTEM[: WORTH - 1], i, i]))
    assert run_step(scheduler) == [("r0", 0, WORTH + 1), ("r1", 0, WORTH + 1)]


def test_other_adapters_are_not_waited_for() -> None:
    scheduler = Scheduler(slots=4, step_tokens=256, copy=lambda *_: None)
    for adapter in (-1, 0, 1):
        one = sequence(f"r{adapter}", SYSTEM)
        one.row.adapter = adapter
        scheduler.add(one)
    assert run_step(scheduler) == [("r-1", 0, 80), ("r0", 0, 80), ("r1", 0, 80)]


def test_who_waits_for_a_beginning_keeps_a_slot() -> None:
    scheduler = Scheduler(slots=3, step_tokens=40, copy=lambda *_: None)
    for name, prompt in (("a", SYSTEM), ("b", [*SYSTEM, 1]), ("other", [1, 2]), ("late", [3, 4])):
        scheduler.add(sequence(name, prompt))
    assert run_step(scheduler) == [("a", 0, 40)]
    assert list(scheduler.waiting) == [("b", 0), ("late", 0)]


@pytest.mark.parametrize("at", ["own", "companion's"])
def test_a_pair_waits_for_either_beginning_and_keeps_two_slots(at: str) -> None:
    scheduler = Scheduler(slots=4, step_tokens=40, copy=lambda *_: None)
    scheduler.add(sequence("a", SYSTEM))
    own, beside = ([*SYSTEM, 1], [5]) if at == "own" else ([5], [*SYSTEM, 1])
    scheduler.add(sequence("pair", own, beside=Row(beside)))
    for i in range(2):
        scheduler.add(sequence(f"late {i}", [6 + i, 3]))
    assert run_step(scheduler) == [("a", 0, 40)]
    assert list(scheduler.waiting) == [("pair", 0), ("late 1", 0)]
    run_step(scheduler)
    assert ("pair", 80, 81) in run_step(scheduler)


def test_who_waited_for_a_beginning_goes_before_those_who_came_later() -> None:
    scheduler = Scheduler(slots=8, step_tokens=64, copy=lambda *_: None)
    scheduler.add(sequence("a", [*SYSTEM, 1]))
    scheduler.add(sequence("b", [*SYSTEM, 2]))
    run_step(scheduler)
    for i in range(4):
        scheduler.add(sequence(f"late {i}", [i] * 100))
    assert run_step(scheduler) == [("a", 64, 81), ("late 0", 0, 47)]
    assert run_step(scheduler)[:2] == [("a", 81, 82), ("b", 80, 81)]


def nearly_full(scheduler: Scheduler) -> Scheduler:
    """It pauses whatever room it has, unless nothing runs."""
    scheduler._roomy = scheduler.free_slots
    return scheduler


def test_with_a_pause_those_who_waited_for_a_beginning_are_admitted_at_once() -> None:
    scheduler = nearly_full(Scheduler(slots=5, step_tokens=256, copy=lambda *_: None, pause=100))
    for i in range(3):
        scheduler.add(sequence(f"r{i}", [*SYSTEM, i]))
    assert run_step(scheduler) == [("r0", 0, 81)]
    scheduler.add(sequence("new", [1, 2]))
    assert [name for name, _, _ in run_step(scheduler)] == ["r0", "r1", "r2"]
    assert [name for name, _, _ in run_step(scheduler)] == ["r0", "r1", "r2"]


@pytest.mark.parametrize("computed", [16, 64])
def test_when_a_beginning_does_not_come_it_is_computed(computed: int) -> None:
    """Whoever computed it has left: what it got done is used, and its end is no longer waited for."""
    scheduler = Scheduler(slots=2, step_tokens=16, copy=lambda *_: None)
    first = sequence("first", [*SYSTEM, *SYSTEM, 1])
    scheduler.add(first)
    scheduler.add(sequence("second", [*SYSTEM, *SYSTEM, 2]))
    for _ in range(computed // 16):
        run_step(scheduler)
    assert list(scheduler.waiting) == [("second", 0)]
    scheduler.remove(first)
    assert run_step(scheduler) == [("second", computed, computed + 16)]


prompts = st.tuples(st.integers(0, 150), st.integers(0, 60), st.integers(1, 3)).map(
    lambda sizes: [0] * sizes[0] + [1] * sizes[1] + [2] * sizes[2]
)
arrivals = st.lists(
    st.tuples(
        prompts,
        st.none() | prompts,  # what a companion reads
        st.integers(-1, 0),  # the adapter
        st.integers(0, 12),  # the step before which it comes
        st.none() | st.integers(1, 8),  # how many steps later it leaves, if it does
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(arrivals, st.integers(2, 5), st.integers(1, 40), st.integers(0, 9))
def test_whoever_stays_ends_and_reads_its_own_prompt(coming: list, slots: int, step_tokens: int, pause: int) -> None:
    """The cache as (adapter, token) lists: a slot always holds what its row would have put there alone."""
    cache: list[list[tuple[int, int]]] = [[] for _ in range(slots)]

    def copy(source: int, target: int, length: int) -> None:
        cache[target] = cache[source][:length]

    scheduler = Scheduler(slots, step_tokens, copy, pause)
    sequences = {}
    for step in range(5000):
        for i, (prompt, beside, adapter, comes, leaves) in enumerate(coming):
            if step == comes:
                companion = None if beside is None else Row(list(beside), adapter=0)
                sequences[i] = sequence(str(i), prompt, beside=companion)
                sequences[i].row.adapter = adapter
                scheduler.add(sequences[i])
            if leaves is not None and step == comes + leaves:
                leaving = scheduler.find(str(i), 0)
                if leaving is not None:
                    scheduler.remove(leaving)
        work = scheduler.plan()
        if not work and step > 12:
            break
        for w in work:
            row = w.row
            held = cache[row.slot][: w.start] + [(row.adapter, token) for token in row.tokens[w.start : w.end]]
            assert held == [(row.adapter, token) for token in row.tokens[: w.end]]
            cache[row.slot] = held
            scheduler.computed(w)
        for w in work:
            if w.samples and w.sequence.append(3) is None and w.sequence.sampled == 3:
                scheduler.remove(w.sequence)
    assert not scheduler.waiting
    assert not scheduler.running
    assert scheduler.free_slots == slots
    for i, (_, _, _, _, leaves) in enumerate(coming):
        assert leaves is not None or sequences[i].sampled == 3


@pytest.mark.parametrize(
    ("own", "slots", "cached", "copied"),
    [
        (WORTH + 1, 3, [0, 20, 20 + WORTH + 1, 20 + WORTH + 1], [(0, 1, 20)]),
        (WORTH - 1, 3, [0, 20, 20, 20], []),  # too little to keep
        (WORTH + 1, 1, [0, 20, 20, 20], []),  # no other slot
    ],
)
def test_who_shares_only_a_header_does_not_take_a_conversations_slot(
    own: int, slots: int, cached: list[int], copied: list[tuple[int, int, int]]
) -> None:
    copies: list[tuple[int, int, int]] = []
    scheduler = Scheduler(slots, step_tokens=512, copy=lambda *args: copies.append(args))
    header = list(range(20))
    first, second = ([*header, *range(start, start + own)] for start in (1000, 2000))
    turns = [first, second, [*first, 1], [*second, 1]]
    for prompt, found in zip(turns, cached, strict=True):
        one = sequence("turn", prompt)
        scheduler.add(one)
        assert run_step(scheduler) == [("turn", found, len(prompt))]
        scheduler.remove(one)
    assert copies == copied


def test_a_removed_sequence_frees_its_slot_and_the_next_takes_it() -> None:
    scheduler = Scheduler(slots=1, step_tokens=8, copy=lambda *_: None)
    first, second = sequence("a", [1, 2]), sequence("b", [1, 2, 3])
    scheduler.add(first)
    scheduler.add(second)
    assert run_step(scheduler) == [("a", 0, 2)]
    assert list(scheduler.waiting) == [("b", 0)]
    scheduler.remove(first)
    assert run_step(scheduler) == [("b", 2, 3)]
    scheduler.remove(second)
    assert scheduler.free_slots == 1


def test_a_taken_slot_no_longer_offers_what_it_held() -> None:
    """The slot's old prefix is gone once another sequence is admitted to it, in the same plan already."""
    copies: list[tuple[int, int, int]] = []
    scheduler = Scheduler(slots=2, step_tokens=64, copy=lambda *args: copies.append(args))
    old = sequence("old", [1, 2, 3, 4, 5])
    scheduler.add(old)
    run_step(scheduler)
    scheduler.remove(old)
    busy = sequence("busy", [8, 8, 8])
    scheduler.add(busy)
    run_step(scheduler)
    scheduler.add(sequence("taker", [9, 9, 9]))
    assert run_step(scheduler)[-1] == ("taker", 0, 3)
    scheduler.remove(busy)
    scheduler.add(sequence("late", [1, 2, 3, 4, 6]))
    assert ("late", 0, 5) in run_step(scheduler)
    assert copies == []


def test_a_spoilt_slot_is_not_reused() -> None:
    scheduler = Scheduler(slots=1, step_tokens=64, copy=lambda *_: None)
    spoilt = sequence("spoilt", [1, 2, 3])
    scheduler.add(spoilt)
    run_step(scheduler)
    scheduler.remove(spoilt, reusable=False)
    scheduler.add(sequence("next", [1, 2, 3]))
    assert run_step(scheduler) == [("next", 0, 3)]


def test_a_pair_waits_for_two_slots_and_nobody_overtakes_it() -> None:
    scheduler = Scheduler(slots=2, step_tokens=64, copy=lambda *_: None)
    first, pair = sequence("a", [1, 2]), sequence("pair", [3, 4], beside=Row([3, 4], adapter=0))
    for s in (first, pair, sequence("late", [5, 6])):
        scheduler.add(s)
    assert run_step(scheduler) == [("a", 0, 2)]
    assert run_step(scheduler) == [("a", 2, 3)]
    scheduler.remove(first)
    assert run_step(scheduler) == [("pair", 0, 2), ("pair", 0, 2)]
    scheduler.remove(pair)
    assert scheduler.free_slots == 2
    assert run_step(scheduler) == [("late", 0, 2)]


@pytest.mark.parametrize("step_tokens", [2, 3, 4, 5, 7, 11, 64])
@pytest.mark.parametrize(("own", "beside"), [(9, 3), (3, 9), (1, 9), (9, 1), (1, 1), (2, 2)])
def test_both_rows_of_a_pair_always_sample_in_the_same_step(own: int, beside: int, step_tokens: int) -> None:
    scheduler = Scheduler(slots=4, step_tokens=step_tokens, copy=lambda *_: None)
    pair = sequence("pair", list(range(own)), beside=Row(list(range(50, 50 + beside))))
    scheduler.add(sequence("other", [20, 21]))
    scheduler.add(pair)
    for _ in range(12):
        work = scheduler.plan()
        reached = {id(w.row) for w in work if w.sequence is pair and w.end == len(w.row.tokens)}
        assert len(reached) in (0, 2)
        assert sum(w.end - w.start for w in work) <= max(step_tokens, 4)
        for w in work:
            scheduler.computed(w)
        for w in work:
            if w.samples:
                w.sequence.append(99)
    assert pair.row.tokens[own:] == pair.companion.tokens[beside:] != []


def test_samples_of_a_pair_prefill_both_prompts_once() -> None:
    copies: list[tuple[int, int, int]] = []
    scheduler = Scheduler(slots=4, step_tokens=64, copy=lambda *args: copies.append(args))
    for index in range(2):
        scheduler.add(sequence("a", [1, 2, 3], index, n=2, beside=Row([1, 2, 3, 4, 5], adapter=7)))
    assert run_step(scheduler) == [("a", 0, 3), ("a", 0, 5)]
    assert run_step(scheduler) == [("a", 3, 4), ("a", 5, 6), ("a", 2, 3), ("a", 4, 5)]
    assert copies == [(0, 2, 2), (1, 3, 4)]


def test_an_adapters_prefix_is_its_own() -> None:
    copies: list[tuple[int, int, int]] = []
    scheduler = Scheduler(slots=2, step_tokens=64, copy=lambda *args: copies.append(args))
    for name, adapter, computed in (("x", 0, 0), ("base", -1, 0), ("y", 1, 0), ("x", 0, 0), ("x", 0, 3)):
        s = sequence(name, [1, 2, 3, 4])
        s.row.adapter = adapter
        scheduler.add(s)
        assert run_step(scheduler) == [(name, computed, 4)]
        scheduler.remove(s)
    assert copies == []


def read_ahead(scheduler: Scheduler) -> dict[str, int]:
    """One step, in which all that is planned is computed, and all that can, sample. -> each row's tokens, by name."""
    work = scheduler.plan()
    for w in work:
        scheduler.computed(w)
        if w.samples:
            w.sequence.append(9)
    return {w.sequence.request.id: w.end - w.start for w in work}


def test_with_a_pause_prompts_are_read_together() -> None:
    scheduler = nearly_full(Scheduler(slots=4, step_tokens=64, copy=lambda *_: None, pause=3))
    scheduler.add(sequence("a", [1] * 5))
    assert read_ahead(scheduler) == {"a": 5}  # nothing runs: at once
    scheduler.add(sequence("b", [2] * 5))
    assert [read_ahead(scheduler) for _ in range(2)] == [{"a": 1}] * 2
    scheduler.add(sequence("c", [3] * 5))
    assert scheduler.settled(1, 0)
    assert [read_ahead(scheduler) for _ in range(2)] == [{"a": 1}, {"a": 1, "b": 5, "c": 5}]
    for _ in range(5):
        read_ahead(scheduler)
    scheduler.add(sequence("d", [4] * 5))
    assert read_ahead(scheduler) == {"a": 1, "b": 1, "c": 1, "d": 5}  # long after the last: at once


def test_a_pause_ends_where_a_prompt_is_read_anyway_or_nothing_runs() -> None:
    scheduler = nearly_full(Scheduler(slots=4, step_tokens=8, copy=lambda *_: None, pause=100))
    scheduler.add(sequence("long", [1] * 14))
    assert read_ahead(scheduler) == {"long": 8}
    scheduler.add(sequence("b", [2]))
    assert read_ahead(scheduler) == {"b": 1, "long": 6}
    scheduler.add(sequence("c", [3]))
    assert read_ahead(scheduler) == {"b": 1, "long": 1}
    for running in list(scheduler.running.values()):
        scheduler.remove(running)
    assert read_ahead(scheduler) == {"c": 1}


def test_what_is_decoded_ahead_counts_as_a_pause() -> None:
    """Asked as the engine does: a step is told of once it is over, and what follows it is asked before."""
    scheduler = nearly_full(Scheduler(slots=3, step_tokens=8, copy=lambda *_: None, pause=3))
    scheduler.add(sequence("a", [1] * 5))
    read_ahead(scheduler)
    scheduler.add(sequence("b", [2] * 5))
    assert scheduler.settled(1, 0)
    (running,) = scheduler.running.values()
    for settled in (True, True, False):
        assert scheduler.settled(0, 1) is settled
        scheduler.decoded([running])
        running.append(9)
    assert read_ahead(scheduler) == {"a": 1, "b": 5}


def test_a_pause_ends_where_an_eighth_of_the_slots_is_free() -> None:
    scheduler = Scheduler(slots=16, step_tokens=64, copy=lambda *_: None, pause=100)
    for i in range(17):
        scheduler.add(sequence(f"r{i}", [i + 1]))
    assert len(read_ahead(scheduler)) == 16
    running = list(scheduler.running.values())
    scheduler.remove(running[0])
    assert len(read_ahead(scheduler)) == 15  # one is free: not yet
    scheduler.remove(running[1])
    assert "r16" in read_ahead(scheduler)
