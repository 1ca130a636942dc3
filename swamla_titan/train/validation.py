"""Loss and bits per byte on held-out text, shared by all ranks."""

import math

import torch

from swamla_titan.data import ValidationSet, micro_batches
from swamla_titan.model import SWAMLAModel
from swamla_titan.parallel.world import World, sum_over_ranks


class Validator:
    """Holds this rank's share of the held-out sequences and evaluates a model on them.

    Every rank runs equally many micro-batches, so collectives inside the model cannot run apart.
    """

    def __init__(self, held_out: ValidationSet, world: World, local_batch_size: int) -> None:
        self.world = world
        mine, count = held_out.share(world.rank, world.size, local_batch_size)
        self.micro_batches = micro_batches(mine, local_batch_size, count)
        self.num_targets = held_out.num_targets
        self.num_bytes = held_out.num_bytes

    @torch.no_grad()
    def __call__(self, model: SWAMLAModel) -> dict[str, float]:
        """`val_loss`: mean cross-entropy in nats a target token; `val_bits_per_byte`: the same in bits a byte of text.

        The end-of-text token counts in the loss and adds no bytes.
        """
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for batch in self.micro_batches:
            batch = batch.to(self.world.device)
            total += model(batch.tokens, batch.targets, batch.document_ids, loss_denominator=1)
        model.train()
        nats = sum_over_ranks(total).item()
        return {
            "val_loss": nats / self.num_targets,
            "val_bits_per_byte": nats / math.log(2) / self.num_bytes,
        }
