"""Prepares the look-ups of each micro-batch while the one before it is computed."""

from collections.abc import Iterable, Iterator

from swamla_titan.data.batches import MicroBatch
from swamla_titan.model.annexes import ModelAnnexes, PreparedLookUp

Inputs = tuple[MicroBatch, PreparedLookUp | None]
"""A micro-batch on the device, and which rows the annexes look up for it; None without annexes."""


def look_ups_ahead(annexes: ModelAnnexes, micro_batches: Iterable[MicroBatch]) -> Iterator[Inputs]:
    """Each micro-batch with its look-up, which is prepared before the micro-batch before it is given; the first, now.

    `micro_batches` are on the device, or are copied there when they are taken, which is within `placement.ahead`: so
    the device must not still compute them. Rows of tables on the host are read ahead too. Where ranks share tables this
    is collective, and each `next` is.
    """
    placement, source = annexes.placement, iter(micro_batches)

    def prepared() -> Inputs | None:
        with placement.ahead():
            batch = next(source, None)
            return None if batch is None else (batch, annexes.prepare(batch.tokens, batch.document_ids))

    def given(inputs: Inputs | None) -> Iterator[Inputs]:
        while inputs is not None:
            batch, look_up = inputs
            tensors = [each for each in (batch.tokens, batch.targets, batch.document_ids) if each is not None]
            if look_up is not None:
                # Known before the next is prepared, behind which they would have to wait.
                tensors += [look_up.context.positions, *look_up.request.rows()]
                with placement.ahead():
                    tensors += look_up.request.read_ahead(annexes.tables)
            placement.hand_over(tensors)
            following = prepared()
            yield inputs
            inputs = following

    return given(prepared())
