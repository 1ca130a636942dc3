"""Orders that depend on seeds alone: a table for few things, and one that is computed place by place for any number."""

from collections.abc import Sequence
from math import isqrt

import numpy as np

_ROUNDS = 6
_BLOCK = 128  # places that are computed together where they are asked for one by one


def permutation(size: int, *seeds: int) -> np.ndarray:
    """A random order of `size` things that depends on `seeds` alone, in every version of numpy.

    It sorts raw bits of a counter-based generator, because numpy promises that these stay the same in later releases,
    and does not promise it of `Generator.permutation`.
    """
    return np.argsort(_bits(size, seeds), kind="stable")


class Shuffle(Sequence[int]):
    """A random order of `size` things that depends on `seeds` alone, and takes no memory: any place can be asked for.

    A Feistel cipher over the numbers below width x height, both near sqrt(size), of which there are hardly more than
    `size`; what it maps to `size` or beyond is mapped again (Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002).
    """

    def __init__(self, size: int, *seeds: int) -> None:
        self._size = size
        self._width = isqrt(max(0, size - 1)) + 1
        self._height = -(-size // self._width)
        self._keys = _bits(_ROUNDS, seeds)
        self._block, self._cached = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: int) -> int:  # type: ignore[override]
        if not 0 <= place < self._size:
            raise IndexError(place)
        block, within = divmod(place, _BLOCK)
        if block != self._block:
            self._cached = self.at(np.arange(block * _BLOCK, min(self._size, (block + 1) * _BLOCK)))
            self._block = block
        return int(self._cached[within])

    def at(self, places: np.ndarray) -> np.ndarray:
        """What stands at each of `places`: int64 [n] -> int64 [n]."""
        found = self._encrypted(places.astype(np.uint64))
        outside = np.flatnonzero(found >= self._size)
        while len(outside):
            again = self._encrypted(found[outside])
            found[outside] = again
            outside = outside[again >= self._size]
        return found.astype(np.int64)

    def _encrypted(self, numbers: np.ndarray) -> np.ndarray:
        """A permutation of the numbers below width x height: uint64 [n] -> uint64 [n]."""
        high, low = np.divmod(numbers, np.uint64(self._width))
        for key in self._keys[: _ROUNDS // 2]:
            high = _shifted(high, low, key, self._height)
            low = _shifted(low, high, ~key, self._width)
        return high * np.uint64(self._width) + low


def _shifted(half: np.ndarray, other: np.ndarray, key: np.uint64, size: int) -> np.ndarray:
    """`half` plus a number that depends on `other`, modulo `size`: uint64 [n]."""
    # The mixing of splitmix64, whose upper 32 bits are scaled to [0, size).
    mixed = other + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    moved = half + (((mixed >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))
    return np.where(moved >= size, moved - np.uint64(size), moved)


def _bits(count: int, seeds: tuple[int, ...]) -> np.ndarray:
    return np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
