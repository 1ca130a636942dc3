"""Loss and bits per byte on held-out text, which all ranks share."""

import math
from contextlib import nullcontext

from swamla_titan.data import IGNORED, ValidationSet
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.optim import AveragedWeights
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.train.policy import Values


class Validator:
    """Holds this rank's share of the held-out sequences and evaluates a model on them.

    Every rank runs the same number of micro-batches, so that collectives inside the model match.
    """

    def __init__(self, held_out: ValidationSet, world: World, micro_batch_size: int) -> None:
        """Raises UserError where there is nothing to predict."""
        self.micro_batches = list(held_out.micro_batches(world.data_rank, world.degrees.data, micro_batch_size))
        self.num_targets = int((held_out.targets != IGNORED).sum())
        self.num_bytes = int(held_out.target_bytes.sum())
        if self.num_bytes == 0:
            raise UserError(
                "the validation text is a single token long, so there is nothing to predict: raise "
                "validation.fraction, give a longer validation.path, or set validation.interval = 0"
            )

    def __call__(self, model: ParallelModel, average: AveragedWeights | None = None) -> Values:
        """`val_loss`: mean cross-entropy in nats a target token; `val_bits_per_byte`: the same in bits a byte of text.

        The end-of-text token counts in the loss and adds no bytes. With `average` the model computes with its weights.
        """
        with average.in_place_of_weights() if average else nullcontext():
            nats = model.evaluate(self.micro_batches).item()
        return {
            "val_loss": nats / self.num_targets,
            "val_bits_per_byte": nats / math.log(2) / self.num_bytes,
        }


def validation_line(values: Values, is_of_average: bool) -> str:
    """The console's line for a validation."""
    of = "validation of the average" if is_of_average else "validation"
    return f"{of}: loss {values['val_loss']:.4f}, {values['val_bits_per_byte']:.4f} bits per byte"
