"""Prepares the look-ups of each micro-batch while the one before it is computed."""

from collections.abc import Iterable, Iterator

from swamla_titan.data.batches import MicroBatch
from swamla_titan.model.annexes import ModelAnnexes, PreparedLookUp


def look_ups_ahead(
    annexes: ModelAnnexes, micro_batches: Iterable[MicroBatch]
) -> Iterator[tuple[MicroBatch, PreparedLookUp | None]]:
    """Each micro-batch with what `annexes.prepare` gives for it, prepared before the one before it is given.

    `micro_batches` are on the device, or are copied there as they are iterated over, which is within `placement.ahead`.
    So what computes them must wait for nothing that is queued, or have been waited for. Rows of tables on the host are
    read ahead too. Collective where ranks share tables.
    """
    placement, source = annexes.placement, iter(micro_batches)

    def prepared() -> tuple[MicroBatch, PreparedLookUp | None] | None:
        with placement.ahead():
            batch = next(source, None)
            return None if batch is None else (batch, annexes.prepare(batch.tokens, batch.document_ids))

    following = prepared()
    while following is not None:
        batch, look_up = following
        tensors = [each for each in (batch.tokens, batch.targets, batch.document_ids) if each is not None]
        if look_up is not None:
            # Known before the next is prepared, behind which they would have to wait.
            tensors += [look_up.context.positions, *look_up.request.rows()]
            with placement.ahead():
                tensors += look_up.request.read_ahead(annexes.tables)
        placement.hand_over(tensors)
        following = prepared()
        yield batch, look_up
