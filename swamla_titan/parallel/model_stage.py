"""One stage of a pipeline: the model without the layers of other stages."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from swamla_titan.config import Config
from swamla_titan.distributed.mesh import World
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import PreparedLookUp
from swamla_titan.parallel.balance import stage_layers
from swamla_titan.parallel.look_ahead import Inputs
from swamla_titan.parallel.schedules import stage_count, stages_of_rank


class ModelStage(SWAMLAModel):
    """The model without what other stages hold; the remaining modules keep their names in the full model.

    The first stage has the embedding, the last the final norm and the head, each some consecutive blocks. Created on
    the meta device; `to_empty` and `init_weights(seed)` give it the values that the full model would have. With tied
    embeddings the first stage's `embedding.weight` and the last one's `head.weight` start equal; parallel/pipeline.py
    keeps them so.
    """

    def __init__(self, config: ModelConfig, stage: int, layers: Sequence[range], seq_len: int) -> None:
        """`layers` are those of every stage, `seq_len` the tokens of a sequence.

        The length is an argument and not read off the inputs, because under context or sequence parallelism a rank's
        activations hold a slice of the sequence, and masks and rotations are computed from all of it.
        """
        with torch.device("meta"):
            super().__init__(config)
        self.stage, self.stages = stage, len(layers)
        self.seq_len = seq_len
        self.look_ups: Iterator[Inputs] = iter(())  # of the micro-batches of a step, in their order
        if not self.is_first:
            del self.embedding
        if not self.is_last:
            del self.norm, self.head
        for name in list(self.blocks):
            if int(name) not in layers[stage]:
                del self.blocks[name]
        for name in list(self.annexes):
            if int(name) not in layers[stage]:
                del self.annexes[name]

    @property
    def is_first(self) -> bool:
        """Whether this stage reads tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage gives logits."""
        return self.stage == self.stages - 1

    def forward(  # type: ignore[override]
        self,
        inputs: Tensor,
        document_ids: Tensor | None = None,
        tokens: Tensor | None = None,
        targets: Tensor | None = None,
        prepared: PreparedLookUp | None = None,
    ) -> Tensor:
        """Tokens [B, T] int64, or the activations [B, T, dim] of the stage before -> activations [B, T, dim], or of the
        last stage logits [B, T, padded vocabulary].

        `document_ids` [B, T] as in SWAMLAModel.forward, the same in every stage, and so are `tokens` and `targets`
        [B, T], for a stage with annexes, and `prepared`, of these tokens. Raises ValueError where it has no tokens, and
        for tensors of a wrong shape or dtype.
        """
        if self.is_first:
            self._check(inputs, None, document_ids)
            if inputs.shape[1] != self.seq_len:
                raise ValueError(f"tokens {tuple(inputs.shape)}: this stage was made for sequences of {self.seq_len}")
        context = self.context(self.seq_len, document_ids, inputs.device)
        if tokens is None and len(self.annexes):
            raise ValueError("a stage with annexes needs the tokens, which its inputs do not show")
        memories = None
        if tokens is not None:
            memories = self.annexes.look_up(tokens, document_ids, self.activation_dtype, targets, prepared)
        x = self.embed(self.sequences.local(inputs)) if self.is_first else inputs
        x = self.run_blocks(x, context, memories)
        return self.head(self.norm(x)) if self.is_last else x


def build_stages(config: Config, world: World) -> list[ModelStage]:
    """The stages that this rank holds, ascending, on the meta device."""
    layers = stage_layers(config.model, config.training.seq_len, stage_count(config.parallel))
    indices = stages_of_rank(config.parallel, world.coordinate("pipeline"))
    return [ModelStage(config.model, index, layers, config.training.seq_len) for index in indices]
