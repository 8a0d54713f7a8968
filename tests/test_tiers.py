"""All tiers in one batch of the engine: each answer is what the same request gets alone, and what its tier means."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiny import place, tiny_correction, tiny_lora
from trimtab.errors import ContextOverflow, InvalidRequest
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.event import Event, Receipt
from trimtab.server.engine.request import Budget, Request, SamplingParams, Steering, Structure
from trimtab.server.model.attention import KVBatch, Span
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.correction import LoraCorrection
from trimtab.steering.gate import Gate

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TAU = 2.2  # opens at some steps of the tiny model and not at others
NEGATIVE = tuple(range(70, 82))


@pytest.fixture(scope="module")
def bank(base: Base) -> Bank:
    bank = Bank(base.hidden, "cpu")
    for i in range(2):
        bank.add(tiny_correction(base, f"head{i}", seed=i))
    bank.add(tiny_lora(base, "gated", seed=0, gate=Gate(tau=TAU)))
    bank.add(tiny_lora(base, "other", seed=1, gate=Gate(tau=TAU)))
    bank.add(tiny_lora(base, "always", seed=2, gate=Gate("always", tau=0.0)))
    return bank


def prompt_of(length: int, seed: int = 1) -> tuple[int, ...]:
    return tuple(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def run(
    base: Base, bank: Bank, requests: Iterable[Request], slots: int = 6, step_tokens: int = 16
) -> dict[tuple[str, int], list[Event]]:
    core = Core(base, bank, EngineConfig(slots=slots, step_tokens=step_tokens))
    out = defaultdict(list)
    for event in core.run(requests):
        assert event.error is None
        out[event.request_id, event.index].append(event)
    assert core.free_slots == slots
    assert not core.busy
    return out


def tokens(events: Sequence[Event]) -> list[int | None]:
    return [event.token for event in events]


def receipts(events: Sequence[Event]) -> list[Receipt]:
    return [event.receipt for event in events if event.receipt is not None]


def answer(base: Base, bank: Bank, request: Request) -> list[Event]:
    return run(base, bank, [request], slots=2)[request.id, 0]


def logits_of(base: Base, bank: Bank, ids: Sequence[int], lora: str | None = None) -> Tensor:
    """The last token's, float64, by one forward from scratch."""
    correction = None if lora is None else bank.get(lora)
    placed = [place(base, correction)] if isinstance(correction, LoraCorrection) else []
    span = Span(0, 0, len(ids), len(placed) - 1)
    states = base.forward(list(ids), KVBatch(base.new_cache(1, len(ids)), [span], placed))
    return base.logits(states[-1:])[0].double()


STEERINGS = {
    "plain": Steering(),
    "head": Steering("head0", 3.0, TAU),
    "heads": Steering("head0", 2.0, TAU, weight=0.5, also={"head1": 2.0}),
    "gated": Steering("gated"),
    "half": Steering("other", 0.5),
    "always": Steering("always"),
    "contrast": Steering("contrast", 1.5, TAU, companion_prompt=NEGATIVE),
}


# inside a structure


def test_a_lora_that_is_always_on_says_that_it_acts_inside_a_structure_too(base: Base, bank: Bank) -> None:
    """It is the model that the grammar holds; a gated one rests there."""
    structure = Structure("regex", "[ab]{6}")
    acted = {}
    for name in ("always", "gated"):
        sampling = SamplingParams(temperature=0, max_tokens=6)
        events = run(base, bank, [Request(name, prompt_of(9), sampling, STEERINGS[name], structure=structure)])
        acted[name] = [receipt.fired for receipt in receipts(events[name, 0])]
    assert all(acted["always"])
    assert not any(acted["gated"])


# side by side


def test_all_tiers_side_by_side_with_arrivals_as_they_come(base: Base, bank: Bank) -> None:
    """More choices than slots, prompts that share prefixes across adapters, and prefill in chunks beside decoding."""
    shared = prompt_of(30)
    requests = []
    for i, (name, steering) in enumerate(itertools.islice(itertools.cycle(STEERINGS.items()), 28)):
        prompt = shared[: 10 + 5 * (i % 4)] + prompt_of(1 + 7 * (i % 3), seed=i)
        sampling = SamplingParams(
            temperature=(0.0, 0.8)[i % 2], seed=i, max_tokens=5 + i % 9, presence_penalty=0.3 * (i % 3), ignore_eos=True
        )
        requests.append(Request(f"{name}-{i}", prompt, sampling, steering, n=1 + i % 2))
    together = run(base, bank, requests, slots=7, step_tokens=24)
    kinds = defaultdict(set)
    for request in requests:
        alone = run(base, bank, [request], slots=4)
        for index in range(request.n):
            assert tokens(together[request.id, index]) == tokens(alone[request.id, index]), request.id
            kinds[request.id.split("-")[0]] |= {r.fired for r in receipts(together[request.id, index])}
    assert kinds.pop("plain") == {False}
    assert kinds.pop("always") == {True}
    assert all(seen == {True, False} for seen in kinds.values()), "the test wants steps that fire and steps that do not"


shapes = st.tuples(
    st.sampled_from(list(STEERINGS)),
    st.integers(1, 40),  # prompt
    st.sampled_from([0.0, 0.9]),
    st.integers(0, 2**40),
    st.sampled_from(["apply", "shadow", "off"]),
    st.sampled_from([Budget(), Budget(max_steps=2), Budget(cooldown=1, kl=0.1, until="a"), Budget(kl=0.3)]),
    st.sampled_from([None, "entropy", "varentropy", "margin", "random", "always"]),
    st.integers(1, 3),  # n
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(shapes, min_size=2, max_size=6), slots=st.integers(2, 7))
def test_any_mix_of_requests_gives_each_what_it_gets_alone(base: Base, bank: Bank, shapes: list, slots: int) -> None:
    requests = []
    for i, (name, length, temperature, seed, mode, budget, gate, n) in enumerate(shapes):
        steering = dataclasses.replace(STEERINGS[name], mode=mode, budget=budget)
        if gate is not None and steering.correction is not None:
            tau = {"varentropy": 0.8, "margin": -0.4, "random": 0.5}.get(gate, TAU)
            steering = dataclasses.replace(steering, gate=gate, tau=None if gate == "always" else tau)
        sampling = SamplingParams(temperature=temperature, seed=seed, max_tokens=6)
        requests.append(Request(str(i), prompt_of(length, seed=i), sampling, steering, n))
    together = run(base, bank, requests, slots)
    for request in requests:
        alone = run(base, bank, [request])
        for index in range(request.n):
            assert tokens(together[request.id, index]) == tokens(alone[request.id, index])


# what each tier means


def test_a_lora_that_is_always_on_takes_one_slot_and_answers_as_the_adapted_model(base: Base, bank: Bank) -> None:
    prompt = prompt_of(20)
    events = run(base, bank, [Request("r", prompt, GREEDY, Steering("always"))], slots=1)["r", 0]
    ids = list(prompt)
    for event in events:
        assert event.token == int(logits_of(base, bank, ids, "always").argmax())
        ids.append(event.token)
    assert all(r.open and r.fired and r.kl == 0 and r.base_logprob == r.steered_logprob for r in receipts(events))


@pytest.mark.parametrize("name", ["always", "gated"])
def test_a_lora_gated_always_with_a_companion_is_the_one_that_needs_none(base: Base, bank: Bank, name: str) -> None:
    """A budget that never bites asks for the two rows whose answer the one row gives."""
    request = Request("r", prompt_of(20), GREEDY, Steering(name, gate="always"))
    paired = dataclasses.replace(request, steering=Steering(name, gate="always", budget=Budget(max_steps=10**6)))
    assert tokens(answer(base, bank, request)) == tokens(answer(base, bank, paired))


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.7])
def test_a_gated_lora_mixes_in_the_adapted_model_where_the_gate_opens(base: Base, bank: Bank, strength: float) -> None:
    prompt = prompt_of(20)
    events = answer(base, bank, Request("r", prompt, GREEDY, Steering("gated", strength)))
    _check_mixture(base, bank, events, prompt, prompt, strength, "gated")


@pytest.mark.parametrize("strength", [0.5, 2.0])
@pytest.mark.parametrize("negative", [NEGATIVE, (5,)])
def test_contrast_guides_away_from_what_the_companion_says(
    base: Base, bank: Bank, strength: float, negative: tuple[int, ...]
) -> None:
    prompt = prompt_of(20)
    steering = Steering("contrast", strength, TAU, companion_prompt=negative)
    events = answer(base, bank, Request("r", prompt, GREEDY, steering))
    _check_mixture(base, bank, events, prompt, negative, -strength, None)


def _check_mixture(
    base: Base,
    bank: Bank,
    events: list[Event],
    prompt: tuple[int, ...],
    companion: tuple[int, ...],
    share: float,
    lora: str | None,
) -> None:
    """Every step against z' = (1 - share) z + share z_companion, from two forwards of whole sequences."""
    said: list[int] = []
    for event, receipt in zip(events, receipts(events), strict=True):
        z = logits_of(base, bank, [*prompt, *said])
        mixed = (1 - share) * z + share * logits_of(base, bank, [*companion, *said], lora)
        p, q = z.log_softmax(0), mixed.log_softmax(0)
        assert receipt.entropy == pytest.approx(float(-(p.exp() * p).sum()), abs=1e-3)
        assert receipt.open == receipt.fired == (receipt.entropy > TAU)
        assert event.token == int((mixed if receipt.fired else z).argmax())
        assert (receipt.base_token, receipt.steered_token) == (int(p.argmax()), event.token)
        assert receipt.base_logprob == pytest.approx(float(p[event.token]), abs=1e-3)
        assert receipt.steered_logprob == pytest.approx(float((q if receipt.fired else p)[event.token]), abs=1e-3)
        assert receipt.kl == pytest.approx(float((p.exp() * (p - q)).sum()) if receipt.fired else 0.0, abs=1e-3)
        said.append(event.token)
    assert {r.fired for r in receipts(events)} == {True, False}, "the test wants both kinds of step"


@pytest.mark.parametrize(
    "steering",
    [
        Steering("gated", tau=math.inf),
        Steering("gated", 0.0, tau=0.0),
        Steering("gated", tau=0.0, mode="shadow"),
        Steering("gated", mode="off"),
        Steering("gated", tau=0.0, budget=Budget(max_steps=0)),
        Steering("contrast", 3.0, 0.0, mode="shadow", companion_prompt=NEGATIVE),
        Steering("contrast", 3.0, math.inf, companion_prompt=NEGATIVE),
        Steering("contrast", 0.0, 0.0),
        Steering("contrast", mode="off"),
        Steering("always", 0.0),
        Steering("always", mode="shadow"),
        Steering("always", mode="off"),
        Steering("head0", 5.0, 0.0, budget=Budget(max_share=0.0)),
    ],
)
def test_what_does_not_act_is_the_base(base: Base, bank: Bank, steering: Steering) -> None:
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=15, ignore_eos=True, alternatives=5)
    request = Request("r", prompt_of(20), sampling)
    plain, got = (answer(base, bank, dataclasses.replace(request, steering=s)) for s in (Steering(), steering))
    assert tokens(got) == tokens(plain)
    for one, other in zip(got, plain, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_a_composition_of_heads_acts_as_their_sum(base: Base, bank: Bank) -> None:
    request = Request("r", prompt_of(20), GREEDY)

    def first(steering: Steering) -> Receipt:
        return receipts(answer(base, bank, dataclasses.replace(request, steering=steering)))[0]

    alone = first(Steering("head0", 2.0, 0.0))
    assert first(Steering("head1", 2.0, 0.0, weight=0.0, also={"head0": 1.0})) == alone
    assert first(Steering("head0", 1.0, 0.0, weight=0.5, also={"head1": 1.0})) != alone


# gates, budgets and phases


@pytest.mark.parametrize("name", ["head", "gated", "contrast"])
def test_budgets_bound_what_fires_in_every_tier(base: Base, bank: Bank, name: str) -> None:
    def fired(budget: Budget, **gate: object) -> list[bool]:
        steering = dataclasses.replace(STEERINGS[name], gate="always", tau=None, budget=budget)
        sampling = dataclasses.replace(GREEDY, max_tokens=20)
        events = answer(base, bank, Request("r", prompt_of(20), sampling, steering))
        assert all(r.open == r.fired and (r.fired or r.base_logprob == r.steered_logprob) for r in receipts(events))
        return [r.fired for r in receipts(events)]

    assert fired(Budget()) == [True] * 20
    assert fired(Budget(max_steps=3)) == [True] * 3 + [False] * 17
    assert fired(Budget(max_share=0.25)) == ([False] * 3 + [True]) * 5
    assert fired(Budget(cooldown=3)) == ([True] + [False] * 3) * 5


@pytest.mark.parametrize("name", ["head", "heads", "gated", "half", "contrast"])
def test_a_steps_divergence_is_capped_by_less_strength(base: Base, bank: Bank, name: str) -> None:
    request = Request("r", prompt_of(20), GREEDY, dataclasses.replace(STEERINGS[name], tau=0.0))
    free = receipts(answer(base, bank, request))
    steering = dataclasses.replace(request.steering, budget=Budget(kl=0.2))
    capped = receipts(answer(base, bank, dataclasses.replace(request, steering=steering)))
    assert max(r.kl for r in free) > 0.2, "the test wants a correction that is capped"
    assert max(r.kl for r in capped) <= 0.2 + 1e-5
    strength = free[0].strength
    assert all(r.strength == strength for r in free)
    assert all(0 < r.strength <= strength for r in capped)
    assert any(r.kl > 0.19 for r in capped)
    assert (capped[0].kl < free[0].kl) == (capped[0].strength < strength)


def test_steering_ends_at_a_marker_in_the_text(base: Base, bank: Bank) -> None:
    letters = dataclasses.replace(GREEDY, logit_bias=dict.fromkeys(range(65, 91), 60.0))
    request = Request("r", prompt_of(20), letters, Steering("head0", 3.0, gate="always"))
    free = answer(base, bank, request)
    text = base.tokenizer.decode(tokens(free))
    at = next(i for i in range(len(text) - 4, 0, -1) if text.find(text[i : i + 2]) == i)
    steering = dataclasses.replace(request.steering, budget=Budget(until=text[at : at + 2]))
    events = answer(base, bank, dataclasses.replace(request, steering=steering))
    assert tokens(events)[: at + 2] == tokens(free)[: at + 2]
    assert [r.fired for r in receipts(events)] == [True] * (at + 2) + [False] * (10 - at)


def test_a_random_gate_opens_at_its_rate_and_draws_its_own_numbers(base: Base, bank: Bank) -> None:
    sampling = SamplingParams(seed=1, max_tokens=50, ignore_eos=True)
    request = Request("r", prompt_of(5), sampling, Steering("head0", 0.0, gate="random", rate=0.3), n=8)
    out = run(base, bank, [request], slots=8)
    opened = [r.open for events in out.values() for r in receipts(events)]
    assert 0.2 < sum(opened) / len(opened) < 0.4
    plain = run(base, bank, [dataclasses.replace(request, steering=Steering())], slots=8)
    for choice, events in out.items():
        assert tokens(events) == tokens(plain[choice]), "its numbers are not those that tokens are drawn with"


# what is refused, fails or shares


def test_a_pair_that_can_never_run_is_refused(base: Base, bank: Bank) -> None:
    core = Core(base, bank, EngineConfig(slots=1, max_model_len=32))
    for steering in (STEERINGS["gated"], STEERINGS["contrast"]):
        with pytest.raises(InvalidRequest, match="two slots a choice; this server has 1") as caught:
            core.submit(Request("r", (1, 2), steering=steering))
        assert caught.value.field == "steering.correction"
    core.submit(Request("r", (1, 2), GREEDY, STEERINGS["always"]))
    core = Core(base, bank, EngineConfig(slots=2, max_model_len=32))
    with pytest.raises(InvalidRequest, match="needs the tokens that its companion reads"):
        core.submit(Request("r", (1, 2), steering=Steering("contrast")))
    with pytest.raises(InvalidRequest, match="companion_prompt holds a token id outside"):
        core.submit(Request("r", (1, 2), steering=Steering("contrast", companion_prompt=(10**6,))))
    with pytest.raises(ContextOverflow) as overflow:
        core.submit(Request("r", (1, 2), steering=Steering("contrast", companion_prompt=(1,) * 32)))
    assert overflow.value.field == "steering.companion_prompt"
    bank = Bank(base.hidden, "cpu")
    core = Core(base, bank)
    bank.add(tiny_lora(base, "late"))
    with pytest.raises(InvalidRequest, match="late came after the engine was made"):
        core.submit(Request("r", (1, 2), steering=Steering("late")))


def test_a_companions_longer_prompt_bounds_the_answer(base: Base, bank: Bank) -> None:
    core = Core(base, bank, EngineConfig(slots=2, max_model_len=32))
    steering = Steering("contrast", companion_prompt=NEGATIVE * 2)
    events = list(core.run([Request("r", (1, 2), SamplingParams(ignore_eos=True), steering)]))
    assert len(events) == 32 - len(NEGATIVE * 2)
    assert events[-1].finish == "length"


def test_both_rows_reuse_what_their_slots_hold(base: Base, bank: Bank) -> None:
    core = Core(base, bank, EngineConfig(slots=2))
    prompt = prompt_of(40)
    seen = []
    computed: list[int] = []
    forward = core._runner.forward

    def counting(work: list) -> object:
        computed.append(sum(w.end - w.start for w in work))
        return forward(work)

    core._runner.forward = counting  # type: ignore[method-assign, assignment]
    for name in ("gated", "gated", "contrast", "contrast", "gated"):
        computed.clear()
        events = list(core.run([Request("r", prompt, GREEDY, STEERINGS[name])]))
        assert tokens(events) == tokens(answer(base, bank, Request("r", prompt, GREEDY, STEERINGS[name])))
        seen.append((events[0].cached, computed[0] + sum(c for c in computed[1:] if c > 2)))
    assert [cached for cached, _ in seen] == [0, 39, 39, 39, 39]
    assert seen[1][1] == 2, "both rows compute their last token alone"


def test_samples_of_a_pair_share_its_prompts(base: Base, bank: Bank) -> None:
    sampling = SamplingParams(seed=3, max_tokens=8, ignore_eos=True)
    out = run(base, bank, [Request("r", prompt_of(30), sampling, STEERINGS["gated"], n=3)], slots=6, step_tokens=64)
    assert [out["r", i][0].cached for i in range(3)] == [0, 29, 29]
    assert len({tuple(tokens(out["r", i])) for i in range(3)}) == 3


@pytest.mark.parametrize("tau", [0.0, math.inf])
def test_a_sick_companion_fails_its_pair_and_leaves_nothing_behind(base: Base, bank: Bank, tau: float) -> None:
    """NaN in the adapted row alone: the pair ends, both slots are wiped, and neighbours do not notice."""
    sick = Request("sick", prompt_of(12), GREEDY, Steering("gated", tau=tau))
    core = Core(base, bank, EngineConfig(slots=4))
    good = Request("good", prompt_of(10), GREEDY, STEERINGS["head"])
    expected = tokens(answer(base, bank, good))
    placed = core._runner._shelf.placed[0]
    path = next(iter(placed))
    sound = placed[path][1].clone()
    core.submit(sick)
    core.submit(good)
    placed[path][1].fill_(math.nan)
    events = list(core.step())
    placed[path][1].copy_(sound)
    assert [(e.request_id, e.finish) for e in events] == [("sick", "error"), ("good", None)]
    assert bool(torch.isfinite(core._runner.cache.keys).all() and torch.isfinite(core._runner.cache.values).all())
    events += list(core.run([dataclasses.replace(sick, id="again")]))
    assert tokens([e for e in events if e.request_id == "good"]) == expected
    again = [e for e in events if e.request_id == "again"]
    assert tokens(again) == tokens(answer(base, bank, sick))
    assert core.free_slots == 4


def test_aborts_free_both_slots_wherever_the_pair_is(base: Base, bank: Bank) -> None:
    core = Core(base, bank, EngineConfig(slots=4, step_tokens=8))
    requests = [Request(str(i), prompt_of(20, seed=i), GREEDY, STEERINGS["gated"]) for i in range(3)]
    for request in requests:
        core.submit(request)
    core.step()  # in the middle of their prompts; the third waits
    for request in requests:
        core.abort(request.id, 0)
    assert not core.busy
    assert core.free_slots == 4
    assert tokens(list(core.run([requests[0]]))) == tokens(answer(base, bank, requests[0]))


def test_a_crowd_that_leaves_at_random_moments_leaves_nothing(base: Base, bank: Bank) -> None:
    """All tiers, half of them aborted at some step: the rest answer as alone, and slots and tables are as before."""
    generator = torch.Generator().manual_seed(0)
    core = Core(base, bank, EngineConfig(slots=6, step_tokens=24))
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    steerings = itertools.cycle(STEERINGS.items())
    requests = [
        Request(f"{i}-{name}", prompt_of(4 + i % 30, seed=i % 5), sampling, steering, n=1 + (i % 3 == 0))
        for i, (name, steering) in enumerate(itertools.islice(steerings, 35))
    ]
    leaving = {request.id for i, request in enumerate(requests) if i % 2}
    said = defaultdict(list)
    pending = iter(requests)
    while core.busy or (request := next(pending, None)) is not None:
        if not core.busy:
            core.submit(request)
        for late in itertools.islice(pending, int(torch.randint(0, 3, (1,), generator=generator))):
            core.submit(late)
        for event in core.step():
            said[event.request_id, event.index].append(event.token)
        sequences = [*core._scheduler.running.values(), *core._scheduler.waiting.values()]
        for sequence in sequences:
            if sequence.request.id in leaving and torch.rand((), generator=generator) < 0.3:
                core.abort(sequence.request.id, sequence.index)
    assert core.free_slots == 6
    assert not core.busy
    for request in requests:
        if request.id not in leaving:
            for choice, events in run(base, bank, [request], slots=4).items():
                assert said[choice] == tokens(events), choice
    assert min(len(answered) for answered in said.values()) < 8, "the test wants some who left in the middle"
