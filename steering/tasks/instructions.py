"""The built-in task `instructions`: short writing instructions that a program can verify exactly.

Four kinds: one sentence about T with the word W (`one`), with W and V (`two`), ending in W (`end`), and exactly three
things about T, a line each (`three`). A model of 135M parameters gets about half of them right, which is what fitting
needs; it cannot do sums.

Invariant: problem i of a split depends on the split and the seed only (so a longer list starts with the shorter one),
prompts within a split are distinct, and no two splits share a word, topic or prompt. So `three`, which has one prompt a
topic, becomes rare in long lists.
"""

import random
import re
from collections.abc import Mapping
from typing import Any

from trimtab.errors import TaskError
from trimtab.steering.tasks.problem import Problem, Split
from trimtab.steering.tasks.words import (
    HELD_OUT_TOPICS,
    HELD_OUT_WORDS,
    TRAIN_TOPICS,
    TRAIN_WORDS,
    VALIDATION_TOPICS,
    VALIDATION_WORDS,
)

KINDS = ("one", "two", "end", "three")

_POOLS = {
    "train": (TRAIN_WORDS, TRAIN_TOPICS),
    "validation": (VALIDATION_WORDS, VALIDATION_TOPICS),
    "held-out": (HELD_OUT_WORDS, HELD_OUT_TOPICS),
}
_SENTENCE_END = re.compile(r'[.!?]+(?:\s|$|")')
_WORD = re.compile(r"[a-z']+")


class Instructions:
    """A task (see tasks.py) whose problems are made, not read."""

    name = "instructions"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def problems(self, split: Split, count: int) -> list[Problem]:
        """The first `count` of the split. Raises TaskError beyond the distinct prompts there are."""
        words, topics = _POOLS[split]
        limit = len(words) * len(topics)  # the kind `one` alone has this many
        if count > limit:
            raise TaskError(f"instructions has at most {limit} {split} problems, not {count}")
        draw = random.Random(f"{self._seed}/{split}")
        seen: set[str] = set()
        made: list[Problem] = []
        while len(made) < count:
            kind, topic, (first, second) = draw.choice(KINDS), draw.choice(topics), draw.sample(words, 2)
            prompt = ask(kind, topic, first, second)
            if prompt in seen:
                continue
            seen.add(prompt)
            required = {"one": [first], "two": [first, second], "end": [first], "three": []}[kind]
            answer = {"kind": kind, "words": required}
            messages = ({"role": "user", "content": prompt},)
            made.append(Problem(f"{split}-{len(made):05d}", answer, messages=messages, kind=kind))
        return made

    def score(self, problem: Problem, completion: str) -> float:
        """1.0 when the completion does what was asked, else 0.0."""
        return float(follows(completion, problem.answer))

    def extract(self, completion: str) -> None:
        """A sentence is no answer that completions could agree on."""


def ask(kind: str, topic: str, first: str, second: str) -> str:
    """The instruction's text."""
    if kind == "three":
        return f"List exactly three things related to {topic}, one per line, with no other text."
    ending = {
        "one": f'that contains the word "{first}"',
        "two": f'that contains both the word "{first}" and the word "{second}"',
        "end": f'whose last word is "{first}"',
    }[kind]
    return f"Write one short sentence about {topic} {ending}."


def follows(completion: str, answer: Mapping[str, Any]) -> bool:
    """Whether the completion does what was asked. Words are compared whole, without regard to case."""
    text = completion.strip()
    if answer["kind"] == "three":
        lines = [line for line in text.splitlines() if line.strip()]
        return len(lines) == 3 and all(any(c.isalpha() for c in line) for line in lines)
    words = [word.strip("'") for word in _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))]
    if not words or count_sentences(text) != 1:
        return False
    if answer["kind"] == "end":
        return bool(words[-1] == answer["words"][0])
    return all(word in words for word in answer["words"])


def count_sentences(text: str) -> int:
    """Stretches of text between the marks . ! ? that are followed by a space, a quote or the end."""
    return sum(1 for part in _SENTENCE_END.split(text) if part.strip())
