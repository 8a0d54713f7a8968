"""The built-in task: its verifier accepts right answers and refuses corrupted ones; its splits share nothing."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import TaskError
from trimtab.steering.tasks.instructions import _POOLS, KINDS, Instructions, follows
from trimtab.steering.tasks.problem import Problem, Split
from trimtab.steering.tasks.words import TRAIN_WORDS

FUNCTION_WORDS = {"a", "an", "the", "of", "to", "in", "at", "and", "on", "up", "well", "done"}

filler = st.lists(st.sampled_from(["it", "is", "very", "old", "when", "they're", "seen"]), min_size=1, max_size=6)
word = st.sampled_from(TRAIN_WORDS)
mark = st.sampled_from([".", "!", "?"])
space = st.sampled_from(["", " ", "\n", "  \n"])


def sentence(words: list[str], end: str) -> str:
    return " ".join(words).capitalize() + end


@given(filler, word, word, filler, mark, space)
def test_sentences_with_the_words_pass_and_corrupted_ones_do_not(
    before: list[str], first: str, second: str, after: list[str], end: str, pad: str
) -> None:
    text = sentence([*before, first, "and", second.upper() + ",", *after], end)
    for answer in ({"kind": "one", "words": [first]}, {"kind": "two", "words": [first, second]}):
        assert follows(pad + text + pad, answer)
        assert follows(f'"{text}"', answer)
        assert not follows(text + " And more" + end, answer), "two sentences"
        assert not follows(text.lower().replace(first, first + "x"), answer), "the word must stand whole"
        assert not follows("", answer)
        assert not follows("...", answer)


def test_quotes_and_apostrophes_are_no_part_of_a_word() -> None:
    answer = {"kind": "one", "words": ["river"]}
    for quoted in ("'river'", "\N{LEFT SINGLE QUOTATION MARK}river\N{RIGHT SINGLE QUOTATION MARK}", '"river"'):
        assert follows(f"The {quoted} flows.", answer)
    for apostrophe in ("'", "\N{RIGHT SINGLE QUOTATION MARK}"):
        assert not follows(f"The river{apostrophe}s edge.", answer)


@given(filler, word, mark)
def test_the_last_word_is_the_last(before: list[str], last: str, end: str) -> None:
    answer = {"kind": "end", "words": [last]}
    assert follows(sentence([*before, last], end), answer)
    assert follows(sentence([*before, last], ""), answer)
    assert not follows(sentence([*before, last, "too"], end), answer)
    assert not follows(sentence([*before, last + "s"], end), answer)


@given(st.lists(st.sampled_from(["1. salt", "- pepper", "Oil", "a b. c!"]), min_size=1, max_size=6), st.booleans())
def test_three_lines_are_three(lines: list[str], blank_between: bool) -> None:
    text = ("\n\n" if blank_between else "\n").join(lines)
    assert follows(text + "\n", {"kind": "three", "words": []}) == (len(lines) == 3)


def test_three_bare_numbers_are_no_things() -> None:
    assert not follows("1.\n2.\n3.", {"kind": "three", "words": []})


def content_words(topics: list[str]) -> set[str]:
    return {w for topic in topics for w in re.findall("[a-z]+", topic.lower())} - FUNCTION_WORDS


def test_no_two_parts_share_a_word_topic_or_content_word() -> None:
    for (words, topics), (other_words, other_topics) in itertools.combinations(_POOLS.values(), 2):
        assert not set(words) & set(other_words)
        assert not content_words(topics) & content_words(other_topics)
    all_topics = {word for _, topics in _POOLS.values() for word in content_words(topics)}
    for split, (words, topics) in _POOLS.items():
        assert not set(words) & all_topics
        for values in (words, topics):
            assert len(set(values)) == len(values) > (20 if split == "validation" else 70)


def prompt(problem: Problem) -> str:
    assert problem.messages is not None
    return str(problem.messages[0]["content"])


@pytest.mark.parametrize(("split", "count"), [("train", 400), ("validation", 80), ("held-out", 400)])
def test_problems_are_distinct_balanced_and_a_prefix_of_more(split: Split, count: int) -> None:
    many = Instructions(seed=4).problems(split, count)
    assert Instructions(seed=4).problems(split, count // 2) == many[: count // 2]
    assert Instructions(seed=5).problems(split, count // 2) != many[: count // 2]
    assert len({prompt(p) for p in many}) == len({p.id for p in many}) == count
    for kind in KINDS:
        assert sum(p.kind == kind for p in many) > count / 8
    for p in many:
        assert all(f'"{w}"' in prompt(p) for w in p.answer["words"])


def test_splits_share_no_prompt() -> None:
    task = Instructions()
    found = [task.problems(split, 400) for split in _POOLS]  # type: ignore[arg-type]
    for one, other in itertools.combinations(found, 2):
        assert not {prompt(p) for p in one} & {prompt(p) for p in other}
        assert not {p.id for p in one} & {p.id for p in other}


def test_more_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(TaskError, match="at most"):
        Instructions().problems("train", 10**6)
