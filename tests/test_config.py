"""The trainer's arguments: each is documented, and a wrong one is named."""

import dataclasses

import pytest

from trimtab.errors import InvalidRequest
from trimtab.steering.correction import ACTIVATIONS, MAX_TOP_K
from trimtab.steering.gate import KINDS
from trimtab.steering.training import config as config_module
from trimtab.steering.training.config import FREE, FitConfig


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
        ("top_k", 65),
        ("rank", -1),
        ("tier", "tail"),
        ("gate", "random"),
        ("activation", "relu"),
        ("kl_limit", -1.0),
        ("lora_preset", "large"),
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
        ("strengths", (0.5, 0.50000001)),
        ("kl_budgets", (0.01, 1e20)),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field} must") as caught:
        FitConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_route_brings_its_defaults_and_what_is_given_stays() -> None:
    assert (FitConfig().rank, FitConfig().top_k, FitConfig().epochs, FitConfig().kl_limit) == (8, 20, 25, 0.25)
    distilled = FitConfig(via="lora", epochs=3)
    assert (distilled.rank, distilled.top_k, distilled.epochs, distilled.problems) == (16, 32, 3, 256)
    assert FitConfig(via="teacher", teacher="m").rank == 16
    with pytest.raises(InvalidRequest, match=r"^teacher must be given"):
        FitConfig(via="teacher")


def test_the_papers_hyper_parameters_are_one_option_and_each_may_be_given() -> None:
    def shape(config: FitConfig) -> tuple[object, ...]:
        return config.lora_targets, config.lora_rank, config.lora_alpha, config.lora_warmup, config.lora_epochs

    assert shape(FitConfig(via="lora")) == (("o_proj",), 8, 16, 10, 1.0)
    paper = FitConfig(tier="lora", lora_preset="paper", lora_warmup=7)
    assert shape(paper) == (("q_proj", "k_proj", "v_proj", "o_proj"), 32, 64, 7, 1.35)
    assert (paper.kl_limit, paper.strengths) == (0.0, (1.0,)), "the LoRA itself ships, as strong as it is"
    assert FitConfig(via="lora").lora_kl_limit == paper.lora_kl_limit == 0.03
    imitation = FitConfig(tier="lora", via="teacher", teacher="tuned")
    assert imitation.lora_kl_limit == 0.3, "a tuned model may differ from its base where that is sure, too"


def test_the_rank_of_the_lora_tier_is_the_loras() -> None:
    config = FitConfig(tier="lora", rank=4)
    assert (config.lora_rank, config.lora_alpha) == (4, 8)
    assert FitConfig(tier="lora", rank=4, lora_alpha=64).lora_alpha == 64
    assert dataclasses.replace(config, seed=1).lora_rank == 4
    with pytest.raises(InvalidRequest, match=r"^lora_rank must be left out, or rank's 4"):
        FitConfig(tier="lora", rank=4, lora_rank=8)
    with pytest.raises(InvalidRequest, match=r"^via must be one of direct, teacher for the tier lora"):
        FitConfig(tier="lora", via="lora")


def test_a_gate_brings_its_threshold() -> None:
    assert [FitConfig(gate=gate).tau for gate in ("entropy", "margin", "always")] == [0.5, -0.8, 0.5]
    assert FitConfig(gate="margin", tau=-0.1).tau == -0.1
    with pytest.raises(InvalidRequest, match=r"^tau must be -1 to 0"):
        FitConfig(gate="margin", tau=0.5)


def test_the_names_of_activations_and_gates_are_the_artefacts() -> None:
    assert config_module.ACTIVATIONS == ACTIVATIONS
    assert set(config_module.GATES) == set(KINDS) - {"random"}, "a random gate is a control, not a fit"
    assert config_module.CANDIDATES == MAX_TOP_K
