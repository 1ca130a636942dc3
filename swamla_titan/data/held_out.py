"""Which documents are held out of training: a property of a document's text alone."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from swamla_titan.data.document import Document
from swamla_titan.errors import UserError

# A corpus that ends within both limits is small: it is read whole at start-up and its share held out is exact.
SMALL_DOCUMENTS = 2048
SMALL_CHARS = 64 << 20


@dataclass(frozen=True)
class HeldOut:
    """Documents whose hash lies below `threshold` (0 holds out none), and those of the hashes `exact`.

    By text, not by place: copies of a document all fall on the same side, and a file that is moved or cut
    differently changes nothing.
    """

    threshold: int
    exact: frozenset[int] = frozenset()

    def __contains__(self, document: Document) -> bool:
        if not self.threshold and not self.exact:
            return False
        number = text_hash(document.text)
        return number < self.threshold or number in self.exact

    @property
    def fingerprint(self) -> int | str:
        if not self.exact:
            return self.threshold
        digest = hashlib.blake2b(repr(sorted(self.exact)).encode(), digest_size=16).hexdigest()
        return f"{self.threshold} {digest}"


def text_hash(text: str) -> int:
    """A number in [0, 2**64), the same on every machine and in every run."""
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def choose_held_out(documents: Iterable[Document], fraction: float, separator: str = "") -> HeldOut:
    """The rule for a corpus, `documents` being its texts in order (as many are read as needed).

    In a large corpus a document is held out when its hash falls in the lowest `fraction` of all hashes. In a small
    one that could by chance hold out nothing, or everything; so there the documents with the lowest hashes are
    taken, `fraction` of them, at least one and never all. `separator` is data.text_separator, for a message.
    """
    if fraction == 0:
        return HeldOut(0)
    hashes: set[int] = set()
    chars = 0
    for document in documents:
        if document.is_empty:
            continue
        hashes.add(text_hash(document.text))
        chars += len(document.text)
        if len(hashes) > SMALL_DOCUMENTS or chars > SMALL_CHARS:
            return HeldOut(int(fraction * 2**64))
    if len(hashes) < 2:
        split = "Split it by data.text_separator"
        if separator:
            split = (
                f"data.text_separator = {separator!r} does not divide it; it is taken literally, line ends of Windows "
                r"(\r\n) included, and on a command line a backslash stays one: write $'\n\n' in bash. Correct it"
            )
        raise UserError(
            f"validation.fraction: the training data is a single document, so none can be held out. {split}, or give "
            "validation.path, or set validation.fraction = 0 to train without validation."
        )
    count = max(1, min(len(hashes) - 1, round(fraction * len(hashes))))
    return HeldOut(sorted(hashes)[count - 1] + 1)
