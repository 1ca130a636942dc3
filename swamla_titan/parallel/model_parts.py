"""The model as the trainer sees it: built and parallelized, with the same few methods under every plan."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from swamla_titan.config import Config
from swamla_titan.data import MicroBatch
from swamla_titan.distributed.dtensor import copy_from_full, free_gathered_weights, local, num_shards
from swamla_titan.distributed.mesh import World
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.annexes import PreparedLookUp, annexes_of
from swamla_titan.model.loss_head import target_scores
from swamla_titan.model.row_table import RowTable, row_tables
from swamla_titan.optim import gradient_norm
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.compile import compile_model
from swamla_titan.parallel.context import apply_context_parallel
from swamla_titan.parallel.data_parallel import (
    all_reduce_replicated_grads,
    apply_data_parallel,
    model_reshards_after_forward,
    reduce_after_this_backward,
)
from swamla_titan.parallel.float8 import gathers_float8
from swamla_titan.parallel.kernels import choose_fused_attention, choose_kernels
from swamla_titan.parallel.pipeline import ModelStage, Pipeline, build_stages
from swamla_titan.parallel.row_tables import Inputs, look_ups_ahead, shard_row_tables
from swamla_titan.parallel.sequence_exchange import share_stream
from swamla_titan.parallel.tensor import apply_tensor_parallel, enable_async_tensor_parallel, sides_on_a_rank
from swamla_titan.quantization.native import cast_weights, forget_casts, save_transposed_weights


class LossScaling:
    """What the passes of a step scale the loss by: nothing. A subclass is train/loss_scale.py."""

    def scaled(self, loss_denominator: Tensor | float, device: torch.device) -> Tensor | float:
        """The divisor of the sum over targets that makes the loss of the backward passes, which run on `device`."""
        return loss_denominator

    def unscaled(self, loss: Tensor, gradients: Iterable[Tensor]) -> Tensor:
        """The loss of the global batch; `gradients` are divided in place as it is."""
        return loss


class SourceLosses:
    """Sums of the losses of each source of a mixture, over the training steps since they were last taken."""

    def __init__(self, sources: int, parts: Sequence[SWAMLAModel], world: World) -> None:
        """`parts`: those of the model on this rank, of which one at most computes losses."""
        self._world, self._numbers = world, torch.arange(sources, device=world.device)
        self._sums = torch.zeros(sources, dtype=torch.float64, device=world.device)
        self._of_sequences: list[Tensor] = []
        for part in parts:
            if hasattr(part, "head"):  # which other stages of a pipeline lack
                part.loss_head.sequence_losses = self._of_sequences

    def begin_step(self) -> None:
        """Forget what a step that failed has left."""
        self._of_sequences.clear()

    def end_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Add the losses of a step's micro-batches, which were computed in their order."""
        for batch, losses in zip(micro_batches, self._of_sequences):
            assert batch.sources is not None
            sources = batch.sources.to(losses.device, non_blocking=True)
            own = sources[:, None] == self._numbers  # [B, sources]
            # Not by index_add_, whose order of summands is another each time on GPUs.
            self._sums += torch.where(own, losses[:, None].double(), 0.0).sum(dim=0)

    def take(self) -> list[float]:
        """The sums over all ranks; all ranks call this, and wait for their devices."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        if self._world.degrees.pipeline > 1:
            dist.all_reduce(sums, group=self._world.group("pipeline"))
        total: list[float] = self._world.all_reduce_loss(sums).tolist()
        return total


class ParallelModel:
    """This rank's part of a model, built and parallelized as the configuration says.

    `parts` is the full model alone, or the pipeline stages that this rank holds. `loss_scaling` may be replaced, and
    `source_losses` set.
    """

    def __init__(self, config: Config, world: World) -> None:
        """Build the parts; their parameters are uninitialized, see `init_weights`."""
        self.config = config
        self.world = world
        self.parts = build_parts(config, world)
        for part in self.parts:
            part.to_empty(device="cpu" if config.parallel.cpu_offload else world.device)
        self._gathers_float8 = gathers_float8(config, world.degrees)
        self.loss_scaling = LossScaling()
        self.source_losses: SourceLosses | None = None
        self.pipeline = None
        if world.degrees.pipeline > 1:
            self.pipeline = Pipeline(config, world, cast(list[ModelStage], self.parts))

    def begin_stage(self, config: Config) -> None:
        """Compute from now on as the configuration of a stage says (config/schedule.py): its window, its lengths."""
        for part in self.parts:
            part.config = config.model
            choose_fused_attention(part, config, self.world.device)
        if self.pipeline:
            self.pipeline.forget_schedules()

    def init_weights(self, seed: int) -> None:
        """Draw all parameters; every rank draws full tensors and keeps its shards, so nothing is communicated."""
        for part in self.parts:
            part.init_weights(seed, copy_from_full)

    def train_step(self, micro_batches: Sequence[MicroBatch], loss_denominator: Tensor | float) -> Tensor:
        """Run forward and backward for this rank's micro-batches; gradients become those of the global batch.

        Returns the loss of the global batch, on the device: the sum over all its targets / `loss_denominator`.
        """
        loss = self._passes(micro_batches, self.loss_scaling.scaled(loss_denominator, self.world.device))
        return self.loss_scaling.unscaled(loss, (gradient for gradient, _ in self._gradients()))

    def _passes(self, micro_batches: Sequence[MicroBatch], loss_denominator: Tensor | float) -> Tensor:
        try:
            with self._prepared_weights(len(micro_batches)):
                return self._prepared_passes(micro_batches, loss_denominator)
        except BaseException:
            for table in self._tables:
                table.gradient.clear()  # because the next step would add to what this one has left
            raise

    def _prepared_passes(self, micro_batches: Sequence[MicroBatch], loss_denominator: Tensor | float) -> Tensor:
        if self.source_losses:
            self.source_losses.begin_step()
        if self.pipeline:
            loss = self.pipeline.train_step(list(micro_batches), loss_denominator)
        else:
            loss = torch.zeros((), device=self.world.device)
            for index, (inputs, prepared) in enumerate(self._inputs(micro_batches)):
                last = index == len(micro_batches) - 1
                reduce_after_this_backward(self.parts[0], last, self.config.parallel.reduce_every_micro_batch)
                part = self._loss(inputs, loss_denominator, prepared)
                part.backward()
                loss += part.detach()
        if self.source_losses:
            self.source_losses.end_step(micro_batches)
        for table in self._tables:
            table.gradient.merge()
        all_reduce_replicated_grads((parameter for part in self.parts for parameter in part.parameters()), self.world)
        return self.world.all_reduce_loss(loss)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Sum of the plain cross-entropy over all targets of all ranks, float64, on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with self._evaluating(len(micro_batches)):
            if self.pipeline:
                for loss in self.pipeline.evaluate(micro_batches):
                    total += loss
            else:
                for inputs, prepared in self._inputs(micro_batches):
                    total += self._loss(inputs, 1.0, prepared)
        return self.world.all_reduce_loss(total)

    @torch.no_grad()
    def score(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """Of each micro-batch `target_scores` of its targets, [B, T, 2], on all ranks that work on it."""
        with self._evaluating(len(micro_batches)):
            if self.pipeline:
                shape = (*micro_batches[0].targets.shape, 2) if micro_batches else ()
                found = self.pipeline.evaluate(micro_batches, _scores_of_stage, lambda batch: shape)
            else:
                found = (self._scores(*each) for each in self._inputs(micro_batches))
            for scores in found:
                if self.world.degrees.context > 1:
                    dist.all_reduce(scores, group=self.world.group("context"))
                yield scores

    def _scores(self, inputs: MicroBatch, prepared: PreparedLookUp | None) -> Tensor:
        logits = self.parts[0](inputs.tokens, None, inputs.document_ids, prepared=prepared)
        return _scores_of_own_tokens(self.parts[0], logits, inputs)

    @contextmanager
    def _evaluating(self, micro_batches: int) -> Iterator[None]:
        """Encloses forward passes of so many micro-batches in evaluation mode, which an error ends too."""
        for part in self.parts:
            part.eval()
        try:
            with self._prepared_weights(micro_batches):
                yield
        finally:
            for part in self.parts:
                part.train()
                if self._gathers_float8:  # the gathered weights are float8, which only linear layers can use
                    free_gathered_weights(part)

    def gradient_norm(self) -> Tensor:
        """The L2 norm of all gradients of the model, a scalar on their device. Collective."""
        return gradient_norm(self._gradients(), self._sum_over_ranks if self.world.size > 1 else None)

    @contextmanager
    def _prepared_weights(self, micro_batches: int) -> Iterator[None]:
        """Cast and scale the weights once for the passes of a step's micro-batches, instead of in each."""
        once = self.config.float8.recipe == "native" and micro_batches > 1
        holds_full = self.config.parallel.data_parallel == "ddp"  # FSDP2 gathers and frees weights block by block
        parts = [part for part in self.parts if holds_full or not isinstance(part, FSDPModule)] if once else []
        for part in parts:
            cast_weights(part, part.activation_dtype)
        if self._gathers_float8:
            from swamla_titan.quantization.float8 import compute_scales

            for part in self.parts:
                compute_scales(part)
        try:
            yield
        finally:
            for part in parts:
                forget_casts(part)

    def _inputs(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Inputs]:
        return look_ups_ahead(self.parts[0].annexes, (batch.to(self.world.device) for batch in micro_batches))

    def _loss(self, inputs: MicroBatch, denominator: Tensor | float, prepared: PreparedLookUp | None) -> Tensor:
        tensors = inputs.tokens, inputs.targets, inputs.document_ids
        loss: Tensor = self.parts[0](*tensors, loss_denominator=denominator, prepared=prepared)
        return loss

    @functools.cached_property
    def _tables(self) -> list[RowTable]:
        return [table for part in self.parts for table in row_tables(part).values()]

    def _gradients(self) -> Iterator[tuple[Tensor, float]]:
        """This rank's shard of each gradient, and its weight in a sum over ranks: 1 / copies of it among them."""
        ranks = self.world.size / self.world.degrees.pipeline  # that hold shards or copies of it
        copy = self.pipeline.tied_copy if self.pipeline else None
        for part in self.parts:
            for parameter in part.parameters():
                if parameter.grad is not None:
                    weight = 0.0 if parameter is copy else num_shards(parameter.grad) / ranks
                    yield local(parameter.grad), weight
        for table in self._tables:
            if table.gradient.sums is not None:
                yield table.gradient.sums, 1.0  # each row is on one rank

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value


def _scores_of_stage(stage: ModelStage, logits: Tensor, batch: MicroBatch) -> Tensor:
    """`target_scores` by the output of the last stage, which the head has computed already."""
    return _scores_of_own_tokens(stage, stage.loss_head.logits(nn.Identity(), logits), batch)


def _scores_of_own_tokens(part: SWAMLAModel, logits: Tensor, batch: MicroBatch) -> Tensor:
    """[B, T, 2], zeros for tokens that other ranks compute of the sequences."""
    positions = part.sequences.local(torch.arange(batch.targets.shape[1], device=batch.targets.device)[None])[0]
    own = target_scores(logits, part.sequences.local(batch.targets))
    found = own.new_zeros(*batch.targets.shape, 2)
    found[:, positions] = own
    return found


def build_parts(config: Config, world: World) -> list[SWAMLAModel]:
    """The full model, or this rank's pipeline stages, parallelized as the configuration says; on the meta device."""
    with torch.device("meta"):
        pipelined = world.degrees.pipeline > 1
        parts: list[SWAMLAModel] = [*build_stages(config, world)] if pipelined else [SWAMLAModel(config.model)]
    if annexes_of(config.model):  # of any stage, because all processes must call this
        world = world.with_request_group()
    for part in parts:
        parallelize(part, config, world)
    return parts


def parallelize(model: SWAMLAModel, config: Config, world: World) -> None:
    """Parallelize the model, or a pipeline stage of it, in place; its parameters are still on the meta device.

    The order matters, because each step works on the blocks as those before it have changed them. Raises UserError for
    what this machine cannot do.
    """
    model.compute_dtype = getattr(torch, config.training.compute_dtype)
    choose_kernels(model, config, world.device)
    shard_row_tables(model, config.parallel, world)
    if config.float8.recipe != "off":
        from swamla_titan.quantization.float8 import convert_to_float8  # torchao takes a second to import

        tensor, gathered = world.degrees.tensor, gathers_float8(config, world.degrees)
        sides = functools.partial(sides_on_a_rank, tensor)
        convert_to_float8(model, config.float8, world.device, sides, norms_cast=tensor == 1, gathered=gathered)
    if world.weights is not None and world.degrees.tensor > 1:
        apply_tensor_parallel(model, world.weights["tensor"])
        if config.parallel.async_tensor:
            enable_async_tensor_parallel(world.weights["tensor"])
    if world.degrees.context > 1:
        apply_context_parallel(model, world.group("context"))
    share_stream(model, world)
    apply_activation_checkpointing(model, config.activation_checkpoint)
    stages = len(config.training.stages) + 1
    compile_model(model, config.compile, config.activation_checkpoint.memory_budget, stages=stages)
    apply_data_parallel(model, config.parallel, world, model.compute_dtype)
    if config.float8.recipe == "native":
        save_transposed_weights(model, saved=not model_reshards_after_forward(model))
