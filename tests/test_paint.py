"""How an answer looks: shades, marks, and text that comes later than its receipts."""

import io
from typing import Any

import pytest

from mocked import RECEIPT
from trimtab.clients import SteeringReport
from trimtab.clients.paint import Painter, choose_marks


def report(*tokens: tuple[str, float, str]) -> SteeringReport:
    """Receipts of (token, entropy, "" | "fired" | "flip")."""
    receipts = [
        {**RECEIPT, "token": token, "entropy": entropy, "fired": did != "", "flip": did == "flip"}
        for token, entropy, did in tokens
    ]
    return SteeringReport.model_validate({"tokens": receipts})


def test_shades_grow_with_entropy_and_marks_stand_beside_them() -> None:
    painter = Painter("colours")
    painted = painter.paint(
        "a b c d", report(("a", 0.1, ""), (" b", 0.6, ""), (" c", 99.0, "fired"), (" d", 0, "flip"))
    )
    assert painted == "a\033[38;5;72m b\033[0m\033[4;38;5;167m c\033[0m\033[1;4m d\033[0m"


def test_brackets_say_the_same() -> None:
    tokens = report(("The", 9.0, ""), (" sky", 1.0, "flip"), (" is", 1.0, "fired"))
    assert Painter("brackets").paint("The sky is", tokens) == "The[[ sky]][ is]"


@pytest.mark.parametrize("marks", ["colours", "brackets", "none"])
def test_without_receipts_text_is_text(marks: Any) -> None:
    assert Painter(marks).paint("The\n\tsky", None) == "The\n\tsky"


def test_text_that_was_held_back_finds_its_receipts() -> None:
    """A stop string may yet come: the receipts come first, and their text later, or in parts."""
    painter = Painter("brackets")
    assert painter.paint("", report(("##", 1.0, "fired"), ("x", 1.0, ""))) == ""
    assert painter.paint("##", report(("y", 1.0, "flip"))) == "[##]"
    assert painter.paint("xy", report(("<|im_end|>", 1.0, ""))) == "x[[y]]"


def test_a_character_of_several_tokens_takes_the_marks_of_all() -> None:
    painter = Painter("colours")
    assert painter.paint("", report(("\ufffd", 0.1, "fired"))) == ""
    assert painter.paint("é", report(("\ufffd", 2.2, ""))) == "\033[4;38;5;179mé\033[0m"
    assert painter.paint("!", report(("!", 0.0, ""))) == "!"


def test_no_control_character_reaches_a_terminal() -> None:
    evil = "\033[2J\x9b\x7f\r"
    assert Painter("brackets").paint(evil, None) == "␛[2J\ufffd␡␍"
    assert Painter("colours").paint(evil, report((evil, 0.0, ""))) == "␛[2J\ufffd␡␍"
    assert Painter("none").paint(evil, None) == evil


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("out", "environment", "looked_at", "marks"),
    [
        (Terminal(), {}, False, "colours"),
        (Terminal(), {"NO_COLOR": "1"}, False, "brackets"),
        (Terminal(), {"NO_COLOR": ""}, False, "colours"),
        (Terminal(), {"TERM": "dumb"}, False, "brackets"),
        (io.StringIO(), {}, False, "none"),
        (io.StringIO(), {}, True, "brackets"),
    ],
)
def test_marks_are_chosen_by_who_looks(out: Any, environment: dict[str, str], looked_at: bool, marks: str) -> None:
    assert choose_marks(out, environment, looked_at) == marks
