"""The fit on made-up features whose right correction is known: it gains, keeps its budget and beats its controls."""

import pytest
import torch
from torch import Tensor

from trimtab.errors import TaskError
from trimtab.steering.correction import BaseIdentity
from trimtab.steering.training.config import CANDIDATES, STRENGTH_LIMIT, FitConfig
from trimtab.steering.training.controls import RANDOM, SHUFFLED, fit_control, match, shuffle
from trimtab.steering.training.features import Features, rank
from trimtab.steering.training.fit import divergence_of, fit, measure
from trimtab.steering.training.head import Head
from trimtab.steering.training.objective import change_by
from trimtab.steering.training.strength import bisect

VOCAB, HIDDEN, POSITIONS, ITEMS = 64, 8, 2400, 240
T = 0.7
CONFIG = FitConfig(temperature=T, rank=2, top_k=20, batch=128, epochs=20, learning_rate=3e-3)
BASE = BaseIdentity("m", "f", "t", "c")


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def features(rows: Tensor) -> Features:
    """A completion is rewarded for tokens whose row points along (1, 0, 0, ...): b along it is the known correction."""
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(POSITIONS, HIDDEN, generator=generator)
    z = h @ rows.T / 2
    chosen = torch.multinomial((z / T).softmax(-1), 1, generator=generator)[:, 0]
    item = torch.arange(POSITIONS) // (POSITIONS // ITEMS)
    merit = torch.zeros(ITEMS).index_add(0, item, rows[chosen, 0])
    merit = (merit - merit.mean()) / merit.std()
    problem = item // 6
    ids, logits = rank(z, CANDIDATES)
    gated = torch.rand(POSITIONS, generator=generator) < 0.8
    return Features(
        h=h,
        ids=ids.int(),
        logits=logits,
        lse=(z / T).logsumexp(-1),
        chosen=chosen.int(),
        advantage=merit.clamp(-2.5, 2.5)[item],
        position=(torch.arange(POSITIONS) % (POSITIONS // ITEMS)).int(),
        item=item.int(),
        problem=problem.int(),
        held_out=problem % 6 == 0,
        gated=gated,
        random=torch.rand(POSITIONS, generator=generator) < 0.8,
        acts=gated,
    )


def merit_after(head: Head, features: Features, rows: Tensor, strength: float = 1.0) -> float:
    """The expected row[0] of the corrected model's next token, less the base's, on held-out positions."""
    f = features.at(features.gated & features.held_out)
    with torch.no_grad():
        delta = strength * head(f.h, rows[f.ids[:, : CONFIG.top_k].long()])
    z = f.h @ rows.T / 2
    steered = z.scatter_add(1, f.ids[:, : CONFIG.top_k].long(), delta)
    value = rows[:, 0]
    return float((((steered / T).softmax(-1) - (z / T).softmax(-1)) @ value).mean())


def test_the_fit_finds_the_known_direction_within_each_budget(features: Features, rows: Tensor) -> None:
    snapshots = fit(features, rows, [0.02, 0.06, 0.12], CONFIG)
    measured = features.at(features.gated & features.held_out)
    gains = []
    for snapshot in snapshots:
        kl = measure(snapshot.head, measured, rows, CONFIG)
        assert kl == snapshot.kl
        assert 0 < kl < snapshot.budget
        gains.append(merit_after(snapshot.head, features, rows))
    assert [s.budget for s in snapshots] == [0.02, 0.06, 0.12]
    assert 0.05 < gains[0] < gains[1] < gains[2]


def test_equal_inputs_give_equal_tensors_and_another_seed_does_not(features: Features, rows: Tensor) -> None:
    one, same = (fit(features, rows, [0.05], CONFIG)[0].head for _ in range(2))
    other = fit(features, rows, [0.05], FitConfig(**{**vars(CONFIG), "seed": 1}))[0].head
    assert torch.equal(one.B, same.B)
    assert not torch.equal(one.B, other.B)


def noise(advantage: Tensor, where: Tensor) -> Tensor:
    """Other advantages at those positions."""
    assert where.any()
    return torch.where(where, 2.0 - 3 * advantage, advantage)


def test_what_is_held_out_teaches_nothing(features: Features, rows: Tensor) -> None:
    perturbed = features._replace(advantage=noise(features.advantage, features.held_out))
    one, other = (fit(f, rows, [0.05], CONFIG)[0].head for f in (features, perturbed))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    taught = features._replace(advantage=noise(features.advantage, ~features.held_out))
    assert not torch.equal(one.B, fit(taught, rows, [0.05], CONFIG)[0].head.B), "the same change elsewhere does"


def test_the_random_control_learns_at_its_random_positions_only(features: Features, rows: Tensor) -> None:
    other = features._replace(advantage=noise(features.advantage, features.gated & ~features.random))
    correction = fit(features, rows, [0.05], CONFIG)[0].head
    one, same = (fit_control(RANDOM, f, rows, 0.05, CONFIG, BASE) for f in (features, other))
    assert torch.equal(one.B, same.B)
    assert not torch.equal(one.B, correction.B)


def test_a_control_whose_first_step_is_too_far_is_brought_back_by_its_strength(
    features: Features, rows: Tensor
) -> None:
    eager = FitConfig(**{**vars(CONFIG), "learning_rate": 0.2})
    with pytest.raises(TaskError, match="the first step leaves every KL budget"):
        fit(features, rows, [0.01], eager)
    for kind in (SHUFFLED, RANDOM):
        control = fit_control(kind, features, rows, 0.01, eager, BASE)
        assert 0 < control.strength < 1
        assert control.provenance["kl"] == pytest.approx(0.01, rel=0.02)


def test_a_loss_that_is_no_number_ends_the_fit_in_words(features: Features, rows: Tensor) -> None:
    broken = features._replace(advantage=torch.full_like(features.advantage, float("nan")))
    with pytest.raises(TaskError, match="the loss is no number by step 1: lower --learning-rate"):
        fit(broken, rows, [0.06], CONFIG, overshoot=True)


def test_a_control_that_cannot_push_as_hard_says_so(
    features: Features, rows: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    timid = FitConfig(**{**vars(CONFIG), "learning_rate": 1e-9, "epochs": 1})
    control = fit_control(SHUFFLED, features, rows, 0.06, timid, BASE)
    assert control.strength == STRENGTH_LIMIT
    assert control.provenance["kl"] < control.provenance["kl_wanted"] == 0.06
    assert "the limit: it pushes less than the correction" in capsys.readouterr().err


def test_the_controls_push_as_hard_and_the_shuffled_one_gains_nothing_like_it(features: Features, rows: Tensor) -> None:
    snapshot = fit(features, rows, [0.06], CONFIG)[0]
    measured = features.at(features.gated & features.held_out)
    controls = {kind: fit_control(kind, features, rows, snapshot.kl, CONFIG, BASE) for kind in (SHUFFLED, RANDOM)}
    gains = {}
    for kind, control in controls.items():
        head = Head(HIDDEN, control.rank, control.cap, control.hidden_scale, control.row_scale, 0)
        head.A.data, head.B.data, head.b.data = control.A, control.B, control.b
        kl = measure(head, measured, rows, CONFIG, control.strength)
        assert kl == pytest.approx(snapshot.kl, rel=0.02)
        assert control.provenance == {"kl": kl, "kl_wanted": snapshot.kl}
        gains[kind] = merit_after(head, features, rows, control.strength)
    true_gain = merit_after(snapshot.head, features, rows)
    assert gains[SHUFFLED] < 0.5 * true_gain


def test_shuffling_moves_advantages_within_problems_only(features: Features) -> None:
    shuffled = shuffle(features, seed=0)
    assert not torch.equal(shuffled.advantage, features.advantage)
    for problem in range(3):
        here = features.problem == problem
        assert sorted(shuffled.advantage[here].tolist()) == sorted(features.advantage[here].tolist())
    for item in range(12):
        assert len(shuffled.advantage[features.item == item].unique()) == 1


def test_matching_strength_reaches_the_kl(features: Features, rows: Tensor) -> None:
    head = fit(features, rows, [0.02], CONFIG)[0].head
    strength = bisect(divergence_of(head, features, rows, CONFIG), 0.1)
    assert strength > 1
    kl = measure(head, features.at(features.gated & features.held_out), rows, CONFIG, strength)
    assert kl == pytest.approx(0.1, rel=0.02)


def test_kl_is_measured_and_matched_where_the_correction_acts(features: Features, rows: Tensor) -> None:
    some = features._replace(acts=features.h[:, 0] > 0)  # as where the gate is `always`, other positions than the gated
    snapshot = fit(some, rows, [0.02], CONFIG)[0]
    acting, gated = (features.at(mask & features.held_out) for mask in (some.acts, some.gated))
    assert snapshot.kl == measure(snapshot.head, acting, rows, CONFIG) != measure(snapshot.head, gated, rows, CONFIG)
    control = match(RANDOM, snapshot.head, some, rows, 0.1, CONFIG, BaseIdentity("tiny", "", "", ""))
    assert measure(snapshot.head, acting, rows, CONFIG, control.strength) == pytest.approx(0.1, rel=1e-3)
    assert control.provenance["kl"] == pytest.approx(0.1, rel=1e-3)


def test_an_unfitted_head_is_the_base(features: Features, rows: Tensor) -> None:
    head = Head(HIDDEN, 2, 3.0, 1.0, 1.0, seed=0)
    delta = head(features.h, rows[features.ids[:, :5].long()])
    assert not delta.any()
    assert change_by(features, delta, T).kl.abs().max() < 1e-5


def test_no_open_position_or_no_room_for_a_step_is_an_error_that_names_the_option(
    features: Features, rows: Tensor
) -> None:
    closed = features._replace(gated=torch.zeros_like(features.gated))
    with pytest.raises(TaskError, match="lower --tau"):
        fit(closed, rows, [0.1], CONFIG)
    with pytest.raises(TaskError, match="--kl-budgets"):
        fit(features, rows, [1e-9], CONFIG)
