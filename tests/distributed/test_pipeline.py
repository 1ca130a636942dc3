"""Pipelines on real processes: loss and every gradient are those of the whole model in one process."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from swamla_titan.config import Config
from swamla_titan.config.sections import Parallel, Training
from swamla_titan.data.batches import MicroBatch
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.parallel.pipeline import Pipeline, build_stages
from tests.distributed.ranks import on_ranks

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


def configured(schedule, ranks, *, tied=True, layers=8, **parallel):
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


def every_count(schedule, ranks):
    """Steps of 1 to 7 micro-batches, each the one before and one more, so that the reference only adds up."""
    world = init_distributed(Parallel(pipeline=ranks))
    seen = []
    for tied, documents in [(True, True), (False, False)]:
        config = configured(schedule, ranks, tied=tied)
        reference = whole_model(config)
        pipeline = Pipeline(config, world, [with_values(stage) for stage in build_stages(config, world)])
        micro_batches = batches(7, documents)
        expected_loss = 0
        for count in range(1, 8):
            loss = pipeline.train_step(micro_batches[:count], DENOMINATOR)
            expected_loss += whole_step(reference, micro_batches[count - 1 : count])
            torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
            names = compare(pipeline, reference)
            for stage in pipeline.stages:
                stage.zero_grad()
        assert_evaluates(pipeline, reference, batches(1, documents, seed=100)[0])
        seen.append(names)
    return seen


def assert_evaluates(pipeline, reference, micro_batch):
    reference.eval()
    with torch.no_grad():
        expected = reference(micro_batch.tokens, micro_batch.targets, micro_batch.document_ids, 1.0)
    reference.train()
    [loss] = pipeline.evaluate([micro_batch])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert all(stage.training for stage in pipeline.stages)
    assert all(parameter.grad is None for stage in pipeline.stages for parameter in stage.parameters())


# In CI every schedule on some number of ranks, and all numbers of ranks.
IN_CI = {("GPipe", 3), ("1F1B", 2), ("Interleaved1F1B", 3), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 4)}


@pytest.mark.parametrize(
    "schedule, ranks",
    [
        pytest.param(*case, marks=[] if case in IN_CI else [pytest.mark.slow])
        for case in itertools.product(SCHEDULES, (2, 3, 4))
    ],
)
def test_loss_and_gradients_are_those_of_the_whole_model(schedule, ranks):
    results = on_ranks(ranks, every_count, schedule, ranks)
    for case, tied in enumerate([True, False]):
        names = [name for result in results for name in result[case]]
        expected = {name for name, _ in whole_model(configured(schedule, ranks, tied=tied)).named_parameters()}
        assert sorted(names) == sorted(expected | {"head.weight"})  # each in one stage, tied weights in two


def optimizer_steps(schedule, data_parallel, shard, reshard_after_forward):
    """AdamW on a pipeline of 2 whose stages are sharded over two ranks that read different micro-batches."""
    parallel = {"data_parallel": data_parallel, "dp_shard": shard, "dp_replicate": 2 // shard}
    config = configured(schedule, 2, layers=5, **parallel)
    world = init_distributed(config.parallel)
    mesh = world.weights["replicate", "shard"] if data_parallel == "hsdp" else world.weights["shard"]
    stages = [with_values(stage) for stage in build_stages(config, world)]
    reductions = 0

    def counted(gradient):
        nonlocal reductions
        reductions += 1

    for stage in stages:
        for block in stage.blocks.values():
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
        fully_shard(stage, mesh=mesh, reshard_after_forward=reshard_after_forward)
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                if data_parallel == "hsdp":
                    module.set_all_reduce_hook(counted)
    pipeline = Pipeline(config, world, stages)
    parameters = [parameter for stage in stages for parameter in stage.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    reference = whole_model(config)
    reference_optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        everyone = batches(6, True, seed=step)
        mine = everyone[world.data_rank :: 2]
        loss = world.all_reduce_loss(pipeline.train_step(mine, DENOMINATOR))
        torch.testing.assert_close(loss, whole_step(reference, everyone), rtol=1e-10, atol=1e-10)
        compare(pipeline, reference, 1e-9)
        assert_same_norm(pipeline, reference, world)
        for each in (optimizer, reference_optimizer):
            each.step()
            each.zero_grad()
        if step == 1:
            assert_evaluates(pipeline, reference, everyone[0])
            assert all(isinstance(parameter, DTensor) for stage in stages for parameter in stage.parameters())
    if data_parallel == "hsdp":
        # Once a step for each block, and for what a stage holds beside: the embedding, or norm and head.
        assert reductions == 4 * sum(len(stage.blocks) + (stage.is_first or stage.is_last) for stage in stages)
    weights = {name: whole(weight).detach() for stage in stages for name, weight in stage.named_parameters()}
    for name, weight in reference.named_parameters():
        if name in weights:
            torch.testing.assert_close(weights[name], weight.detach(), rtol=1e-7, atol=1e-7, msg=name)
    return {name: weights[name].numpy() for name in ("embedding.weight", "head.weight") if name in weights}


def assert_same_norm(pipeline, reference, world):
    """The norm of all gradients, with a tied weight counted once."""
    squares = torch.zeros((), dtype=torch.float64)
    for stage in pipeline.stages:
        for parameter in stage.parameters():
            if parameter is not pipeline.tied_copy:
                squares += whole(parameter.grad).square().sum()
    torch.distributed.all_reduce(squares, group=world.group("pipeline"))
    expected = torch.nn.utils.get_total_norm([parameter.grad for parameter in reference.parameters()])
    torch.testing.assert_close(squares.sqrt(), expected, rtol=1e-9, atol=0)


# In CI both kinds of sharding, passes that are whole and split, weights that are freed between passes and that are not.
SHARDED_IN_CI = {("Interleaved1F1B", "hsdp"), ("InterleavedZeroBubble", "fsdp")}


@pytest.mark.parametrize(
    "schedule, data_parallel, shard",
    [
        pytest.param(schedule, kind, shard, marks=[] if (schedule, kind) in SHARDED_IN_CI else [pytest.mark.slow])
        for schedule in SCHEDULES
        for kind, shard in (("fsdp", 2), ("hsdp", 1))
    ],
)
def test_sharded_stages_train_like_the_whole_model(schedule, data_parallel, shard):
    reshard = data_parallel == "hsdp" and schedule in ("GPipe", "Interleaved1F1B")  # split backward passes cannot
    results = on_ranks(4, optimizer_steps, schedule, data_parallel, shard, reshard)
    embeddings = [result["embedding.weight"] for result in results if "embedding.weight" in result]
    heads = [result["head.weight"] for result in results if "head.weight" in result]
    assert len(embeddings) == len(heads) == 2
    for copy in embeddings + heads:
        assert np.array_equal(copy, embeddings[0])  # to the last bit
    start = whole_model(configured(schedule, 2, layers=5)).embedding.weight.detach().numpy()
    assert not np.array_equal(embeddings[0], start)


def tied_steps(schedule, ranks):
    config = configured(schedule, ranks)
    world = init_distributed(config.parallel)
    stages = [with_values(stage).float() for stage in build_stages(config, world)]
    pipeline = Pipeline(config, world, stages)
    held = [parameter for stage in stages for parameter in stage.parameters()]
    optimizer = torch.optim.AdamW(held, lr=1e-2, weight_decay=0.1)
    for step in range(5):
        pipeline.train_step(batches(3, False, seed=step), DENOMINATOR)
        optimizer.step()
        optimizer.zero_grad()
    found = {name: weight.detach() for stage in stages for name, weight in stage.named_parameters()}
    assert ("head.weight" in found) == (pipeline.tied_copy is not None)
    return {name: found[name].numpy() for name in ("embedding.weight", "head.weight") if name in found}


@pytest.mark.parametrize(
    "schedule, ranks", [("1F1B", 3), pytest.param("Interleaved1F1B", 4, marks=pytest.mark.slow), ("ZBVZeroBubble", 2)]
)
def test_tied_copies_stay_alike_to_the_last_bit(schedule, ranks):
    results = on_ranks(ranks, tied_steps, schedule, ranks)
    (embedding,) = [result["embedding.weight"] for result in results if "embedding.weight" in result]
    (head,) = [result["head.weight"] for result in results if "head.weight" in result]
    assert np.array_equal(embedding, head)


def compiled_step(schedule):
    config = configured(schedule, 2, layers=4)
    world = init_distributed(config.parallel)
    stages = [with_values(stage).float() for stage in build_stages(config, world)]
    for stage in stages:
        for block in stage.blocks.values():
            block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    pipeline = Pipeline(config, world, stages)
    reference = whole_model(config).float()
    micro_batches = batches(3, True)
    loss = pipeline.train_step(micro_batches, DENOMINATOR)
    torch.testing.assert_close(loss, whole_step(reference, micro_batches), rtol=1e-5, atol=1e-6)
    compare(pipeline, reference, 1e-5)


@pytest.mark.parametrize("schedule", [pytest.param("1F1B", marks=pytest.mark.slow), "Interleaved1F1B"])
def test_compiled_blocks(schedule):
    on_ranks(2, compiled_step, schedule)
