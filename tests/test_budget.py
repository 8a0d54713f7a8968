"""Budgets: counts, shares and cool-downs, and markers wherever tokens divide them."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from trimtab.errors import InvalidRequest
from trimtab.server.engine.budget import Allowance
from trimtab.server.engine.pieces import Pieces
from trimtab.server.engine.request import Budget

PIECES = Pieces(tiny_tokenizer())


class Parts:
    """Pieces whose token i is the i-th of these strings."""

    def __init__(self, parts: list[bytes]) -> None:
        self.parts = parts

    def content(self, token: int) -> bytes:
        return self.parts[token]


def fire_whenever_open(budget: Budget, steps: int) -> list[bool]:
    allowance = Allowance(budget, PIECES)
    fired = []
    for _ in range(steps):
        fired.append(allowance.open)
        allowance.take(65, allowance.open)
    return fired


def opens(budget: Budget, parts: list[bytes]) -> list[bool]:
    """Whether the step before each part, and the one after the last, may fire."""
    pieces: Any = Parts(parts)
    allowance = Allowance(budget, pieces)
    seen = [allowance.open]
    for token in range(len(parts)):
        allowance.take(token, False)
        seen.append(allowance.open)
    return seen


def test_nothing_is_bounded_by_default() -> None:
    assert fire_whenever_open(Budget(), 50) == [True] * 50


@pytest.mark.parametrize("most", [0, 1, 3])
def test_at_most_so_many_steps(most: int) -> None:
    assert fire_whenever_open(Budget(max_steps=most), 10) == [True] * most + [False] * (10 - most)


def test_a_step_that_fired_is_followed_by_the_cooldown() -> None:
    assert fire_whenever_open(Budget(cooldown=2), 7) == [True, False, False] * 2 + [True]
    allowance = Allowance(Budget(cooldown=2), PIECES)
    allowance.take(65, False)
    assert allowance.open, "only a step that fired is followed by it"


@given(st.lists(st.booleans(), max_size=80), st.floats(0, 1))
def test_the_share_holds_at_every_step_and_no_step_is_withheld_needlessly(gates: list[bool], share: float) -> None:
    allowance = Allowance(Budget(max_share=share), PIECES)
    fired = 0
    for step, gate in enumerate(gates, start=1):
        assert allowance.open == (fired + 1 <= share * step)
        acts = gate and allowance.open
        fired += acts
        allowance.take(65, acts)
        assert fired <= share * step


def test_steering_ends_with_the_marker() -> None:
    assert opens(Budget(until="####"), [b"a", b"##", b"#", b"# 4", b"b"]) == [True] * 4 + [False] * 2
    assert opens(Budget(until="é"), ["aé".encode()[:2], "é".encode()[1:]]) == [True, True, False]


def test_a_tool_call_is_never_steered_inside() -> None:
    parts = [b"x<tool", b"_call>", b"{}", b"</tool_call", b">", b"y", b"<tool_call></tool_call>", b"z<tool_call>"]
    assert opens(Budget(), parts) == [True, True, False, False, False, True, True, True, False]
    assert opens(Budget(spans=()), parts) == [True] * 9


def test_a_special_token_is_a_marker_by_its_name() -> None:
    allowance = Allowance(Budget(spans=(("<|im_start|>", "<|im_end|>"),)), PIECES)
    states = []
    for token in (65, 257, 65, 256, 65):
        allowance.take(token, False)
        states.append(allowance.open)
    assert states == [True, False, False, True, True]


ALPHABET = st.sampled_from("ab<>")


@given(st.text(ALPHABET, max_size=30), st.lists(st.integers(0, 30), max_size=8), st.sampled_from(["<a", "ab", "<<"]))
def test_what_is_seen_does_not_depend_on_how_tokens_divide_the_text(text: str, cuts: list[int], until: str) -> None:
    budget = Budget(until=until, spans=(("<a>", "<b>"), ("<<", ">>"), ("aa", "aa")))
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[a:b].encode() for a, b in itertools.pairwise(edges)]
    letters = opens(budget, [letter.encode() for letter in text])
    assert opens(budget, parts) == [letters[edge] for edge in edges]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"max_steps": -1}, "max_steps"),
        ({"max_share": 1.5}, "max_share"),
        ({"max_share": float("nan")}, "max_share"),
        ({"cooldown": -1}, "cooldown"),
        ({"kl": 0}, "kl"),
        ({"kl": float("inf")}, "kl"),
        ({"until": ""}, "until"),
        ({"spans": (("<a>", ""),)}, "spans"),
        ({"spans": (("<a>", "</a>"),) * 65}, "spans"),
        ({"spans": (("<a>", "é" * 257),)}, "spans"),
        ({"until": "é" * 257}, "until"),
    ],
)
def test_a_bad_value_names_its_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Budget(**values)
    assert caught.value.field == f"steering.budget.{field}"


def test_the_most_and_longest_markers_are_taken() -> None:
    long = "é" * 256
    assert opens(Budget(until=long, spans=((long, long),) * 64), [b"a"]) == [True] * 2


@pytest.mark.parametrize("budget", [{"until": "\ud800"}, {"spans": (("<a>", "\udfff"),)}])
def test_a_marker_that_no_text_can_hold_is_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        Budget(**budget)
