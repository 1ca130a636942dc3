"""Pipelines on real processes: loss and every gradient are those of the whole model in one process."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tests.distributed.ranks import on_ranks
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from swamla_titan.config import Config
from swamla_titan.config.sections import Parallel, Training
from swamla_titan.data.batches import MicroBatch
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.parallel.model_stage import build_stages
from swamla_titan.parallel.pipeline import Pipeline
from swamla_titan.parallel.stages import stage_count
from swamla_titan.parallel.world import join_world

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
SEQ_LEN, ROWS = 24, 2
SHAPE = ModelConfig(
    num_layers=8,
    dim=16,
    num_heads=2,
    vocab_size=50,
    max_seq_len=SEQ_LEN,
    ffn_hidden_dim=24,
    swa_window=6,
    swa_sink_size=2,
    kv_lora_rank=12,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=9,
    z_loss=1e-2,
)
DENOMINATOR = 97.0


def configured(schedule, ranks, *, tied=True, layers=8, data=None, **parallel):
    return Config(
        model=replace(SHAPE, num_layers=layers, tie_embeddings=tied),
        training=Training(seq_len=SEQ_LEN),
        parallel=Parallel(pipeline=ranks, pipeline_schedule=schedule, **parallel),
    )


def batches(count, documents, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return torch.randint(0, high, (ROWS, SEQ_LEN), generator=generator)

    found = []
    for _ in range(count):
        targets = draw(50).masked_fill(draw(7) == 0, -100)
        ids = (draw(8) == 0).cumsum(1) if documents else None
        found.append(MicroBatch(draw(50), targets, ids, ROWS))
    return found


def with_values(model):
    """The values of seed 5, larger than those that training starts with, so that every part matters."""
    model.to_empty(device="cpu").to(torch.float64)
    model.init_weights(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def whole_model(config):
    with torch.device("meta"):
        model = SWAMLAModel(config.model)
    return with_values(model)


def whole_step(model, micro_batches):
    loss = sum(model(b.tokens, b.targets, b.document_ids, DENOMINATOR) for b in micro_batches)
    loss.backward()
    return loss.detach()


def expected_gradients(model):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if model.config.tie_embeddings:
        gradients["head.weight"] = gradients["embedding.weight"]  # both copies hold the sum
    return gradients


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(pipeline, reference, tolerance=1e-11):
    """Every gradient of this rank against the whole model's; returns the names it compared."""
    expected = expected_gradients(reference)
    names = []
    for stage in pipeline.stages:
        for name, parameter in stage.named_parameters():
            names.append(name)
            torch.testing.assert_close(whole(parameter.grad), expected[name], rtol=tolerance, atol=tolerance, msg=name)
    return names


def every_count(schedule, ranks, counts):
    world = join_world(Parallel(pipeline=ranks))
    seen = []
    for case, (tied, documents) in enumerate([(True, True), (False, False)]):
        config = configured(schedule, ranks, tied=tied)
        reference = whole_model(config)
        pipeline = Pipeline(config, world, [with_values(stage) for stage in build_stages(config, world)])
        for count in counts:
            micro_batches = batches(count, documents, seed=count)
            loss = pipeline.train_step(micro_batches, DENOMINATOR)
            torch.testing.assert_close(loss, whole_step(reference, micro_batches), rtol=1e-12, atol=1e-12)
            names = compare(pipeline, reference)
            held_out = batches(1, documents, seed=100)[0]
            reference.eval()
            with torch.no_grad():
                expected = reference(held_out.tokens, held_out.targets, held_out.document_ids, 1.0)
            reference.train()
            torch.testing.assert_close(pipeline.evaluate(held_out), expected, rtol=1e-12, atol=1e-12)
            for stage in pipeline.stages:
                assert stage.training
                stage.zero_grad()
            reference.zero_grad()
        seen.append(names)
        assert case == 1 or all(stage.config.tie_embeddings for stage in pipeline.stages)
    return seen


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_and_gradients_are_those_of_the_whole_model(schedule, ranks):
    results = on_ranks(ranks, every_count, schedule, ranks, range(1, 8))
    for case, tied in enumerate([True, False]):
        names = [name for result in results for name in result[case]]
        expected = {name for name, _ in whole_model(configured(schedule, ranks, tied=tied)).named_parameters()}
        assert sorted(names) == sorted(expected | {"head.weight"})  # each in one stage, tied weights in two
