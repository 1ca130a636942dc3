"""Random orders that stay the same for ever."""

import numpy as np


def permutation(size: int, *seeds: int) -> np.ndarray:
    """A random order of `size` things that depends on the numbers `seeds` alone.

    Made of raw bits of a counter-based generator: unlike `Generator.permutation`, those are promised to stay the
    same in later releases of numpy.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(seeds)).random_raw(size), kind="stable")
