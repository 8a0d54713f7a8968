"""The engine on tiny random models, against transformers' generate and against itself alone."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from tiny import FAMILIES, VOCAB, tiny_base, tiny_correction, tiny_lora
from trimtab.errors import ContextOverflow, InvalidRequest, NotFound
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request, SamplingParams, Steering
from trimtab.server.model.attention import IMPLEMENTATION
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank
from trimtab.steering.gate import Gate

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def prompts(lengths: Iterable[int], seed: int = 1) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in lengths]


def bank_for(base: Base, count: int = 2) -> Bank:
    bank = Bank(base.hidden, "cpu")
    for i in range(count):
        bank.add(tiny_correction(base, f"c{i}", seed=i))
    return bank


def run(
    base: Base, requests: Sequence[Request], slots: int = 4, step_tokens: int = 16
) -> dict[tuple[str, int], list[Event]]:
    core = Core(base, bank_for(base), EngineConfig(slots=slots, step_tokens=step_tokens))
    out = defaultdict(list)
    for event in core.run(requests):
        assert event.error is None
        out[event.request_id, event.index].append(event)
    assert core.free_slots == slots
    assert not core.busy
    return out


def tokens(events: list[Event]) -> list[int | None]:
    return [event.token for event in events]


def generate(base: Base, prompt: tuple[int, ...], new: int) -> list[int]:
    """transformers' own greedy answer."""
    own = base.model.generation_config
    base.model.generation_config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    base.model.set_attn_implementation("sdpa")
    try:
        out = base.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)))
    finally:
        base.model.set_attn_implementation(IMPLEMENTATION)
        base.model.generation_config = own
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_alone_and_in_a_mixed_batch_with_chunked_prefill(family: str) -> None:
    base = tiny_base(family)
    asked = prompts((5, 37, 61, 12, 20))
    expected = [generate(base, prompt, 12) for prompt in asked]
    requests = [Request(str(i), prompt, GREEDY) for i, prompt in enumerate(asked)]
    mixed = run(base, requests, slots=3, step_tokens=16)
    assert [tokens(mixed[str(i), 0]) for i in range(len(asked))] == expected
    alone = [run(base, [request])[request.id, 0] for request in requests]
    assert [tokens(events) for events in alone] == expected


request_shapes = st.builds(
    lambda length, temperature, top_p, top_k, seed, repetition, presence, correction, strength, mode, n: (
        length,
        SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            repetition_penalty=repetition,
            presence_penalty=presence,
            max_tokens=6,
        ),
        Steering(correction, strength, tau=1.0, mode=mode),
        n,
    ),
    length=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_p=st.sampled_from([0.8, 1.0]),
    top_k=st.sampled_from([0, 5, 100]),
    seed=st.integers(0, 2**63 - 1),
    repetition=st.sampled_from([1.0, 1.3]),
    presence=st.sampled_from([0.0, 0.5]),
    correction=st.sampled_from([None, "c0", "c1"]),
    strength=st.sampled_from([0.0, 1.0, 3.0]),
    mode=st.sampled_from(["apply", "shadow", "off"]),
    n=st.integers(1, 3),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(request_shapes, min_size=2, max_size=6))
def test_a_request_in_a_mixed_batch_gets_what_it_gets_alone(base: Base, shapes: list) -> None:
    requests = [
        Request(str(i), prompts([length], seed=i)[0], sampling, steering, n)
        for i, (length, sampling, steering, n) in enumerate(shapes)
    ]
    together = run(base, requests)
    for request in requests:
        alone = run(base, [request])
        for index in range(request.n):
            assert tokens(together[request.id, index]) == tokens(alone[request.id, index])


def test_a_closed_gate_strength_zero_and_shadow_are_the_base_bit_for_bit(base: Base) -> None:
    prompt = prompts([20])[0]
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=20, ignore_eos=True, alternatives=5)
    plain = run(base, [Request("r", prompt, sampling)])["r", 0]
    for steering in (
        Steering("c0", tau=float("inf")),
        Steering("c0", strength=0.0, tau=0.0),
        Steering("c0", strength=5.0, tau=0.0, mode="shadow"),
        Steering("c0", strength=5.0, tau=0.0, mode="off"),
    ):
        steered = run(base, [Request("r", prompt, sampling, steering)])["r", 0]
        assert [(e.token, e.logprob, e.top) for e in steered] == [(e.token, e.logprob, e.top) for e in plain]
    shadow = run(base, [Request("r", prompt, sampling, Steering("c0", 5.0, 0.0, "shadow"))])["r", 0]
    assert any(e.receipt is not None and e.receipt.flip for e in shadow)


def test_an_open_gate_fires_and_the_receipt_tells_what_changed(base: Base) -> None:
    prompt = prompts([20])[0]
    plain = run(base, [Request("r", prompt, GREEDY)])["r", 0]
    tau = statistics.median(e.receipt.entropy for e in plain if e.receipt is not None)
    events = run(base, [Request("r", prompt, GREEDY, Steering("c0", strength=5.0, tau=tau))])["r", 0]
    receipts = [e.receipt for e in events if e.receipt is not None]
    assert len(receipts) == 12
    assert {r.fired for r in receipts} == {True, False}, "the test wants both kinds of step"
    for event, receipt in zip(events, receipts, strict=True):
        assert receipt.open == receipt.fired == (receipt.entropy > tau)
        assert event.token == receipt.steered_token
        assert event.logprob == receipt.steered_logprob
        if not receipt.fired:
            assert receipt.base_logprob == receipt.steered_logprob
            assert receipt.base_token == receipt.steered_token


def test_a_prefix_is_reused_across_corrections_and_changes_nothing(base: Base) -> None:
    prompt = prompts([40])[0]
    first = Request("first", prompt, GREEDY)
    second = Request("second", prompt, GREEDY, Steering("c1", strength=2.0, tau=0.5))
    core = Core(base, bank_for(base), EngineConfig(slots=2))
    seen = defaultdict(list)
    for request in (first, second):
        for event in core.run([request]):
            seen[event.request_id].append(event)
    assert seen["first"][0].cached == 0
    assert seen["second"][0].cached == len(prompt) - 1
    assert tokens(seen["second"]) == tokens(run(base, [second])["second", 0])


def test_samples_share_one_prefill_and_differ(base: Base) -> None:
    prompt = prompts([30])[0]
    sampling = SamplingParams(seed=3, max_tokens=8, ignore_eos=True)
    out = run(base, [Request("r", prompt, sampling, n=4)])
    assert [out["r", i][0].cached for i in range(4)] == [0, 29, 29, 29]
    assert len({tuple(tokens(out["r", i])) for i in range(4)}) == 4


def test_a_rush_after_one_beginning_reads_it_once_and_changes_nothing(base: Base) -> None:
    shared, ends = prompts([96])[0], prompts([3, 4, 5, 6])
    corrections = [Steering(), Steering("c1", strength=2.0, tau=0.5), Steering("c0"), Steering()]
    requests = [
        Request(f"r{i}", (*shared, *end), GREEDY, steering)
        for i, (end, steering) in enumerate(zip(ends, corrections, strict=True))
    ]
    rush = run(base, requests)
    assert [rush[f"r{i}", 0][0].cached for i in range(4)] == [0, 96, 96, 96]
    for request in requests:
        assert tokens(rush[request.id, 0]) == tokens(run(base, [request])[request.id, 0])


def test_stops_lengths_and_minimum_lengths(base: Base) -> None:
    prompt = prompts([10])[0]
    free = tokens(run(base, [Request("r", prompt, GREEDY)])["r", 0])
    stop = free[4]
    assert stop is not None
    cut = free.index(stop)
    stopped = run(
        base, [Request("r", prompt, SamplingParams(temperature=0, max_tokens=12, stop_token_ids=frozenset({stop})))]
    )
    assert tokens(stopped["r", 0]) == free[: cut + 1]
    assert stopped["r", 0][-1].finish == "stop"
    sampling = SamplingParams(temperature=0, max_tokens=12, min_tokens=9, stop_token_ids=frozenset(range(200)))
    late = run(base, [Request("r", prompt, sampling)])["r", 0]
    assert all(t is not None and t >= 200 for t in tokens(late)[:9])
    full = run(base, [Request("r", prompt, SamplingParams(temperature=0, ignore_eos=True))])["r", 0]
    assert len(full) == base.max_len - len(prompt)
    assert full[-1].finish == "length"


def test_bias_and_penalties_reach_the_draw(base: Base) -> None:
    prompt = prompts([10])[0]
    biased = SamplingParams(temperature=0, max_tokens=3, logit_bias={65: 100.0}, ignore_eos=True)
    assert tokens(run(base, [Request("r", prompt, biased)])["r", 0]) == [65, 65, 65]
    penalised = SamplingParams(
        temperature=0, max_tokens=40, repetition_penalty=100.0, presence_penalty=2, ignore_eos=True
    )
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    distinct = [len(set(tokens(run(base, [Request("r", prompt, s)])["r", 0]))) for s in (plain, penalised)]
    assert distinct[0] < distinct[1]


def test_more_tokens_than_the_model_takes_are_refused(base: Base) -> None:
    assert Core(base, bank_for(base), EngineConfig(max_model_len=base.max_len)).max_len == base.max_len
    with pytest.raises(
        InvalidRequest, match=rf"max_model_len must be at most the model's {base.max_len}, not {base.max_len + 1}"
    ):
        Core(base, bank_for(base), EngineConfig(max_model_len=base.max_len + 1))


def test_what_is_wrong_with_a_request_is_said_before_it_is_queued(base: Base) -> None:
    core = Core(base, bank_for(base), EngineConfig(slots=1, max_model_len=16, max_queue=2))
    with pytest.raises(
        ContextOverflow, match=r"maximum context length is 16 tokens.*18 tokens \(17 in the messages, 1 in"
    ):
        core.submit(Request("r", (1,) * 17))
    with pytest.raises(InvalidRequest, match="token id outside"):
        core.submit(Request("r", (VOCAB,)))
    with pytest.raises(InvalidRequest, match="logit_bias names token 999"):
        core.submit(Request("r", (1,), SamplingParams(logit_bias={999: 1.0})))
    with pytest.raises(NotFound, match="no correction is called 'nope'; loaded: c0, c1, contrast"):
        core.submit(Request("r", (1,), steering=Steering("nope")))
    with pytest.raises(InvalidRequest, match="stop_token_ids names token -1"):
        core.submit(Request("r", (1,), SamplingParams(stop_token_ids=frozenset({-1}))))


def test_a_dead_row_fails_its_own_request_only(base: Base) -> None:
    prompt = prompts([10])[0]
    everything = dict.fromkeys(range(VOCAB), -100.0)
    core = Core(base, bank_for(base), EngineConfig(slots=2))
    forward = base.logits

    def poisoned(states: torch.Tensor) -> torch.Tensor:
        logits = forward(states).clone()
        logits[0] = float("nan")
        return logits

    good = Request("good", prompt, GREEDY)
    bad = Request("bad", prompt[:5], SamplingParams(temperature=0, logit_bias=everything, max_tokens=12))
    expected = tokens(run(base, [good])["good", 0])
    core.submit(bad)
    core.submit(good)
    base.logits = poisoned  # type: ignore[method-assign]
    try:
        first = core.step()
    finally:
        del base.logits
    assert [(e.request_id, e.finish) for e in first] == [("bad", "error"), ("good", None)]
    assert "NaN" in str(first[0].error)
    assert not first[0].refused
    rest = [event for event in core.run([]) if event.request_id == "good"]
    assert tokens([e for e in first if e.request_id == "good"] + rest) == expected
    assert core.free_slots == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_that_makes_logits_infinite_ends_its_own_request_only(base: Base, temperature: float) -> None:
    draws = SamplingParams(temperature, seed=3, max_tokens=12, ignore_eos=True)
    good = Request("good", prompts([10])[0], draws)
    expected = tokens(run(base, [good])["good", 0])
    core = Core(base, bank_for(base), EngineConfig(slots=2))
    forward = base.logits

    def huge(states: torch.Tensor) -> torch.Tensor:
        logits = forward(states).clone()
        logits[0] = 1e38
        return logits

    core.submit(Request("bad", (1, 2, 3), dataclasses.replace(draws, repetition_penalty=0.01)))
    core.submit(good)
    base.logits = huge  # type: ignore[method-assign]
    try:
        first = core.step()
    finally:
        del base.logits
    assert [(e.request_id, e.finish) for e in first] == [("bad", "error"), ("good", None)]
    assert "infinite" in str(first[0].error)
    rest = [event for event in core.run([]) if event.request_id == "good"]
    assert tokens([e for e in first if e.request_id == "good"] + rest) == expected


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    core = Core(base, bank_for(base), EngineConfig(slots=2))
    core.submit(Request("doomed", (1, 2, 3)))
    core._runner._step = lambda inputs: (_ for _ in ()).throw(RuntimeError("boom"))
    (event,) = core.step()
    assert (event.finish, event.error) == ("error", "the engine failed: its log says why")
    assert "a step failed; its sequences end: doomed" in caplog.text
    assert "RuntimeError: boom" in caplog.text
    assert not core.busy
    assert core.free_slots == 2


def test_what_a_sick_request_wrote_reaches_nobody(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN states, as from an fp16 overflow, leave NaN in the slot: a later user's mask would multiply them by 0."""
    sick = Request("sick", (5,) * 20 + (200,) + (6,) * 20, GREEDY)
    long, short = Request("long", tuple(range(60, 120)), GREEDY), Request("short", (1, 2, 3), GREEDY)
    expected = {r.id: tokens(run(base, [r])[r.id, 0]) for r in (sick, long, short)}
    embed = base.model.get_decoder().embed_tokens
    plain = embed.forward

    def poison(ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = plain(ids).clone()
        states[ids == 200] = float("nan")
        return states

    core = Core(base, bank_for(base), EngineConfig(slots=2))
    monkeypatch.setattr(embed, "forward", poison)
    assert [e.finish for e in core.run([sick])] == ["error"]
    monkeypatch.setattr(embed, "forward", plain)
    got = defaultdict(list)
    for event in core.run([long, short, dataclasses.replace(sick, id="again")]):
        got[event.request_id].append(event.token)
    assert got == {"long": expected["long"], "short": expected["short"], "again": expected["sick"]}


@pytest.fixture
def poisoned(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 200 brings NaN with it."""
    embed = base.model.get_decoder().embed_tokens
    plain = embed.forward

    def poison(ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = plain(ids)
        return torch.where((ids == 200)[..., None], float("nan"), states)

    monkeypatch.setattr(embed, "forward", poison)


@pytest.mark.usefixtures("poisoned")
def test_a_prompt_that_may_be_sick_lends_nobody_its_beginning(base: Base) -> None:
    """In its chunk NaN reaches back, to tokens before the one that brought it: by 0 times NaN, under the mask."""
    core = Core(base, bank_for(base), EngineConfig(slots=8, step_tokens=16))
    healthy = [Request(f"{i}", (1, 60 + i, 5), GREEDY) for i in range(3)]
    expected = {r.id: tokens(run(base, [r])[r.id, 0]) for r in healthy}
    core.submit(Request("sick", (1, 7, 200, *range(40)), GREEDY))
    assert core.step() == []
    got = defaultdict(list)
    for event in core.run(healthy):
        got[event.request_id].append(event.token)
    assert got == {"sick": [None], **expected}


@pytest.mark.usefixtures("poisoned")
def test_a_scored_prompts_last_token_of_which_nothing_is_read_reaches_nobody(base: Base) -> None:
    long, short = Request("long", tuple(range(60, 120)), GREEDY), Request("short", (1, 2, 3), GREEDY)
    expected = {r.id: tokens(run(base, [r])[r.id, 0]) for r in (long, short)}
    core = Core(base, bank_for(base), EngineConfig(slots=2, step_tokens=16))
    scored = Request("scored", (*range(16), 200), SamplingParams(max_tokens=0), score_from=1)
    assert [event.finish for event in core.run([scored])][-1] == "length"
    got = defaultdict(list)
    for event in core.run([long, short]):
        got[event.request_id].append(event.token)
    assert got == expected
    core = Core(base, bank_for(base), EngineConfig(slots=2, step_tokens=16))
    list(core.run([scored]))
    first = next(core.run([Request("next", (*range(16), 7), GREEDY)]))
    assert first.cached == 16, "the rest of it is numbers, and is read once"


@pytest.mark.parametrize("ending", ["abort", "score"])
def test_what_nobody_was_told_of_reaches_nobody(base: Base, ending: str) -> None:
    """A LoRA that overflows leaves NaN in a slot. Aborted before its first token, or as the second of two choices of
    which the first is scored, nothing has found that out."""
    bank = Bank(base.hidden, "cpu")
    bank.add(tiny_lora(base, "bad", gate=Gate("always"), size=1e15))
    core = Core(base, bank, EngineConfig(slots=2, step_tokens=32, max_model_len=200))
    sick, long, short = prompts([150, 140, 3])
    if ending == "abort":
        core.submit(Request("sick", sick, steering=Steering("bad")))
        for _ in range(3):
            core.step()
        assert core._runner.cache.keys.isnan().any()
        core.abort("sick", 0)
    else:
        scored = SamplingParams(max_tokens=0)
        told = list(core.run([Request("sick", sick, scored, Steering("bad"), n=2, score_from=100)]))
        assert any(event.error for event in told)
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    events = list(core.run([Request("long", long, greedy), Request("short", short, greedy)]))
    assert [event.error for event in events if event.error] == []


def test_a_slot_is_wiped_as_far_as_it_was_written(base: Base) -> None:
    """On a CPU, what nobody wrote takes no memory: writing zeros there would, and hold up every choice meanwhile."""
    core = Core(base, Bank(base.hidden, "cpu"), EngineConfig(slots=1, step_tokens=32, max_model_len=200))
    cache = core._runner.cache
    cache.keys[:, 0, 151:] = 7
    (prompt,) = prompts([150])
    core.submit(Request("a", prompt))
    core.step()
    assert cache.keys[:, 0, :32].any()
    core.abort("a", 0)
    assert not cache.keys[:, 0, :151].any()
    assert (cache.keys[:, 0, 151:] == 7).all()


def test_who_leaves_after_a_token_leaves_its_prefix(base: Base) -> None:
    core = Core(base, Bank(base.hidden, "cpu"), EngineConfig(slots=2, max_model_len=100))
    (prompt,) = prompts([50])
    core.submit(Request("a", prompt))
    while not core.step():
        pass
    core.abort("a", 0)
    (first, *_) = core.run([Request("b", prompt, SamplingParams(max_tokens=2))])
    assert first.cached == 49


def test_bfloat16_computes_what_float32_does_up_to_rounding(base: Base) -> None:
    half = tiny_base(dtype=torch.bfloat16)
    sampling = SamplingParams(temperature=0, max_tokens=1, alternatives=20, ignore_eos=True)
    for prompt in prompts((5, 30, 61)):
        (full,), (rounded,) = (run(b, [Request("r", prompt, sampling)])["r", 0] for b in (base, half))
        nearby = dict(rounded.top)
        shared = [(logprob, nearby[token]) for token, logprob in full.top[:3] if token in nearby]
        assert len(shared) == 3
        assert all(abs(a - b) < 0.5 for a, b in shared)
