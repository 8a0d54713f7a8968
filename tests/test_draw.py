"""Order and chance over rows of logits: the best are those of a whole sort, and what has no mass is never drawn."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from steps import noise_for
from trimtab.kernels.draw import GROUP, Draw, best_tokens, best_tokens_of_rows, draw_token
from trimtab.kernels.race import FIRST_GROUP


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
def test_the_luckiest_is_drawn_if_it_has_mass_and_never_without(
    groups: int, missing: float, seed: int, data: st.DataObject
) -> None:
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(groups * GROUP, generator=draw)
    z[torch.rand(z.shape, generator=draw) < missing] = float("-inf")
    z[:GROUP] = float("-inf")
    z[GROUP] = 0.0
    peaks = z.view(-1, GROUP).amax(1)
    lucky = data.draw(st.integers(0, groups - 1))
    token = draw_token(z, peaks, len(z), Draw(1.0, 0, 1.0, 0.0, noise_for(FIRST_GROUP + lucky)))
    assert z[token] > float("-inf")
    assert token // GROUP == lucky or peaks[lucky] == float("-inf")
    lucky = data.draw(st.integers(0, len(z) - 1))
    token = draw_token(z, peaks, len(z), Draw(1.0, 0, 1.0, 0.0, noise_for(lucky)))
    assert z[token] > float("-inf")
    assert token == lucky or token // GROUP != lucky // GROUP or z[lucky] == float("-inf")
    token = draw_token(z, peaks, len(z), Draw(1.0, 2, 1.0, 0.0, noise_for(lucky)))
    assert token in best_tokens(z, peaks, 2)[1]
    assert z[token] > float("-inf")
