"""What a run excludes from its data because it could not be read: one list of the job, which its checkpoints hold."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from swamla_titan.system.bounded import Count, fit

# When in a stream's life something is read: (edition of the corpus, epoch, place in the epoch's order); it only grows.
Moment = tuple[int, int, int]


@dataclass(frozen=True)
class Exclusion:
    """Stream `stream` reads nothing of `file` from document `ordinal` of unit `unit` on, in this and in later epochs.

    Units that lie before it in the file are still read. It holds from the moment (`edition`, `epoch`, `item`) on: what
    the stream had read before stays as it was, also for a run that resumes from a cursor before that moment. So the
    list may be ahead of a cursor. Each stream finds the damage by itself, at a place in its own order, and so the order
    of the data does not depend on which rank or worker reads which streams, or how far ahead.

    `place` and `reason` are for people.
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
        """What is excluded, without the words, because two processes may word one fault differently."""
        return self.stream, self.file, self.unit, self.ordinal, self.since


def first_excluded(exclusions: Iterable[Exclusion], file: str, unit: int, moment: Moment) -> int | None:
    """The ordinal in `unit`, a part of `file` read at `moment`, from which on a stream excludes it; None: it does not.

    `exclusions` are those of the stream. Editions of a corpus number units each in its own way, so in another one the
    stream finds the damage by itself.
    """
    ordinals = [
        each.ordinal if each.unit == unit else 0
        for each in exclusions
        if each.file == file and each.unit <= unit and each.edition == moment[0] and each.since <= moment
    ]
    return min(ordinals, default=None)


def taken_from_cursors(cursors: dict[int, dict[str, Any]]) -> list[Exclusion]:
    """Remove the exclusions from the cursors of checkpoints before 0.2, where each stream's cursor held its own.

    Raises ValueError for what such a checkpoint does not hold.
    """
    found = []
    for stream, cursor in sorted(cursors.items()):
        for entry in fit(list[dict[str, Any]], cursor.pop("skipped", []), "skipped"):
            edition, epoch, item = fit(list[Count], entry.pop("since", None), "since")
            moment = {"edition": edition, "epoch": epoch, "item": item}
            found.append(fit(Exclusion, {"stream": stream} | entry | moment, "skipped"))
    return found
