"""Text for tests: made up, and the same bytes under every Python, on every processor, in every year.

A chain of words by a generator of integers. No float and no `random` takes part: nothing is rounded, and nothing
depends on how a version of Python draws. Rank r of the vocabulary is about 1/r as frequent as the first, and three
words of four are one of the four that most often follow the word before, so that there is something to learn.
"""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

_MASK = (1 << 64) - 1
_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiouyéü"  # the last two are of two bytes each
_WORDS = 400
_FOLLOWERS = 4


def _integers(seed: int) -> Iterator[int]:
    """Splitmix64: 64 even bits a time."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        yield mixed ^ (mixed >> 31)


def _word(integers: Iterator[int]) -> str:
    """Of one to four syllables."""
    syllables = 1 + next(integers) % 4
    return "".join(
        _CONSONANTS[next(integers) % len(_CONSONANTS)] + _VOWELS[next(integers) % len(_VOWELS)]
        for _ in range(syllables)
    )


@functools.cache
def documents(count: int = 100, seed: int = 0) -> tuple[str, ...]:
    """Documents of 20 to 700 words, most of them sentences of some ten: 100 are about 200 kB."""
    integers = _integers(seed)
    words = [_word(integers) for _ in range(_WORDS)]
    sums = list(itertools.accumulate(1_000_000 // rank for rank in range(1, _WORDS + 1)))

    def draw() -> int:
        return bisect_right(sums, next(integers) % sums[-1])

    followers = [[draw() for _ in range(_FOLLOWERS)] for _ in words]

    def document() -> str:
        text, word = [], draw()
        for _ in range(20 + next(integers) % 681):
            choice = next(integers)
            word = followers[word][choice // 4 % _FOLLOWERS] if choice % 4 else draw()
            text.append(words[word] + (".\n" if choice >> 32 & 15 == 0 else " "))
        return "".join(text)

    return tuple(document() for _ in range(count))


def write_text(folder: Path, count: int = 100, seed: int = 0) -> Path:
    """Each document as a file of its own in `folder`; the folder again."""
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(documents(count, seed)):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder
