"""Exclusions: the job's list of data that could not be read and is skipped; checkpoints hold it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from swamla_titan.system.bounded import Count, fit

# When a stream reads something: (edition of the corpus, epoch, index in the epoch's order); it only grows.
Moment = tuple[int, int, int]


@dataclass(frozen=True)
class Exclusion:
    """Stream `stream` reads nothing of `file` from document `ordinal` of unit `unit` on, in this and in later epochs.

    Units before it in the file are still read. An exclusion applies from the moment (`edition`, `epoch`, `item`) on, so
    what the stream read before that does not change, even if a run resumes from an earlier cursor and has the list
    already. Each stream finds the damage by itself, at a moment of its own order. So the order of the data does not
    depend on which rank or worker reads which streams, or how far ahead.

    `place` and `reason` are for messages.
    """

    stream: Count
    file: str
    unit: Count
    ordinal: Count
    edition: Count
    epoch: Count
    item: Count
    place: str
    reason: str

    @property
    def since(self) -> Moment:
        return self.edition, self.epoch, self.item

    @property
    def key(self) -> tuple[int, str, int, int, Moment]:
        """Identifies the exclusion without `place` and `reason`, which two processes may word differently."""
        return self.stream, self.file, self.unit, self.ordinal, self.since


def first_excluded(exclusions: Iterable[Exclusion], file: str, unit: int, moment: Moment) -> int | None:
    """The first document (ordinal) of `unit`, a part of `file`, that a stream excludes at `moment`; None: it reads all.

    `exclusions` are those of the stream. Each edition of a corpus numbers units in its own way, so in another edition
    the stream finds the damage again.
    """
    ordinals = [
        each.ordinal if each.unit == unit else 0
        for each in exclusions
        if each.file == file and each.unit <= unit and each.edition == moment[0] and each.since <= moment
    ]
    return min(ordinals, default=None)


def taken_from_cursors(cursors: dict[int, dict[str, Any]]) -> list[Exclusion]:
    """Move the exclusions out of the cursors of a checkpoint before 0.2, where each stream's cursor held its own.

    Raises ValueError for what such a checkpoint does not hold.
    """
    found = []
    for stream, cursor in sorted(cursors.items()):
        for entry in fit(list[dict[str, Any]], cursor.pop("skipped", []), "skipped"):
            edition, epoch, item = fit(list[Count], entry.pop("since", None), "since")
            moment = {"edition": edition, "epoch": epoch, "item": item}
            found.append(fit(Exclusion, {"stream": stream} | entry | moment, "skipped"))
    return found
