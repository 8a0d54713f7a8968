"""Teacher-forced scoring: what is told is what decoding would have told, under every tier; the base's own numbers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from scripted import loopback
from tiny import tiny_base, tiny_correction, tiny_lora, tiny_model
from trimtab.errors import ContextOverflow, InvalidRequest
from trimtab.server.app import create_app
from trimtab.server.engine import scoring
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.engine import Engine
from trimtab.server.engine.event import Event, Receipt
from trimtab.server.engine.request import Budget, Request, SamplingParams, Steering
from trimtab.server.model.base import Base, load_base
from trimtab.server.model.weights import locate
from trimtab.steering.bank import Bank
from trimtab.steering.gate import Gate

TAU = 2.2  # opens at some steps of the tiny model and not at others
NEGATIVE = tuple(range(70, 82))
ONLY_SCORE = SamplingParams(max_tokens=0, seed=5)


@pytest.fixture(scope="module")
def bank(base: Base) -> Bank:
    bank = Bank(base.hidden, "cpu")
    for i in range(2):
        bank.add(tiny_correction(base, f"head{i}", seed=i))
    bank.add(tiny_lora(base, "gated", seed=0, gate=Gate(tau=TAU)))
    bank.add(tiny_lora(base, "always", seed=2, gate=Gate("always", tau=0.0)))
    return bank


def prompt_of(length: int, seed: int = 1) -> tuple[int, ...]:
    return tuple(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def run(base: Base, bank: Bank, requests: Sequence[Request], slots: int = 4, step_tokens: int = 16) -> list[Event]:
    core = Core(base, bank, EngineConfig(slots=slots, step_tokens=step_tokens))
    events = list(core.run(requests))
    assert all(event.error is None for event in events)
    assert core.free_slots == slots
    assert not core.busy
    return events


def of(events: Sequence[Event], request: str, index: int = 0) -> list[Event]:
    return [event for event in events if (event.request_id, event.index) == (request, index)]


def scored(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.scored]


def receipts(events: Sequence[Event]) -> list[Receipt]:
    return [event.receipt for event in events if event.receipt is not None]


def assert_alike(a: Sequence[Event], b: Sequence[Event]) -> None:
    """The same tokens and receipts, to the rounding of float32 in the numbers."""
    assert [event.token for event in a] == [event.token for event in b]
    for x, y in zip(a, b, strict=True):
        assert x.receipt is not None
        assert y.receipt is not None
        for name, one, other in zip(Receipt._fields, x.receipt, y.receipt, strict=True):
            if isinstance(one, float):
                assert one == pytest.approx(other, abs=1e-4), name
            else:
                assert one == other, name
        assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
        assert [token for token, _ in x.top] == [token for token, _ in y.top]


STEERINGS = {
    "plain": Steering(),
    "head": Steering("head0", 3.0, TAU),
    "heads": Steering("head0", 2.0, TAU, weight=0.5, also={"head1": 2.0}),
    "shadow": Steering("head0", 3.0, TAU, mode="shadow"),
    "random": Steering("head0", 3.0, 0.5, gate="random"),
    "capped": Steering("head0", 3.0, TAU, budget=Budget(kl=0.3)),
    "cooled": Steering("head0", 3.0, -1.0, budget=Budget(cooldown=2)),
    "twice": Steering("head0", 3.0, -1.0, budget=Budget(max_steps=2)),
    "share": Steering("head0", 3.0, TAU, budget=Budget(max_share=0.3)),
    "gated": Steering("gated"),
    "cooled lora": Steering("gated", budget=Budget(cooldown=1)),
    "always": Steering("always"),
    "contrast": Steering("contrast", 1.5, TAU, companion_prompt=NEGATIVE),
}


@pytest.mark.parametrize("temperature", [0.0, 1.1])
def test_a_scored_receipt_is_the_one_that_decoding_made(base: Base, bank: Bank, temperature: float) -> None:
    """All tiers together, prompts in chunks that companions do not share, pieces of a few positions."""
    draws = SamplingParams(temperature, seed=5, max_tokens=20, ignore_eos=True, alternatives=3, repetition_penalty=1.2)
    prompts = {name: prompt_of(9 + 5 * i, seed=i) for i, name in enumerate(STEERINGS)}
    decoded = run(base, bank, [Request(name, prompts[name], draws, s) for name, s in STEERINGS.items()], slots=26)
    requests = []
    for name, steering in STEERINGS.items():
        whole = prompts[name] + tuple(event.token or 0 for event in of(decoded, name))
        requests.append(Request(name, whole, ONLY_SCORE, steering, score_from=len(prompts[name]), score_alternatives=3))
    told = run(base, bank, requests, slots=7, step_tokens=13)
    fired: dict[str, list[bool]] = {}
    for name in STEERINGS:
        *tokens, end = of(told, name)
        assert (end.token, end.finish, end.scored) == (None, "length", False)
        assert tokens == scored(tokens)
        assert_alike(tokens, of(decoded, name))
        fired[name] = [receipt.fired for receipt in receipts(tokens)]
    assert fired.pop("plain") == [False] * 20
    assert fired.pop("always") == [True] * 20
    assert fired["twice"] == [True, True] + [False] * 18
    assert fired["cooled"] == [True, False, False] * 6 + [True, False]
    assert all(set(steps) == {True, False} for steps in fired.values()), "the test wants both kinds of steps"


def test_pieces_and_chunks_change_nothing(base: Base, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logits = base.logits
    monkeypatch.setattr(base, "logits", lambda states: (seen.append(len(states)), logits(states))[1])
    monkeypatch.setattr(scoring, "PIECE", 5)
    request = Request("a", prompt_of(60), ONLY_SCORE, STEERINGS["cooled"], score_from=1, score_alternatives=2)
    small = scored(run(base, bank, [request], step_tokens=7))
    assert max(seen) <= 5, "logits exist for a piece at a time"
    monkeypatch.setattr(scoring, "PIECE", 64)
    large = scored(run(base, bank, [request], step_tokens=512))
    assert [event.token for event in large] == list(request.prompt[1:])
    assert_alike(small, large)


def test_the_base_is_scored_as_transformers_has_it(base: Base, bank: Bank) -> None:
    prompt = prompt_of(50)
    events = scored(run(base, bank, [Request("a", prompt, ONLY_SCORE, score_from=1)]))
    expected = likelihoods(base, prompt)
    assert [event.logprob for event in events] == pytest.approx(expected, abs=1e-4)


def likelihoods(base: Base, ids: Sequence[int]) -> list[float]:
    """Of each token but the first, by transformers' own forward in float32."""
    base.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            logits = base.model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    finally:
        base.model.set_attn_implementation("trimtab")
    found: list[float] = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return found


@pytest.mark.parametrize("name", ["plain", "head", "cooled", "gated", "always"])
def test_what_is_sampled_after_a_scored_prompt_is_what_it_would_have_been(base: Base, bank: Bank, name: str) -> None:
    draws = SamplingParams(0.8, seed=3, max_tokens=6, ignore_eos=True)
    plain = Request("a", prompt_of(30), draws, STEERINGS[name], n=2)
    scoring_too = Request("a", prompt_of(30), draws, STEERINGS[name], n=2, score_from=4)
    alone, both = run(base, bank, [plain]), run(base, bank, [scoring_too])
    for index in range(2):
        told = of(both, "a", index)
        assert [event.token for event in scored(told)] == (list(plain.prompt[4:]) if index == 0 else [])
        assert told[: len(scored(told))] == scored(told), "the prompt's tokens come first"
        assert_alike(told[len(scored(told)) :], of(alone, "a", index))


def test_a_prefix_is_reused_as_far_as_no_state_is_needed(base: Base, bank: Bank) -> None:
    core = Core(base, bank, EngineConfig(slots=2, step_tokens=64))
    prompt = prompt_of(50)
    list(core.run([Request("first", prompt, SamplingParams(max_tokens=1))]))
    events = list(core.run([Request("again", prompt, ONLY_SCORE, score_from=41)]))
    assert events[-1].cached == 40
    assert [event.token for event in scored(events)] == list(prompt[41:])
    fresh = Core(base, bank, EngineConfig(slots=2, step_tokens=64))
    assert_alike(scored(events), scored(list(fresh.run([Request("again", prompt, ONLY_SCORE, score_from=41)]))))
    whole = list(core.run([Request("whole", prompt, ONLY_SCORE, score_from=1)]))
    assert whole[-1].cached == 0
    assert len(scored(whole)) == 49
    after = list(core.run([Request("after", prompt, SamplingParams(max_tokens=1))]))
    assert after[0].cached == 49, "what was scored is reused by others"


@pytest.mark.parametrize("score_from", [1, 30])
@pytest.mark.parametrize("name", ["plain", "gated", "always", "contrast"])
def test_who_goes_on_where_a_scored_prompt_ended_reads_what_it_says(
    base: Base, bank: Bank, name: str, score_from: int
) -> None:
    """Its last token's keys and values are cleared, as nobody has read what came of them: they are no prefix."""
    prompt, steering = prompt_of(40), STEERINGS[name]
    go_on = Request("on", prompt + prompt_of(9, seed=2), SamplingParams(0.0, max_tokens=5, ignore_eos=True), steering)
    core = Core(base, bank, EngineConfig(slots=4, step_tokens=16))
    list(core.run([Request("scored", prompt, ONLY_SCORE, steering, score_from=score_from)]))
    told = list(core.run([go_on]))
    assert told[0].cached == 39
    assert_alike(told, run(base, bank, [go_on]))


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts(base: Base, bank: Bank, length: int) -> None:
    prompt = prompt_of(length)
    events = run(base, bank, [Request("a", prompt, ONLY_SCORE, score_from=1)])
    assert [event.token for event in events] == [*prompt[1:], None]


def test_a_prompt_that_fills_the_context_can_be_scored_and_not_go_on(base: Base, bank: Bank) -> None:
    core = Core(base, bank, EngineConfig(slots=1, max_model_len=20))
    core.check(Request("a", prompt_of(20), ONLY_SCORE, score_from=1))
    with pytest.raises(ContextOverflow):
        core.check(Request("a", prompt_of(20), SamplingParams(max_tokens=1), score_from=1))
    with pytest.raises(ContextOverflow):
        core.check(Request("a", prompt_of(21), ONLY_SCORE, score_from=1))


def test_a_prompt_whose_logits_are_not_numbers_ends_once_and_the_others_go_on(
    base: Base, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = base.model.get_decoder().embed_tokens
    plain = embed.forward

    def poison(ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = plain(ids).clone()
        states[ids == 200] = math.nan
        return states

    monkeypatch.setattr(embed, "forward", poison)
    core = Core(base, bank, EngineConfig(slots=3, step_tokens=64))
    bad = (1, 2, 200, 3, 4)
    events = list(
        core.run(
            [
                Request("bad", bad, SamplingParams(max_tokens=2, seed=1), score_from=1),
                Request("good", (5, 6, 7), SamplingParams(max_tokens=0), score_from=1),
            ]
        )
    )
    ends = [event for event in of(events, "bad") if event.finish is not None]
    assert [event.finish for event in ends] == ["error"]
    assert scored(of(events, "bad")) == []
    assert [event.token for event in of(events, "good")] == [6, 7, None]
    assert core.free_slots == 3


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sampling": ONLY_SCORE}, "max_tokens"),
        ({"score_from": 0}, "score_from"),
        ({"score_from": 4}, "score_from"),
        ({"score_from": 1, "score_alternatives": 21}, "prompt_logprobs"),
    ],
)
def test_requests_that_make_no_sense_name_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Request("a", (1, 2, 3), **fields)
    assert caught.value.field == field


def test_a_contrast_scores_what_follows_and_samples_nothing(base: Base, bank: Bank) -> None:
    core = Core(base, bank, EngineConfig(slots=2))
    asked = {"prompt": prompt_of(30), "steering": STEERINGS["contrast"], "score_from": 10}
    with pytest.raises(InvalidRequest) as caught:
        core.check(Request("a", sampling=SamplingParams(max_tokens=1), **asked))  # type: ignore[arg-type]
    assert caught.value.field == "max_tokens"
    tight = Core(base, bank, EngineConfig(slots=2, max_model_len=31))
    with pytest.raises(ContextOverflow):  # 12 tokens of its own, then 20
        tight.check(Request("a", sampling=ONLY_SCORE, **asked))  # type: ignore[arg-type]


# as lm-eval asks


@pytest.fixture(scope="module", params=["tiny", pytest.param("demo", marks=pytest.mark.model)])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any, Any]]:
    """-> the URL of a server in float32, transformers' own model with the same weights, and their tokenizer."""
    if request.param == "tiny":
        base, plain = tiny_base(), tiny_model()
    else:
        base = load_base("demo", dtype="float32")
        plain = AutoModelForCausalLM.from_pretrained(locate("demo").path, dtype=torch.float32)
    plain.set_attn_implementation("eager")
    engine = Engine(base, Bank(base.hidden, "cpu"), EngineConfig(slots=4, step_tokens=64, max_model_len=256))
    with loopback(create_app(engine, base, Bank(base.hidden, "cpu")), engine) as url:
        yield url, plain.eval(), base.tokenizer


def test_loglikelihoods_as_lm_eval_reads_them_are_those_of_transformers(served: tuple[str, Any, Any]) -> None:
    """Its request (a batch of ids, echo, one token, one alternative, a seed), and its sums over the answer."""
    url, plain, tokenizer = served
    pairs = [
        ("The capital of France is", " Paris"),
        ("2 + 2 =", " 5 🦊"),
        ("A", "b"),
        ("One, two, three,", " four, five"),
    ]
    split = [(tokenizer.encode(context), tokenizer.encode(continuation)) for context, continuation in pairs]
    greedy = split[0][0]
    best = int(plain(torch.tensor([greedy])).logits[0, -1].argmax())
    split.append((greedy, [best]))
    body = {
        "prompt": [context + continuation for context, continuation in split],
        "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True,
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status().json()
    told = []
    for (context, continuation), choice in zip(split, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        found = logprobs["token_logprobs"][len(context) : -1]
        tops = logprobs["top_logprobs"][len(context) : -1]
        is_greedy = all(value == max(top.values()) for value, top in zip(found, tops, strict=True))
        told.append(is_greedy)
        with torch.no_grad():
            logits = plain(torch.tensor([context + continuation])).logits[0].float()
        predicted = logits[len(context) - 1 : -1].log_softmax(-1)
        expected = predicted.gather(1, torch.tensor(continuation)[:, None]).sum()
        assert sum(found) == pytest.approx(float(expected), abs=1e-3)
        assert is_greedy == (predicted.argmax(-1).tolist() == continuation)
    assert told[-1] is True
    assert False in told
