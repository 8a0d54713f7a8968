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
        ("via", "magic"),
        ("teacher", "m"),
        ("lora_rank", 0),
        ("lora_epochs", 0.0),
        ("lora_rate", float("nan")),
        ("lora_kl", -0.1),
        ("lora_targets", ()),
        ("teacher_samples", 129),
        ("strengths", ()),
        ("strengths", (2.0, 1.0)),
        ("strengths", (0.0,)),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field} must") as caught:
        FitConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_route_brings_its_defaults_and_what_is_given_stays() -> None:
    assert (FitConfig().rank, FitConfig().top_k, FitConfig().epochs) == (8, 20, 25)
    distilled = FitConfig(via="lora", epochs=3)
    assert (distilled.rank, distilled.top_k, distilled.epochs, distilled.problems) == (16, 32, 3, 256)
    assert FitConfig(via="teacher", teacher="m").rank == 16
    with pytest.raises(InvalidRequest, match=r"^teacher must be given"):
        FitConfig(via="teacher")
