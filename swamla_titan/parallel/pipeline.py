"""Pipeline parallelism: a step's micro-batches through the stages, in the order of a schedule of torch's.

torch.distributed.pipelining orders the passes and sends activations and gradients; what it needs to know of the model
is said here. All losses are sums over the global batch's count, so gradients add up and are scaled by nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class

from swamla_titan.config import Config
from swamla_titan.data.batches import IGNORED, MicroBatch
from swamla_titan.distributed.mesh import World
from swamla_titan.parallel.model_stage import ModelStage
from swamla_titan.parallel.stages import holder, runnable_count, stage_count
from swamla_titan.parallel.tied import TiedEmbedding


class Pipeline:
    """This rank's stages, at work with those of the other pipeline ranks.

    All ranks of a pipeline (those that differ in their pipeline coordinate alone) must be given the same micro-batches,
    and all processes must construct it together.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        stages: list[ModelStage],
        *,
        activation_len: int | None = None,
        logits_shape: tuple[int, int] | None = None,
    ) -> None:
        """`stages` from `build_stages`, with values, after all that is applied to them (FSDP2 on each stage itself).

        `activation_len`: tokens of a row in the activations that a rank sends, None: training.seq_len.
        `logits_shape`: (tokens, vocabulary) of a rank's logits, None: (activation_len, padded vocabulary).
        """
        assert world.degrees.pipeline == config.parallel.pipeline > 1
        self.stages = stages
        self._parallel = config.parallel
        self._world = world
        self._group = world.group("pipeline")
        self._dim = config.model.dim
        self._activation_len = activation_len or config.training.seq_len
        self._logits_shape = logits_shape or (self._activation_len, config.model.padded_vocab_size)
        self._first = next((stage for stage in stages if stage.is_rank_0), None)
        self._last = next((stage for stage in stages if stage.is_last), None)
        self._dtype = stages[0].activation_dtype
        self._schedules: dict[tuple[int, int], PipelineScheduleSingle | PipelineScheduleMulti] = {}
        self._loss_denominator: Tensor | float = 1.0
        self._tied: TiedEmbedding | None = None
        if config.model.tie_embeddings:
            last_holder = holder(config.parallel, stage_count(config.parallel) - 1)
            self._tied = TiedEmbedding(world, stages, holder(config.parallel, 0), last_holder)

    @property
    def tied_copy(self) -> Tensor | None:
        """A parameter of this rank that is the copy of another (a tied head); its gradient is that one's too.

        A gradient norm over all stages leaves it out. None where there is none.
        """
        return None if self._tied is None else self._tied.copy

    def train_step(self, micro_batches: list[MicroBatch], loss_denominator: Tensor | float) -> Tensor:
        """Add the gradients of the micro-batches to every stage's; returns the sum of their losses, on every rank.

        The micro-batches are alike in shape, at least one, on any device. The losses are sums over valid targets
        divided by `loss_denominator`. Gradients of tied weights are whole when it returns. Where the schedule cannot
        run that many micro-batches, empty ones follow, which add 0 to the loss and the gradients.
        """
        rows = len(micro_batches[0].tokens)
        count = runnable_count(self._parallel, len(micro_batches))
        batches = [batch.to(self._world.device) for batch in micro_batches]
        batches += [_empty(batches[0])] * (count - len(batches))
        self._loss_denominator = loss_denominator

        tokens = (torch.cat([batch.tokens for batch in batches]),) if self._first else ()
        targets = torch.cat([batch.targets for batch in batches]) if self._last else None
        options: dict[str, Any] = {}
        if batches[0].document_ids is not None:
            options["document_ids"] = torch.cat([batch.document_ids for batch in batches])  # type: ignore[misc]
        losses: list[Tensor] = []
        self.schedule(count, rows).step(*tokens, target=targets, losses=losses, return_outputs=False, **options)
        if self._tied is not None:
            self._tied.reduce()
        return self._from_last_stage(torch.stack([loss.detach() for loss in losses]).sum() if losses else None)

    @torch.no_grad()
    def evaluate(self, micro_batch: MicroBatch, loss_denominator: Tensor | float = 1.0) -> Tensor:
        """The loss of a micro-batch in evaluation mode, on every rank: a sum over valid targets / `loss_denominator`.

        Forward only, one micro-batch at a time through all stages. Weights that FSDP2 gathered are freed again.
        """
        batch = micro_batch.to(self._world.device)
        rows = len(batch.tokens)
        mine = {stage.stage: stage for stage in self.stages}
        loss, x = None, batch.tokens
        for number, stage in mine.items():
            was_training = stage.training
            stage.eval()
            if number > 0 and number - 1 not in mine:
                x = torch.empty(rows, self._activation_len, self._dim, dtype=self._dtype, device=self._world.device)
                dist.recv(x, group=self._group, group_src=holder(self._parallel, number - 1))
            x = stage(x, document_ids=batch.document_ids)
            if stage.is_last:
                loss = stage.loss(x, batch.targets, loss_denominator)
            elif number + 1 not in mine:
                dist.send(x.contiguous(), group=self._group, group_dst=holder(self._parallel, number + 1))
            stage.train(was_training)
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return self._from_last_stage(loss)

    def _from_last_stage(self, loss: Tensor | None) -> Tensor:
        """The loss of the rank that has one, on all; the others are given None."""
        if loss is None:
            dtype = torch.promote_types(self._dtype, torch.float32)
            loss = torch.zeros((), dtype=dtype, device=self._world.device)
        dist.all_reduce(loss, group=self._group)
        return loss

    def schedule(self, count: int, rows: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """Torch's schedule of `count` micro-batches of `rows` rows, kept for the next step that has as many.

        Each has a buffer to receive into for every micro-batch and each neighbour of each stage, and there are two of
        them where the global batch does not divide (`plan` says "8 or 9 micro-batches"). For `base` in bfloat16,
        pipeline 4, 4 rows of 2048 tokens, a buffer is 24 MiB, and on a rank in the middle 8 micro-batches take 384 MiB
        by 1F1B, and 768 MiB by schedules of two stages a rank; a second schedule, for 9, as much again and an eighth.
        That is kept because the other ways cost more: an empty micro-batch in every smaller step takes a ninth of its
        time, and to make schedules anew is work for the host, and talk between ranks, at each change.
        """
        if (count, rows) not in self._schedules:
            kind = get_schedule_class(self._parallel.pipeline_schedule)
            stages = [self._torch_stage(stage, rows) for stage in self.stages]
            what = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
            self._schedules[count, rows] = kind(what, count, loss_fn=self._loss, scale_grads=False)
        return self._schedules[count, rows]

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        assert self._last is not None
        return self._last.loss(logits, targets, self._loss_denominator)

    def _torch_stage(self, stage: ModelStage, rows: int) -> PipelineStage:
        # Given both, torch learns no shape by a trial run, which would draw random numbers and compile early.
        def meta(*shape: int, dtype: torch.dtype = self._dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

        activations = meta(rows, self._activation_len, self._dim)
        return _Stage(
            stage,
            stage.stage,
            stage.stages,
            self._world.device,
            input_args=meta(rows, stage.seq_len, dtype=torch.int64) if stage.is_rank_0 else activations,
            output_args=meta(rows, *self._logits_shape) if stage.is_last else activations,
            group=self._group,
        )


class _Stage(PipelineStage):
    """Stages that follow each other on one rank (the turn of a V) hand tensors over without sending them."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 opens connections to both neighbours, and gloo has none from a rank to itself.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def _empty(like: MicroBatch) -> MicroBatch:
    """A micro-batch of the same shape without targets."""
    ids = None if like.document_ids is None else torch.zeros_like(like.document_ids)
    return MicroBatch(torch.zeros_like(like.tokens), torch.full_like(like.targets, IGNORED), ids, 0)
