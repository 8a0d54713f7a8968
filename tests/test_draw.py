"""Order over rows of logits: many rows at once agree with each alone, ties and missing tokens included."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.kernels.draw import GROUP, best_tokens, best_tokens_of_rows


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
