"""What a stream passes over because it could not be read: part of its cursor, so that it stays passed over."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

# When in a stream's life something is read: (edition of the corpus, epoch, place in the epoch's order); it only grows.
Moment = tuple[int, int, int]


@dataclass(frozen=True)
class Skip:
    """A stream reads nothing of `file` from document `ordinal` of unit `unit` on, in this epoch and in all later ones.

    `units` that lie before it in the file are still read. It holds from the moment `since`: what the stream had read
    before stays as it was, also for who resumes from a cursor of before. `place` and `reason` are for people.
    """

    stream: int
    file: str
    unit: int
    ordinal: int
    since: Moment
    place: str
    reason: str

    @property
    def key(self) -> tuple[int, str, int, int, Moment]:
        """What is passed over, without the words; two processes may word one fault differently."""
        return self.stream, self.file, self.unit, self.ordinal, self.since

    def to_json(self) -> dict[str, Any]:
        """As it stands in a cursor, which knows its stream."""
        return {name: value for name, value in asdict(self).items() if name != "stream"} | {"since": list(self.since)}


def skips_of(stream: int, cursor: dict[str, Any] | None) -> list[Skip]:
    """The skips in a stream's cursor."""
    found = (cursor or {}).get("skipped", [])
    return [Skip(stream, **(entry | {"since": tuple(entry["since"])})) for entry in found]


def is_skip(value: Any) -> bool:
    """Whether a value from a checkpoint is made as `Skip.to_json` makes them."""
    types = {"file": str, "unit": int, "ordinal": int, "since": list, "place": str, "reason": str}
    return (
        isinstance(value, dict)
        and value.keys() == types.keys()
        and all(type(value[name]) is kind for name, kind in types.items())
        and len(value["since"]) == 3
        and all(type(number) is int for number in value["since"])
    )


def with_skips(cursor: dict[str, Any], skips: Iterable[Skip]) -> dict[str, Any]:
    """A cursor that holds exactly these; the key is absent where there are none."""
    rest = {name: value for name, value in cursor.items() if name != "skipped"}
    entries = [skip.to_json() for skip in skips]
    return rest | ({"skipped": entries} if entries else {})


def first_skipped(skips: Iterable[Skip], file: str, unit: int, moment: Moment) -> int | None:
    """The ordinal in `unit`, a part of `file` read at `moment`, from which on it is passed over; None: it is not.

    Editions of a corpus number units each in its own way: in another one the stream comes upon the damage by itself.
    """
    cuts = [
        skip
        for skip in skips
        if skip.file == file and skip.unit <= unit and skip.since[0] == moment[0] and skip.since <= moment
    ]
    return min((skip.ordinal if skip.unit == unit else 0 for skip in cuts), default=None)


def added(skips: Iterable[Skip], new: Skip) -> list[Skip]:
    """With a new one, and without those that say no more than it does."""
    cut = (new.unit, new.ordinal)
    kept = [
        skip
        for skip in skips
        if (skip.file, skip.since[0]) != (new.file, new.since[0])
        or (skip.unit, skip.ordinal) < cut
        or skip.since > new.since
    ]
    return [*kept, new]
