"""Loss and bits per byte on held-out text, shared by all ranks."""

import math

from swamla_titan.data import IGNORED, ValidationSet
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.parallel.model_parts import ParallelModel


class Validator:
    """Holds this rank's share of the held-out sequences and evaluates a model on them.

    Every rank runs equally many micro-batches, so collectives inside the model cannot run apart.
    """

    def __init__(self, held_out: ValidationSet, world: World, local_batch_size: int) -> None:
        self.micro_batches = list(held_out.micro_batches(world.data_rank, world.degrees.data, local_batch_size))
        self.num_targets = int((held_out.targets != IGNORED).sum())
        self.num_bytes = int(held_out.target_bytes.sum())
        if self.num_bytes == 0:
            raise UserError(
                "the validation text is a single token long, so there is nothing to predict: raise "
                "validation.fraction, give a longer validation.path, or set validation.interval = 0"
            )

    def __call__(self, model: ParallelModel) -> dict[str, float]:
        """`val_loss`: mean cross-entropy in nats a target token; `val_bits_per_byte`: the same in bits a byte of text.

        The end-of-text token counts in the loss and adds no bytes.
        """
        nats = model.evaluate(self.micro_batches).item()
        return {
            "val_loss": nats / self.num_targets,
            "val_bits_per_byte": nats / math.log(2) / self.num_bytes,
        }
