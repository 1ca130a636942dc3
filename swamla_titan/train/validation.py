"""Loss and bits per byte on held-out text, shared by all ranks."""

import math

import torch

from swamla_titan.data import IGNORED, ValidationSet
from swamla_titan.errors import UserError
from swamla_titan.model import SWAMLAModel
from swamla_titan.parallel.world import World, sum_over_ranks


class Validator:
    """Holds this rank's share of the held-out sequences and evaluates a model on them.

    Every rank runs equally many micro-batches, so collectives inside the model cannot run apart.
    """

    def __init__(self, held_out: ValidationSet, world: World, local_batch_size: int) -> None:
        self.world = world
        self.micro_batches = list(held_out.micro_batches(world.rank, world.size, local_batch_size))
        self.num_targets = int((held_out.targets != IGNORED).sum())
        self.num_bytes = int(held_out.target_bytes.sum())
        if self.num_bytes == 0:
            raise UserError(
                "the validation text is a single token long, so there is nothing to predict: raise "
                "validation.fraction, give a longer validation.path, or set validation.interval = 0"
            )

    @torch.no_grad()
    def __call__(self, model: SWAMLAModel) -> dict[str, float]:
        """`val_loss`: mean cross-entropy in nats a target token; `val_bits_per_byte`: the same in bits a byte of text.

        The end-of-text token counts in the loss and adds no bytes.
        """
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for batch in self.micro_batches:
            inputs = batch.to(self.world.device)
            total += model(inputs.tokens, inputs.targets, inputs.document_ids, loss_denominator=1)
        model.train()
        nats = sum_over_ranks(total).item()
        return {
            "val_loss": nats / self.num_targets,
            "val_bits_per_byte": nats / math.log(2) / self.num_bytes,
        }
