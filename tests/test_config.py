"""The trainer's arguments: each is documented, and a wrong one is named."""

import dataclasses

import pytest

from trimtab.errors import InvalidRequest
from trimtab.steering.config import FREE, FitConfig


def test_every_field_has_a_line_of_documentation() -> None:
    fields = {f.name: f.metadata["help"] for f in dataclasses.fields(FitConfig)}
    assert all(len(words) >= 8 and "\n" not in words for words in fields.values())
    assert set(FREE) < fields.keys()


def test_slots_are_part_of_a_run_as_they_change_rounding() -> None:
    assert "slots" not in FREE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 1),
        ("problems", 0),
        ("temperature", 0.0),
        ("top_p", 1.5),
        ("top_k", 33),
        ("drop_longest", 1.0),
        ("tau", float("nan")),
        ("learning_rate", float("inf")),
        ("ratio_clip", 1.0),
        ("kl_budgets", ()),
        ("kl_budgets", (0.2, 0.1)),
        ("kl_budgets", (0.0,)),
        ("name", "a/b"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field} must") as caught:
        FitConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
