"""Pipeline parallelism: a rank's stages of the model, and a step's micro-batches through all stages.

torch.distributed.pipelining orders the passes and sends activations and gradients; this module gives it the stages,
their shapes and the loss. stages.py says where the model is cut, and which rank holds what. All losses are sums over
the global batch's count, so gradients add up without scaling.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class

from swamla_titan.config import Config
from swamla_titan.config.schedule import Schedule
from swamla_titan.data.batches import IGNORED, MicroBatch
from swamla_titan.distributed.dtensor import free_gathered_weights, local
from swamla_titan.distributed.mesh import World
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import PreparedLookUp, annexes_of
from swamla_titan.model.row_table import LocalRows, RowTable, placeholder_gradients, row_tables
from swamla_titan.parallel.row_tables import Inputs, look_ups_ahead
from swamla_titan.parallel.stages import (
    StageCost,
    rank_of_stage,
    runnable_micro_batches,
    stage_costs,
    stage_count,
    stages_of_rank,
)


class ModelStage(SWAMLAModel):
    """The model without what other stages hold; the remaining modules keep their names in the full model.

    The first stage has the embedding, the last the final norm and the head, and each has consecutive blocks. Created on
    the meta device; `to_empty` and `init_weights(seed)` give it the values that the full model would have. With tied
    embeddings the first stage's `embedding.weight` and the last one's `head.weight` start equal; `TiedEmbedding` keeps
    them so.
    """

    def __init__(self, config: ModelConfig, stage: int, layers: Sequence[range], shares: int = 1) -> None:
        """`layers` are those of every stage.

        `shares`: of how many ranks each holds a slice of a sequence's activations, under context and sequence
        parallelism; masks and rotations are computed for the full sequence.
        """
        with torch.device("meta"):
            super().__init__(config)
        self.stage, self.stages = stage, len(layers)
        self.shares = shares
        self.look_ups: Iterator[Inputs] = iter(())  # of the micro-batches of a step, in their order
        if not self.is_first:
            del self.embedding
        if not self.is_last:
            del self.norm, self.head
        for of_layers in (self.blocks, self.annexes):
            for name in list(of_layers):
                if int(name) not in layers[stage]:
                    del of_layers[name]

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
        seq_len = inputs.shape[1] * (1 if self.is_first else self.shares)
        context = self.context(seq_len, document_ids, inputs.device)
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
    layers = [cost.layers for cost in costs_of_stages(Schedule.of(config))]
    shares = world.degrees.context * world.degrees.tensor
    indices = stages_of_rank(config.parallel, world.coordinate("pipeline"))
    return [ModelStage(config.model, index, layers, shares) for index in indices]


def costs_of_stages(schedule: Schedule) -> list[StageCost]:
    """The cut of the model into pipeline stages: that for the longest sequences, because layers stay where they are."""
    config = schedule.longest.config
    return stage_costs(config.model, config.training.seq_len, stage_count(config.parallel))


class Pipeline:
    """This rank's stages, connected to those of the other pipeline ranks.

    All ranks of a pipeline (those that differ in their pipeline coordinate alone) must be given the same micro-batches.
    The constructor is collective over all processes.
    """

    def __init__(self, config: Config, world: World, stages: list[ModelStage]) -> None:
        """`stages` from `build_stages`, with values, after `parallelize` (FSDP2 wraps each stage by itself)."""
        assert world.degrees.pipeline == config.parallel.pipeline > 1
        self.stages = stages
        self._parallel = config.parallel
        self._world = world
        self._group = world.group("pipeline")
        self._dim = config.model.dim
        self._has_annexes = bool(annexes_of(config.model))
        self._logits = config.model.padded_vocab_size // world.degrees.tensor  # of a token
        self._first = next((stage for stage in stages if stage.is_first), None)
        self._last = next((stage for stage in stages if stage.is_last), None)
        self._dtype = stages[0].activation_dtype
        self._schedules: dict[tuple[int, int, int], PipelineScheduleSingle | PipelineScheduleMulti] = {}
        self._loss_denominator: Tensor | float = 1.0
        self._tied: TiedEmbedding | None = None
        if config.model.tie_embeddings:
            last_holder = rank_of_stage(config.parallel, stage_count(config.parallel) - 1)
            self._tied = TiedEmbedding(world, stages, last_holder)

    @property
    def tied_copy(self) -> Tensor | None:
        """The parameter of this rank that is a copy of another (a tied head) and has the same gradient, or None.

        A gradient norm over all stages must leave it out.
        """
        return None if self._tied is None else self._tied.copy

    def train_step(self, micro_batches: list[MicroBatch], loss_denominator: Tensor | float) -> Tensor:
        """Add the gradients of the micro-batches to every stage's; returns the sum of their losses, on every rank.

        The micro-batches have one shape, are at least one, and on any device, which must not still compute them. The
        losses are sums over valid targets divided by `loss_denominator`. Gradients of tied weights are summed when it
        returns. Where the schedule cannot run that many micro-batches, empty ones follow, which add 0 to the loss and
        the gradients.
        """
        size, seq_len = micro_batches[0].tokens.shape
        count = runnable_micro_batches(self._parallel, len(micro_batches))
        placement = next((stage.annexes.placement for stage in self.stages if len(stage.annexes)), LocalRows())
        with placement.ahead():
            batches = [batch.to(self._world.device) for batch in micro_batches]
            batches += [_empty(batches[0])] * (count - len(batches))
            tokens = (torch.cat([batch.tokens for batch in batches]),) if self._first else ()
            targets = torch.cat([batch.targets for batch in batches]) if self._last else None
            of_batches = [self._of_all_stages(batch) for batch in batches]
            options: dict[str, Any] = {name: torch.cat([each[name] for each in of_batches]) for name in of_batches[0]}
        placement.hand_over([*tokens, *options.values(), *([] if targets is None else [targets])])
        self._loss_denominator = loss_denominator
        for stage in self.stages:
            stage.look_ups = look_ups_ahead(stage.annexes, _split(batches, options))
        losses: list[Tensor] = []
        try:
            self.schedule(count, size, seq_len).step(
                *tokens, target=targets, losses=losses, return_outputs=False, **options
            )
        finally:
            for stage in self.stages:
                stage.look_ups = iter(())  # the last one keeps memory
        if self._tied is not None:
            self._tied.reduce()
        return self._from_last_stage(torch.stack([loss.detach() for loss in losses]).sum() if losses else None)

    @torch.no_grad()
    def evaluate(
        self,
        micro_batches: Sequence[MicroBatch],
        of_logits: Callable[[ModelStage, Tensor, MicroBatch], Tensor] | None = None,
        shape_of: Callable[[MicroBatch], tuple[int, ...]] = lambda batch: (),
    ) -> Iterator[Tensor]:
        """The loss of each micro-batch in evaluation mode, on every rank: a sum over its valid targets.

        `of_logits`: instead of the loss, what the last stage makes of its output; `shape_of`: this result's shape, in
        float32 or wider. Forward only, one micro-batch at a time through all stages; each stage prepares the look-ups
        of the next one meanwhile. Weights that FSDP2 gathered are freed again.
        """
        of_stages = [
            look_ups_ahead(stage.annexes, (batch.to(self._world.device) for batch in micro_batches))
            for stage in self.stages
        ]
        for inputs in zip(*of_stages):
            result = self._through_all_stages(inputs, of_logits or _loss_of)
            yield self._from_last_stage(result, shape_of(inputs[0][0]))

    def _through_all_stages(
        self, inputs: Sequence[Inputs], of_logits: Callable[[ModelStage, Tensor, MicroBatch], Tensor]
    ) -> Tensor | None:
        """The result of a micro-batch, of which each stage of this rank has a copy and its look-up in `inputs`.

        None on ranks that do not hold the last stage.
        """
        mine = {stage.stage for stage in self.stages}
        result, x = None, inputs[0][0].tokens
        for stage, (batch, prepared) in zip(self.stages, inputs, strict=True):
            number = stage.stage
            was_training = stage.training
            stage.eval()
            if number > 0 and number - 1 not in mine:
                size, seq_len = batch.tokens.shape
                shape = size, seq_len // stage.shares, self._dim
                x = torch.empty(shape, dtype=self._dtype, device=self._world.device)
                dist.recv(x, group=self._group, group_src=rank_of_stage(self._parallel, number - 1))
            x = stage(x, **self._of_all_stages(batch), prepared=prepared)
            if stage.is_last:
                result = of_logits(stage, x, batch)
            elif number + 1 not in mine:
                dist.send(x.contiguous(), group=self._group, group_dst=rank_of_stage(self._parallel, number + 1))
            stage.train(was_training)
            free_gathered_weights(stage)
        return result

    def _of_all_stages(self, batch: MicroBatch) -> dict[str, Tensor]:
        """What every stage is given of a micro-batch beside its input."""
        found = {"tokens": batch.tokens, "targets": batch.targets} if self._has_annexes else {}
        return found if batch.document_ids is None else {"document_ids": batch.document_ids, **found}

    def _from_last_stage(self, result: Tensor | None, shape: tuple[int, ...] = ()) -> Tensor:
        """Broadcast the result of the rank that has one, a loss by default; the others are given None."""
        if result is None:
            dtype = torch.promote_types(self._dtype, torch.float32)
            result = torch.zeros(shape, dtype=dtype, device=self._world.device)
        dist.all_reduce(result, group=self._group)
        return result

    def forget_schedules(self) -> None:
        """Free the buffers of all schedules, because the next step has other shapes."""
        self._schedules.clear()

    def schedule(
        self, count: int, micro_batch_size: int, seq_len: int
    ) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """Torch's schedule of `count` micro-batches of this many sequences, kept for the next step that has as many.

        Each has a buffer to receive into for every micro-batch and each neighbour of each stage, and there are two of
        them where the global batch does not divide (`plan` says "8 or 9 micro-batches"). For `base` in bfloat16,
        pipeline 4, 4 sequences of 2048 tokens, a buffer is 24 MiB, and on a rank in the middle 8 micro-batches take
        384 MiB by 1F1B, and 768 MiB by schedules of two stages a rank; a second schedule, for 9, as much again and an
        eighth. That is kept because the alternatives cost more: an empty micro-batch in every smaller step takes a
        ninth of its time, and to build schedules again costs the host time, and communication, at each change.
        """
        shape = count, micro_batch_size, seq_len
        if shape not in self._schedules:
            kind = get_schedule_class(self._parallel.pipeline_schedule)
            stages = [self._torch_stage(stage, micro_batch_size, seq_len) for stage in self.stages]
            what = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
            schedule = kind(what, count, loss_fn=self._loss, scale_grads=False)
            self._schedules[shape] = schedule
        return self._schedules[shape]

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        assert self._last is not None
        return self._last.loss(logits, targets, self._loss_denominator)

    def _torch_stage(self, stage: ModelStage, micro_batch_size: int, seq_len: int) -> PipelineStage:
        # Given both shapes, torch needs no trial run to find them, which would draw random numbers and compile early.
        def meta(*shape: int, dtype: torch.dtype = self._dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

        activations = meta(micro_batch_size, seq_len // stage.shares, self._dim)
        tokens = meta(micro_batch_size, seq_len, dtype=torch.int64)
        logits = meta(micro_batch_size, seq_len // self._world.degrees.context, self._logits)
        return _Stage(
            stage,
            stage.stage,
            stage.stages,
            self._world.device,
            input_args=tokens if stage.is_first else activations,
            output_args=logits if stage.is_last else activations,
            group=self._group,
        )


def _loss_of(stage: ModelStage, logits: Tensor, batch: MicroBatch) -> Tensor:
    return stage.loss(logits, batch.targets, 1.0)


class TiedEmbedding:
    """Keeps `embedding.weight` of the first stage and `head.weight` of the last equal: two copies of one weight.

    The full model's gradient is the sum of the two. With that sum on both and equal initial values, an optimizer whose
    update of an element depends on that parameter's own history alone keeps them bit-identical.
    """

    def __init__(self, world: World, stages: list[ModelStage], last_holder: int) -> None:
        """`stages` are this rank's; pipeline rank 0 holds the first of all, and rank `last_holder` the last.

        Collective, because it creates groups.
        """
        self._embedding = next((stage for stage in stages if stage.is_first), None)
        self._head = next((stage for stage in stages if stage.is_last), None)
        self._group: dist.ProcessGroup | None = None
        if last_holder != 0:
            assert world.weights is not None
            pipelines = world.weights.mesh.flatten(1).T.tolist()  # each: the ranks that differ in their stages alone
            pairs = [[ranks[0], ranks[last_holder]] for ranks in pipelines]
            self._group, _ = dist.new_subgroups_by_enumeration(pairs)
        self._compared = False

    @property
    def copy(self) -> Tensor | None:
        """The head's weight, where this rank holds it; a sum over all parameters must leave it out."""
        return None if self._head is None else self._head.head.weight

    @torch.no_grad()
    def reduce(self) -> None:
        """All-reduce the two gradients; after the backward passes, once a step. Waits for the other rank."""
        ours = [weight.grad for weight in self._weights()]
        if not ours:
            return
        assert all(grad is not None for grad in ours), "both copies have a gradient in every step"
        held = [local(grad) for grad in ours if grad is not None]
        if len(held) == 2:
            held[0] += held[1]
            held[1].copy_(held[0])
            return
        if not self._compared:
            self._require_same_shards(held[0])
        dist.all_reduce(held[0], group=self._group)

    def _weights(self) -> list[Tensor]:
        found = [] if self._embedding is None else [self._embedding.embedding.weight]
        return found if self._head is None else [*found, self._head.head.weight]

    def _require_same_shards(self, held: Tensor) -> None:
        # A sum of differently sharded weights would be silently wrong, so the two ranks compare what they hold, once.
        mine = (tuple(held.shape), str(held.dtype), [getattr(w, "placements", None) for w in self._weights()])
        both: list[object] = [None, None]
        dist.all_gather_object(both, mine, group=self._group)
        assert both[0] == both[1], f"embedding and head are sharded differently: {both[0]}, {both[1]}"
        self._compared = True


class _Stage(PipelineStage):
    """Consecutive stages of one rank (the turning point of a V schedule) pass tensors on without sending them."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 opens connections to both neighbours, but gloo has none from a rank to itself.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def forward_maybe_with_nosync(self, *inputs: Any, **options: Any) -> Any:
        _, prepared = next(cast(ModelStage, self.submod).look_ups)
        return super().forward_maybe_with_nosync(*inputs, **options, prepared=prepared)

    @functools.cached_property
    def _tables(self) -> list[RowTable]:
        return list(row_tables(self.submod).values())

    def backward_maybe_with_nosync(self, backward_type: str, *arguments: Any, **options: Any) -> Any:
        if backward_type != "weight" or not self._tables:
            return super().backward_maybe_with_nosync(backward_type, *arguments, **options)
        with placeholder_gradients(self._tables):
            return super().backward_maybe_with_nosync(backward_type, *arguments, **options)


def _split(batches: list[MicroBatch], options: dict[str, Any]) -> Iterator[MicroBatch]:
    """The micro-batches, of the tensors that torch gives the stages: slices of `options`."""
    parts = {name: option.tensor_split(len(batches)) for name, option in options.items()}
    for index, batch in enumerate(batches):
        yield replace(batch, **{name: part[index] for name, part in parts.items()})


def _empty(like: MicroBatch) -> MicroBatch:
    """A micro-batch of the same shape without targets."""
    ids = None if like.document_ids is None else torch.zeros_like(like.document_ids)
    return MicroBatch(torch.zeros_like(like.tokens), torch.full_like(like.targets, IGNORED), ids, 0)
