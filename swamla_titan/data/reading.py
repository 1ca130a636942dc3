"""A source read from its beginning, as the checks at the start, the token count and validation do."""

from collections.abc import Iterator

from swamla_titan.data.document import Document, Source
from swamla_titan.data.faults import DataFault, Fault
from swamla_titan.data.patience import Patience, read_on


def documents_by_unit(
    source: Source, patience: Patience, faults: list[Fault] | None = None
) -> Iterator[tuple[int, Document]]:
    """Every document of a source with the number of its unit, in the source's order.

    With `faults`, a damaged file is left out from the damage on and its fault added there; else the fault is raised. So
    is that of a file which merely does not answer.
    """
    damaged = ""
    for unit in range(source.num_units):
        if source.file_of(unit) == damaged:
            continue
        try:
            for document in read_on(source, unit, None, 1, 0, patience):
                yield unit, document
        except DataFault as fault:
            if faults is None:
                raise
            faults.append(fault)
            damaged = source.file_of(unit)


def all_documents(
    source: Source, patience: Patience | None = None, faults: list[Fault] | None = None
) -> Iterator[Document]:
    """Every document of a source, as `documents_by_unit` gives them."""
    for _, document in documents_by_unit(source, patience or Patience(), faults):
        yield document
