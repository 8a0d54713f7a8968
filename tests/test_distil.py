"""Distilling on made-up positions with a known teacher: the head comes near it on problems it never saw."""

import dataclasses

import pytest
import torch
from torch import Tensor

from trimtab.errors import TaskError
from trimtab.steering.training import distil as module
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.distil import Watched, distil, measure, merge
from trimtab.steering.training.features import CANDIDATES, Features, rank

VOCAB, HIDDEN, POSITIONS = 64, 8, 2400
CONFIG = FitConfig(via="lora", rank=2, epochs=4, batch=64, learning_rate=0.02)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def watched(rows: Tensor) -> Watched:
    """The teacher reads a hidden state that a rank-1 map has moved: what a head can be."""
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(POSITIONS, HIDDEN, generator=generator)
    z, moved = h @ rows.T / 2, (h + 0.3 * h[:, :1] * torch.ones(HIDDEN)) @ rows.T / 2
    ids, logits = rank(z, CANDIDATES)
    problem = torch.arange(POSITIONS) // 60
    gated = torch.rand(POSITIONS, generator=generator) < 0.8
    features = Features(
        h=h,
        ids=ids.int(),
        logits=logits,
        lse=z.logsumexp(-1),
        chosen=ids[:, 0].int(),
        advantage=torch.zeros(POSITIONS),
        position=torch.zeros(POSITIONS, dtype=torch.int32),
        item=problem.int(),
        problem=problem.int(),
        held_out=problem % 6 == 0,
        gated=gated,
        random=torch.rand(POSITIONS, generator=generator) < 0.8,
        acts=gated,
    )
    return Watched(features, moved.gather(1, ids))


def test_the_head_comes_near_the_teacher_on_held_out_problems(watched: Watched, rows: Tensor) -> None:
    found = distil(watched, rows, CONFIG)
    f = watched.features
    held_out = watched.at(f.gated & f.held_out)
    base, teacher = held_out.features.logits.log_softmax(1), held_out.targets.log_softmax(1)
    assert found.base_kl == pytest.approx(float((teacher.exp() * (teacher - base)).sum(1).mean()), rel=1e-4)
    assert found.kl == measure(found.head, held_out, rows, CONFIG)
    assert found.kl < 0.2 * found.base_kl
    assert found.positions == int((f.gated & ~f.held_out).sum())


def test_the_epoch_nearest_on_held_out_problems_is_kept(
    watched: Watched, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = iter([9.0, 3.0, 1.0, 2.0, 5.0])  # the unfitted head, then four epochs
    monkeypatch.setattr(module, "measure", lambda *_: next(shown))
    found = distil(watched, rows, CONFIG)
    assert (found.base_kl, found.kl, found.epoch) == (9.0, 1.0, 2)


def test_held_out_and_unlearned_positions_do_not_matter_to_the_head(watched: Watched, rows: Tensor) -> None:
    config = dataclasses.replace(CONFIG, epochs=1)
    f = watched.features
    unused = f.held_out | ~f.random
    noise = torch.where(unused[:, None], torch.randn(watched.targets.shape), watched.targets)
    one = distil(watched, rows, config, learned=f.random).head
    same = distil(watched._replace(targets=noise), rows, config, learned=f.random).head
    other = distil(watched, rows, config).head
    assert torch.equal(one.B, same.B)
    assert not torch.equal(one.B, other.B)


def test_merged_rows_are_one_after_another(watched: Watched) -> None:
    both = merge([watched.at(torch.arange(5)), watched.at(torch.arange(5, 9))])
    assert torch.equal(both.targets, watched.targets[:9])
    assert torch.equal(both.features.h, watched.features.h[:9])


def test_no_open_position_or_no_number_is_an_error_that_names_the_option(watched: Watched, rows: Tensor) -> None:
    closed = watched._replace(features=watched.features._replace(gated=torch.zeros(POSITIONS, dtype=torch.bool)))
    with pytest.raises(TaskError, match="lower --tau"):
        distil(closed, rows, CONFIG)
    with pytest.raises(TaskError, match="lower --learning-rate"):
        distil(watched._replace(targets=watched.targets * float("nan")), rows, CONFIG)
