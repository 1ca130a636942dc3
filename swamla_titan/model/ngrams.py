"""Hashes of n-grams: which row of which table a token looks up (arXiv:2601.07372).

The n-gram that ends at a token of a document is its n last tokens, as ids of the compressed vocabulary
(data/compression.py); before the document's first token lies the pad id. With an odd multiplier for each of its
positions, its hash is

    (id[t] * m[0]) XOR (id[t - 1] * m[1]) XOR ... XOR (id[t - n + 1] * m[n - 1])  modulo a prime.

The tables of a layer have different primes, so they differ in what collides; its orders share the multipliers.
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, count

import torch
import torch.nn.functional as F
from torch import Tensor

# For numbers below 3.3e24 Miller and Rabin's test with these bases is exact (Sorenson and Webster, arXiv:1509.00864).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


@dataclass(frozen=True)
class NgramHash:
    """The hashes of a layer: `primes[i]` are those of the tables of `orders[i]`.

    The tables lie in one storage, the first order's heads first.
    """

    orders: tuple[int, ...]
    multipliers: tuple[int, ...]
    primes: tuple[tuple[int, ...], ...]
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rows(self) -> int:
        """Of all tables."""
        return sum(map(sum, self.primes))

    def indices(self, ids: Tensor, positions: Tensor, pad: int) -> Tensor:
        """Compressed ids [B, T] and positions in documents [B or 1, T] -> rows of the storage, [B, T, tables] int64.

        Ids, of which `pad` is one, are at most what the multipliers were drawn for: so no multiple exceeds int64, and
        none is negative. The host does not wait for the device.
        """
        mixed, of_order = ids * self.multipliers[0], []
        for lag in range(1, self.orders[-1]):
            earlier = torch.where(positions >= lag, F.pad(ids, (lag, 0))[:, :-lag], pad)
            mixed = mixed ^ (earlier * self.multipliers[lag])
            if lag + 1 in self.orders:
                of_order.append(mixed)
        primes, offsets = self._tensors(ids.device)
        return (torch.stack(of_order, dim=-1)[..., None] % primes + offsets).flatten(-2)

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Primes and offsets, [orders, heads]; copied to a device once, because a copy may wait for the device."""
        if device not in self._on_device:
            primes = torch.tensor(self.primes)
            offsets = (primes.flatten().cumsum(0) - primes.flatten()).view_as(primes)
            self._on_device[device] = primes.to(device), offsets.to(device)
        return self._on_device[device]


@functools.lru_cache
def ngram_hashes(
    layers: tuple[int, ...], orders: tuple[int, ...], heads: int, table_size: int, seed: int, largest_id: int
) -> dict[int, NgramHash]:
    """The hash of each layer: a function of its arguments alone, the same on every rank and machine.

    `largest_id`: of those that are multiplied.
    """
    primes = primes_from(table_size)
    return {
        layer: NgramHash(
            orders,
            tuple(_multiplier(seed, layer, lag, largest_id) for lag in range(orders[-1])),
            tuple(tuple(next(primes) for _ in range(heads)) for _ in orders),
        )
        for layer in layers
    }


def _multiplier(seed: int, layer: int, lag: int, largest_id: int) -> int:
    """An odd number that, times `largest_id`, still is an int64."""
    digest = hashlib.sha256(f"n-gram/{seed}/{layer}/{lag}".encode()).digest()
    odd_numbers = (2**63 - 1) // max(largest_id, 1) // 2
    return 2 * (int.from_bytes(digest[:16], "little") % odd_numbers) + 1


def primes_from(smallest: int) -> Iterator[int]:
    """The primes from `smallest` on."""
    return (number for number in count(smallest) if _is_prime(number))


def _is_prime(number: int) -> bool:
    if number < 2 or any(number % base == 0 for base in _BASES):
        return number in _BASES
    halvings = ((number - 1) & -(number - 1)).bit_length() - 1
    return not any(_shows_composite(number, base, halvings) for base in _BASES)


def _shows_composite(number: int, base: int, halvings: int) -> bool:
    power = pow(base, (number - 1) >> halvings, number)
    squares = accumulate(range(halvings - 1), lambda square, _: square * square % number, initial=power)
    return power != 1 and number - 1 not in squares
