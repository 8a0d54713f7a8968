"""What is edited at each step, from arrays that grow: as if it were all gathered anew."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.server.engine import edits as edits_module
from trimtab.server.engine.edits import ChoiceEdits
from trimtab.server.engine.inputs import Sampling, _edits
from trimtab.server.engine.request import Request, SamplingParams
from trimtab.server.engine.rule import Rule
from trimtab.server.engine.sequence import Row, Sequence
from trimtab.server.engine.slate import Slate

VOCAB = 7  # few: what is biased, forbidden and sampled meets
TOKENS = st.integers(0, VOCAB - 1)
SAMPLING = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.2]),
    logit_bias=st.dictionaries(TOKENS, st.sampled_from([-100.0, 0.0, 0.1])),
    min_tokens=st.integers(0, 5),
    bad_words=st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
)
CHOICES = st.lists(
    st.tuples(
        SAMPLING,
        st.lists(TOKENS, min_size=1, max_size=9),  # the prompt
        st.frozensets(TOKENS, max_size=3),  # what ends it
        st.none() | st.booleans(),  # whether a grammar holds, if it has one
        st.lists(TOKENS, min_size=9, max_size=9),  # what it samples
    ),
    min_size=1,
    max_size=4,
)


def expected(sequence: Sequence) -> dict[int, tuple[int, float]]:
    """token -> (times, bias), gathered from all that it has read and sampled."""
    s, row = sequence.request.sampling, sequence.row
    found: dict[int, tuple[int, float]] = {}
    if s.repetition_penalty != 1:
        found.update(dict.fromkeys(sequence.request.prompt, (0, 0.0)))
    if sequence.penalised:
        found.update((token, (times, 0.0)) for token, times in Counter(row.tokens[row.prompt :]).items())
    for token, bias in s.logit_bias.items():
        found[token] = (found[token][0] if token in found else -1, float(np.float32(bias)))
    for *before, last in s.bad_words:
        if row.tokens[max(row.prompt, len(row.tokens) - len(before)) :] == before:
            found[last] = (found[last][0] if last in found else -1, -math.inf)
    if sequence.sampled < s.min_tokens and not (sequence.constraint and sequence.constraint.inside):
        for token in sequence.stops:
            found[token] = (found[token][0] if token in found else -1, -math.inf)
    return found


@settings(deadline=None)
@given(CHOICES, st.integers(1, 3))
def test_every_step_edits_what_all_that_was_read_and_sampled_asks(choices: list[Any], spare: int) -> None:
    sequences = []
    for slot, (sampling, prompt, stops, inside, _) in enumerate(choices):
        holds: Any = None if inside is None else SimpleNamespace(inside=inside, take=lambda token: None)
        request, row = Request(str(slot), tuple(prompt), sampling), Row(list(prompt), slot=slot)
        sequences.append(Sequence(request, 0, 0, 99, Rule(), stops, row, constraint=holds))
    slate = Slate(len(choices))
    slate.note(sequences)
    slots = np.arange(len(choices))
    held, edits_module._SPARE = edits_module._SPARE, spare
    try:
        for step in range(9):
            told = _edits(Sampling(sequences, slots, slots), slate, torch.device("cpu"))
            wanted = [expected(sequence) for sequence in sequences]
            assert (told is None) == (not any(wanted))
            if told is not None:
                entries = list(zip(*(column.tolist() for column in told[1:]), strict=True))
                rows = [entries[begin:end] for begin, end in told.spans.tolist()]
                assert [len(row) for row in rows] == [len(found) for found in wanted]  # each token once
                assert [{token: (times, bias) for token, times, bias in row} for row in rows] == wanted
            for sequence, (*_, samples) in zip(sequences, choices, strict=True):
                sequence.append(samples[step])
    finally:
        edits_module._SPARE = held


def test_what_was_listed_is_not_listed_anew_at_each_step() -> None:
    """A step's cost in Python does not grow with the prompt: the arrays are the same memory."""
    edits = ChoiceEdits(range(1000), {5: 1.0})
    edits.count(2000)
    before = edits.listed()
    edits.count(7)
    assert np.shares_memory(before.token, edits.listed().token)
