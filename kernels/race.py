"""The draw of a step: exponential races, in which what is to be drawn runs with its mass as its speed.

An item of mass w arrives after E / w, with E ~ Exponential(1) its own; the first to arrive is item i with probability
w_i / sum w. E hangs on (key, item) alone, so a change of some masses changes the draw only where an item that grew
overtakes one that did not: two distributions that are close draw the same token nearly always (Maddison et al., "A*
Sampling", NeurIPS 2014, of the same race in logarithms). By one uniform and the inverse CDF, each small change would
shift the edges of all later tokens: bfloat16 rounds a row otherwise in another batch, and paired seeds drift apart.

Groups of tokens race before the tokens of the winner do, which is the same distribution: so a step asks for some
thousand numbers, not for one of each token. They are those of SplitMix64 (Steele et al., "Fast splittable pseudorandom
number generators", OOPSLA 2014) started at the row's key: item i takes the i-th. Items are token ids, and FIRST_GROUP +
g for the groups.
"""

import numpy as np
import numpy.typing as npt

DRAW = "races"  # what is drawn otherwise is no pair of this: another rule needs another name
FIRST_GROUP = 1 << 32
GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(key: int, items: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """The outputs number `items` (>= 0) of the generator that starts at key, an int64."""
    z = np.int64(key).view(np.uint64) + (items.view(np.uint64) + np.uint64(1)) * np.uint64(GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def exponentials(key: int, items: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Exponential(1), one for each item: of 52 bits, so that a rare token keeps its probability."""
    uniform = ((splitmix64(key, items) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    drawn: npt.NDArray[np.float64] = -np.log(uniform)
    return drawn


def winner(masses: npt.NDArray[np.float64], key: int, items: npt.NDArray[np.int64]) -> int:
    """The place of the item that arrives first; masses >= 0, not all 0. One without mass never does."""
    return int((masses / exponentials(key, items)).argmax())
