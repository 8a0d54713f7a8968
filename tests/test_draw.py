"""Order and chance over rows of logits: the best are those of a whole sort, and what has no mass is never drawn."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.kernels.draw import GROUP, Draw, best_tokens, best_tokens_of_rows, draw_token


@given(
    groups=st.integers(1, 6),
    k=st.integers(1, 64),
    steps=st.sampled_from([1, 3, 1000]),
    missing=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_the_best_tokens_of_many_rows_are_those_of_each(
    groups: int, k: int, steps: int, missing: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    z = (torch.randn(5, groups * GROUP, generator=draw) * steps).round() / steps  # few steps: many ties
    z[torch.rand(z.shape, generator=draw) < missing] = float("-inf")
    rows = np.array([4, 0, 2])
    maxima = z.view(5, groups, GROUP).amax(2)[rows]
    best = best_tokens_of_rows(z.numpy(), rows, maxima.numpy(), k)
    for at, row in enumerate(rows.tolist()):
        values, ids = z[row].sort(descending=True, stable=True)
        assert best.values[at].tolist() == best.logits.take(best.place[at]).tolist() == values[:k].tolist()
        assert best.ids[at].tolist() == ids[:k].tolist()
        assert [found.tolist() for found in best_tokens(z[row], maxima[at], k)] == [
            values[:k].tolist(),
            ids[:k].tolist(),
        ]
    assert best.row.tolist() == (best.home // groups).tolist()
    assert np.array_equal(best.logits, z.view(5, groups, GROUP)[rows[best.row], best.home % groups])


@given(groups=st.integers(2, 5), missing=st.floats(0, 1), seed=st.integers(0, 2**31), data=st.data())
def test_a_draw_beside_an_edge_takes_a_token_that_has_mass(
    groups: int, missing: float, seed: int, data: st.DataObject
) -> None:
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(groups * GROUP, generator=draw)
    z[torch.rand(z.shape, generator=draw) < missing] = float("-inf")
    z[:: GROUP // 2] = float("-inf")  # a first of each group among them
    z[1] = 0.0
    mass = z.double().exp()
    edges = (mass.cumsum(0) / mass.sum()).clamp(1e-9, 1 - 2**-53)
    edge = float(edges[data.draw(st.integers(0, len(z) - 1))])
    for uniform in (edge, np.nextafter(edge, 0), np.nextafter(edge, 1), 2**-53, 1 - 2**-53):
        token = draw_token(z, z.view(-1, GROUP).amax(1), len(z), Draw(1.0, 0, 1.0, 0.0, float(uniform)))
        assert mass[token] > 0


def test_rounding_points_at_no_token_before_a_groups_first_legal_one() -> None:
    """The mass before a group is the sum that was compared: the sum with it, less its own, may lie above that."""
    between = 0
    for seed in range(20):
        z = torch.randn(40 * GROUP, generator=torch.Generator().manual_seed(seed)) * 3
        z[::GROUP] = float("-inf")
        peaks = z.view(-1, GROUP).amax(1)
        mass = (z - peaks.max()).exp().view(-1, GROUP).sum(1, dtype=torch.float64).numpy()
        cumulative = mass.cumsum()
        for low, high in zip(cumulative[:-1], cumulative[1:] - mass[1:], strict=True):
            uniform = float(np.nextafter(low, np.inf) / cumulative[-1])
            between += bool(low <= uniform * cumulative[-1] < high)
            token = draw_token(z, peaks, len(z), Draw(1.0, 0, 1.0, 0.0, uniform))
            assert z[token] > float("-inf")
    assert between, "none of these was rounded so"
