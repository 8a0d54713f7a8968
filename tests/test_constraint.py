"""Which tokens each choice may draw, through the engine: structures, allowed tokens, bad words, and how they end."""

import re
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import VOCAB, tiny_correction, tiny_tokenizer
from trimtab.errors import InvalidRequest
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Budget, Request, SamplingParams, Steering, Structure
from trimtab.server.model.base import Base
from trimtab.steering.bank import Bank

EOS = 256
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def core(base: Base) -> Core:
    bank = Bank(base.hidden, "cpu")
    bank.add(tiny_correction(base, "c0", tau=-1.0))  # its gate is always open
    return Core(base, bank, EngineConfig(slots=6, max_model_len=128))


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def ask(
    structure: Structure | None = None,
    name: str = "r",
    n: int = 1,
    steering: Steering | None = None,
    prompt: tuple[int, ...] = (7, 8, 9),
    **sampling: Any,
) -> Request:
    params = SamplingParams(**({"seed": 5, "max_tokens": 40} | sampling))
    return Request(name, prompt, params, steering or Steering(), n, structure=structure)


def events(core: Core, *requests: Request) -> dict[tuple[str, int], list[Event]]:
    found = defaultdict(list)
    for event in core.run(requests):
        found[event.request_id, event.index].append(event)
    assert core.free_slots == core.config.slots
    return found


def text_of(told: list[Event]) -> str:
    return TOKENIZER.decode([event.token for event in told if event.token is not None and event.finish != "stop"])


def run(core: Core, *args: Any, **fields: Any) -> list[Event]:
    return events(core, ask(*args, **fields))["r", 0]


LETTERS = Structure("regex", "[a-e]{3}")


def test_a_complete_text_ends_with_end_of_text(core: Core) -> None:
    told = run(core, LETTERS)
    assert len(text_of(told)) == 3
    assert set(text_of(told)) <= set("abcde")
    assert (told[-1].token, told[-1].finish, len(told)) == (EOS, "stop", 4)


def test_a_text_that_is_not_complete_never_ends_but_by_its_length(core: Core) -> None:
    told = run(core, Structure("regex", "[a-e]{30}"), max_tokens=12)
    assert (len(told), told[-1].finish) == (12, "length")
    assert len(text_of(told)) == 12


def test_choices_follow_the_structure_each_for_itself(core: Core) -> None:
    told = events(core, ask(Structure("regex", "[a-z]{8}"), n=9, prompt=tuple(range(30))))
    texts = [text_of(told["r", index]) for index in range(9)]
    assert all(len(text) == 8 for text in texts)
    assert len(set(texts)) > 4
    again = events(core, ask(Structure("regex", "[a-z]{8}"), n=9, prompt=tuple(range(30))))  # from a held prefix
    assert [text_of(again["r", index]) for index in range(9)] == texts
    assert again["r", 0][0].cached > 0


def test_who_has_no_structure_gets_the_same_beside_one_that_has(core: Core) -> None:
    free = [ask(None, f"free {i}", seed=i, steering=Steering("c0"), temperature=0.9, top_p=0.9) for i in range(3)]
    alone = events(core, *free)
    core.forget()
    crowd = [ask(LETTERS, "a"), *free, ask(Structure("json_object", ""), "b", allowed_tokens=frozenset(range(256)))]
    together = events(core, *crowd)
    for request in free:
        assert [e.token for e in together[request.id, 0]] == [e.token for e in alone[request.id, 0]]


def test_a_stop_token_ends_a_text_only_where_it_may(core: Core) -> None:
    stop = ids("z")[0]
    told = run(core, Structure("regex", "[a-e]{4}"), stop_token_ids=frozenset({stop}))
    assert len(text_of(told)) == 4
    assert told[-1].token in (stop, EOS)
    eager: dict[str, Any] = {"stop_token_ids": frozenset({stop}), "logit_bias": {stop: 100.0}}
    assert run(core, Structure("regex", "[a-e]{4}"), **eager)[-1].token == stop
    inside = run(core, Structure("regex", "[a-z]{4}"), **eager)
    assert (inside[0].token, inside[0].finish) == (stop, "stop")  # the structure has it, so it may come, and stops


def test_end_of_text_waits_for_min_tokens_and_is_ignored_while_there_is_another_way(core: Core) -> None:
    eager = {EOS: 100.0}
    some = Structure("regex", "[a-e]+")
    assert len(run(core, some, logit_bias=eager)) == 2
    assert len(run(core, some, logit_bias=eager, min_tokens=9)) == 10
    assert run(core, some, logit_bias=eager, ignore_eos=True, max_tokens=20)[-1].finish == "length"
    for more in ({"min_tokens": 9}, {"ignore_eos": True}):  # there is no other way
        told = run(core, LETTERS, logit_bias=eager, **more)
        assert (len(told), told[-1].finish) == (4, "stop")


@pytest.mark.parametrize("late", [{"min_tokens": 9}, {"ignore_eos": True}])
@pytest.mark.parametrize("limit", [{"allowed_tokens": frozenset(ids("a"))}, {"bad_words": (tuple(ids("b")),)}])
def test_a_way_that_is_barred_is_none(core: Core, late: dict[str, Any], limit: dict[str, Any]) -> None:
    """The grammar alone would go on: the text is complete, and nothing else is left of it."""
    told = run(core, Structure("regex", "ab*"), **late, **limit)
    assert [event.token for event in told] == [*ids("a"), EOS]
    assert told[-1].finish == "stop"


def test_only_allowed_tokens_are_drawn(core: Core) -> None:
    allowed = frozenset(ids("xyz"))
    told = run(core, allowed_tokens=allowed)
    assert {event.token for event in told} == allowed
    assert told[-1].finish == "length"
    assert set(text_of(run(core, Structure("regex", "[a-z]{30}"), allowed_tokens=allowed))) <= set("xyz")
    assert run(core, LETTERS, allowed_tokens=frozenset(ids("abc")))[-1].token == EOS  # a text may end all the same


def test_a_choice_with_nothing_legal_fails_alone_and_is_told_why(core: Core) -> None:
    stuck = ask(LETTERS, "stuck", allowed_tokens=frozenset(ids("xyz")))
    told = events(core, ask(LETTERS, "a"), stuck, ask(None, "b"))
    (error,) = told["stuck", 0]
    assert (error.token, error.finish) == (None, "error")
    assert error.error is not None
    assert "no token is legal here" in error.error
    assert error.refused
    assert told["a", 0][-1].finish == "stop"
    assert len(told["b", 0]) > 1


def test_bad_words_are_not_written(core: Core) -> None:
    plain = text_of(run(core, Structure("regex", "[ab]{40}"), max_tokens=41))
    assert "ab" in plain
    assert "ba" in plain
    words = (tuple(ids("ab")),)
    told = text_of(run(core, Structure("regex", "[ab]{40}"), max_tokens=41, bad_words=words))
    assert "ab" not in told
    assert set(told) == {"a", "b"} or len(set(told)) == 1
    one = text_of(run(core, Structure("regex", "[ab]{40}"), max_tokens=41, bad_words=((ids("a")[0],),)))
    assert one == "b" * 40
    prompt = (*ids("a"),)  # of which a bad word is no part
    assert text_of(run(core, Structure("regex", "[b]{2}"), prompt=prompt, bad_words=words)) == "bb"


@pytest.mark.parametrize(
    ("field", "sampling"), [("allowed_token_ids", {"allowed_tokens": {VOCAB}}), ("bad_words", {"bad_words": ((-1,),)})]
)
def test_unknown_tokens_are_refused(core: Core, field: str, sampling: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        core.check(ask(**sampling))
    assert caught.value.field == field


@pytest.mark.parametrize("sampling", [{"allowed_tokens": frozenset()}, {"bad_words": ((),)}])
def test_empty_lists_are_refused(sampling: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        ask(**sampling)


# Steering


def gates(told: list[Event]) -> list[bool]:
    return [event.receipt.open for event in told if event.receipt is not None]


def test_nothing_is_steered_inside_a_structure_unless_asked_and_a_forced_step_never(core: Core) -> None:
    mixed = Structure("regex", "[a-e]x[a-e]yz")
    assert gates(run(core, mixed, steering=Steering("c0"))) == [False] * 6
    free = [True, False, True, False, False, False]  # the last is end-of-text
    assert gates(run(core, mixed, steering=Steering("c0", budget=Budget(structured=True)))) == free
    once = Steering("c0", budget=Budget(structured=True, max_steps=1))
    assert gates(run(core, mixed, steering=once)) == [True] + [False] * 5
    assert gates(run(core, steering=Steering("c0"), allowed_tokens=frozenset(ids("xy")), max_tokens=3)) == [True] * 3
    assert gates(run(core, steering=Steering("c0"), allowed_tokens=frozenset(ids("x")), max_tokens=3)) == [False] * 3


def test_what_is_not_steered_is_the_bases_answer_bit_for_bit(core: Core) -> None:
    structure = Structure("regex", "[a-z ]{20}")
    plain, steered = run(core, structure), run(core, structure, steering=Steering("c0", strength=4.0))
    assert [e.token for e in plain] == [e.token for e in steered]
    assert [e.logprob for e in plain] == [e.logprob for e in steered]
    asked = run(core, structure, steering=Steering("c0", strength=4.0, budget=Budget(structured=True)))
    assert [e.token for e in plain] != [e.token for e in asked]


def test_a_lazy_structure_is_steered_until_it_begins(core: Core) -> None:
    lazy = Structure("regex", "[a-e]{4}", lazy=("!",))
    trigger = {ids("!")[0]: 8.0}
    told = run(core, lazy, steering=Steering("c0"), logit_bias=trigger, max_tokens=100, ignore_eos=True)
    text = text_of(told)
    before, _, after = text.partition("!")
    assert len(after) == 4
    assert set(after) <= set("abcde")
    assert told[-1].finish == "stop"
    begun = len(told) - 5
    assert gates(told) == [True] * begun + [False] * 5
    assert begun > 1 or not before


def test_before_a_lazy_structure_begins_a_text_ends_as_any_does(core: Core) -> None:
    lazy = Structure("regex", "[a-e]{4}", lazy=("never!",))
    eager = {EOS: 100.0}
    assert len(run(core, lazy, logit_bias=eager)) == 1
    assert len(run(core, lazy, logit_bias=eager, min_tokens=5)) == 6
    assert run(core, lazy, logit_bias=eager, ignore_eos=True)[-1].finish == "length"


@settings(max_examples=15, deadline=None)
@given(
    pattern=st.lists(
        st.tuples(st.sampled_from(["[a-e]", "x", "[^a]", "(yes|no)", "."]), st.integers(1, 4)), min_size=1, max_size=5
    ),
    seed=st.integers(0, 999),
    sampling=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.5]),
            "top_p": st.sampled_from([1.0, 0.9, 0.1]),
            "top_k": st.sampled_from([0, 1, 30]),
            "min_p": st.sampled_from([0.0, 0.2]),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
        }
    ),
)
def test_any_sampling_keeps_to_the_structure(
    core: Core, pattern: list[tuple[str, int]], seed: int, sampling: dict[str, Any]
) -> None:
    regex = "".join(f"{part}{{{count}}}" for part, count in pattern)
    told = run(core, Structure("regex", regex), seed=seed, max_tokens=100, **sampling)
    assert told[-1].error is None
    if told[-1].finish == "stop":
        assert re.fullmatch(regex, text_of(told)), (regex, text_of(told))
