"""Counter-based randomness: numbers of a step are keyed by (seed, position), whoever shares the batch.

Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the generator
that CUDA, JAX and Triton use. Positions are known on the host, so these are made there, and the step takes them as
inputs: the key of its draw (race.py), and a random gate's chance.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: npt.NDArray[np.uint64], key: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """counter uint64 [4, n] of 32-bit words, key uint64 [2, n] of 32-bit words -> uint64 [4, n] of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return np.stack([c0, c1, c2, c3])


Seeds = Sequence[int] | npt.NDArray[np.uint64]  # any int; taken modulo 2^64
Positions = Sequence[int] | npt.NDArray[np.int64]  # >= 0


def _words(seeds: Seeds, positions: Positions, stream: int) -> npt.NDArray[np.uint64]:
    """n seeds and positions -> uint64 [4, n] of 32-bit words."""
    if not isinstance(seeds, np.ndarray):
        seeds = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    seed = seeds.astype(np.uint64)
    position = np.asarray(positions).astype(np.uint64)
    zero = np.zeros_like(seed)
    counter = np.stack([position & _LOW, position >> _SHIFT, zero + np.uint64(stream), zero])
    return philox(counter, np.stack([seed & _LOW, seed >> _SHIFT]))


def noise(seeds: Seeds, positions: Positions) -> npt.NDArray[np.int64]:
    """-> int64 [n], of all values: the keys of the rows' races, independent of every stream of `uniform`."""
    words = _words(seeds, positions, stream=0)
    keys: npt.NDArray[np.int64] = (words[0] << _SHIFT | words[1]).view(np.int64)
    return keys


def uniform(seeds: Seeds, positions: Positions, stream: int) -> npt.NDArray[np.float64]:
    """-> float64 [n] in the open interval (0, 1), of 52 random bits: the midpoints are exact.

    Streams (1..2^32 - 1) are independent of one another: random gates have 1.
    """
    words = _words(seeds, positions, stream)
    bits = (words[0] << np.uint64(20)) ^ (words[1] >> np.uint64(12))
    draws: npt.NDArray[np.float64] = (bits.astype(np.float64) + 0.5) * 2.0**-52
    return draws


def derive(seed: int, index: int) -> int:
    """The seed of sample `index` (n > 1) of a request: independent streams from one seed. Sample 0 keeps the seed."""
    if index == 0:
        return seed
    s = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    one = np.ones_like(s)
    words = philox(np.stack([one * np.uint64(index), one, one, one]), np.stack([s & _LOW, s >> _SHIFT]))
    return int(words[0][0] << _SHIFT | words[1][0])
