"""Norms under every kind of data parallelism: float32 on each rank, their gradients summed in one message."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from swamla_titan.config import Config
from swamla_titan.config.sections import Compile, Parallel, Training
from swamla_titan.data import MicroBatch
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.distributed.dtensor import copy_from_full, local
from swamla_titan.distributed.mesh import World
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.optim import build_optimizer, clip_divisor
from swamla_titan.parallel import data_parallel
from swamla_titan.parallel.data_parallel import all_reduce_replicated_grads
from swamla_titan.parallel.model_parts import ParallelModel
from tests.distributed.ranks import init_gloo, on_ranks

T = 32
ROWS = 12  # of a global batch; 2, 3 and 4 ranks divide them
SHAPE = ModelConfig(
    num_layers=3, dim=64, num_heads=2, vocab_size=50, max_seq_len=T, swa_window=8, q_lora_rank=16, qk_norm=True
)
DYNAMIC_TANH = {"norm": "dynamic_tanh", "tie_embeddings": False}

DDP = {"data_parallel": "ddp"}
HSDP = {"data_parallel": "hsdp", "dp_replicate": 2, "dp_shard": 2}
EVERY = {"reduce_every_micro_batch": True}
# name: ranks, [parallel], and messages that sum what is whole.
PLANS: dict[str, tuple[int, dict[str, Any], int]] = {
    "fsdp-2": (2, {}, 1),
    "fsdp-3": (3, {}, 1),
    "fsdp-4": (4, {"reshard_after_forward": "always"}, 1),
    "ddp-2": (2, DDP, 1),
    "ddp-3": (3, DDP, 1),
    "hsdp-2x2": (4, HSDP, 1),
    "hsdp-2x2-every": (4, HSDP | EVERY, 1),
    "cp-2": (2, {"context": 2}, 1),
    "ddp-2-cp-2": (4, DDP | {"context": 2}, 1),
    "tp-2": (2, {"tensor": 2}, 1),
    "fsdp-2-tp-2": (4, {"tensor": 2}, 2),  # of narrow matrices FSDP2 has summed a part already
    "ddp-2-tp-2": (4, DDP | {"tensor": 2}, 2),
    "pp-2": (2, {"pipeline": 2}, 0),
    "fsdp-2-pp-2": (4, {"pipeline": 2}, 1),
    "ddp-2-pp-2": (4, DDP | {"pipeline": 2, "pipeline_schedule": "ZBVZeroBubble"}, 1),
}
# Where every row is computed by the same products as in one process, so that nothing is rounded differently.
SAME_PRODUCTS = ("fsdp-2", "fsdp-3", "fsdp-4", "ddp-2", "ddp-3", "hsdp-2x2", "fsdp-2-pp-2")


def configured(parallel: dict[str, Any], dtype: str, shape: ModelConfig) -> Config:
    training = Training(
        seq_len=T, local_batch_size=1, global_batch_size=ROWS, compute_dtype=dtype, fp32_precision="ieee"
    )
    return Config(model=shape, parallel=Parallel(**parallel), training=training, compile=Compile(enabled=False))


def shape_of(plan: str, **changes: Any) -> ModelConfig:
    return replace(SHAPE, num_layers=4 if "pp" in plan else 3, **changes)


def built(config: Config, world: World) -> ParallelModel:
    """Of large matrices, and norms so near to 1 that bfloat16 would not see it."""
    model = ParallelModel(config, world)
    for part in model.parts:
        part.init_weights(0, lambda parameter, value: copy_from_full(parameter, _shifted(value)))
    return model


def _shifted(value: Tensor) -> Tensor:
    if value.ndim > 1:
        return 4 * value
    generator = torch.Generator().manual_seed(value.numel())
    return value + 1.5e-3 * torch.rand(value.shape, generator=generator)


def batches(world: World, seed: int = 0) -> list[MicroBatch]:
    """This rank's rows of the global batch, one by one."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, 50, (2, ROWS, T), generator=generator)
    mine = range(world.data_rank, ROWS, world.degrees.data)
    return [MicroBatch(tokens[i : i + 1], targets[i : i + 1], None, T) for i in mine]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: ParallelModel) -> dict[str, Tensor]:
    return {name: whole(p.grad) for part in model.parts for name, p in part.named_parameters() if p.grad is not None}


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if expected.numel() == 1 and expected.ndim == 1:  # DynamicTanh's alpha: a sum of all terms, most of which cancel
        tolerance *= 10
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _differences(parallel: dict[str, Any], dtype: str, shape: ModelConfig, tolerance: float) -> list[str]:
    """What of a step is not as in one process."""
    world, alone = init_distributed(Parallel(**parallel)), World.alone()
    mine, one = built(configured(parallel, dtype, shape), world), built(configured({}, dtype, shape), alone)
    loss = mine.train_step(batches(world), ROWS * T)
    expected = one.train_step(batches(alone), ROWS * T)
    wrong = [] if close(loss, expected, tolerance) else [f"loss {loss.item()}, not {expected.item()}"]
    theirs = gradients(one)
    ours = gradients(mine)
    if world.degrees.pipeline == 1:
        assert ours.keys() == theirs.keys()
    if shape.tie_embeddings and "head.weight" in ours:
        theirs["head.weight"] = theirs["embedding.weight"]
    for name, gradient in ours.items():
        # A row of a gathered embedding adds up in bfloat16 what each of its tokens gives, a whole one in float32.
        rough = dtype == "bfloat16" and name == "embedding.weight"
        if not close(gradient, theirs[name], 0.02 if rough else tolerance):
            wrong.append(name)
    norm, expected_norm = mine.gradient_norm(), one.gradient_norm()
    if not close(norm, expected_norm, 1e-3 if dtype == "bfloat16" else tolerance):
        wrong.append(f"norm {norm}, not {expected_norm}")
    return wrong


Held = tuple[list[str], list[list[set[str]]], int, dict[str, Any]]


def _held(parallel: dict[str, Any], shape: ModelConfig) -> Held:
    """Norms that are not whole and float32; kinds of tensors in each optimizer's groups; messages; norms in the end."""
    world = init_distributed(Parallel(**parallel))
    config = configured(parallel, "bfloat16", shape)
    model = built(config, world)
    norms = {name: p for part in model.parts for name, p in part.named_parameters() if p.ndim < 2}
    assert norms
    wrong = [name for name, p in norms.items() if local(p).shape != p.shape or p.dtype != torch.float32]
    seen = []

    def look(module: Any, _: Any) -> None:
        seen.extend(weight.dtype for weight in module.parameters(recurse=False))

    for part in model.parts:
        for module in part.modules():
            if type(module).__name__.endswith(("RMSNorm", "DynamicTanh")):
                module.register_forward_pre_hook(look)
    optimizers = [build_optimizer(part, config.optimizer) for part in model.parts]
    for step in range(3):
        model.train_step(batches(world, step), ROWS * T)
        norm = model.gradient_norm()
        for optimizer in optimizers:
            optimizer.step(config.optimizer.lr, clip_divisor(norm, 1.0))
            optimizer.zero_grad()
    model.train_step(batches(world), ROWS * T)
    messages = 0
    plain = dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal messages
        messages += 1
        return plain(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        all_reduce_replicated_grads((p for part in model.parts for p in part.parameters()), world)
    assert set(seen) == {torch.float32}  # as the forward pass met them
    return wrong, messages, {name: local(p.detach()).tolist() for name, p in norms.items()}


def _findings(plan: str) -> tuple[list[str], list[str], Held]:
    """Of one plan, by one start of its ranks: what differs in bfloat16 and in float32, and what each rank holds."""
    _, parallel, _ = PLANS[plan]
    # Untied, for FSDP2 adds the two gradients of a tied weight in bfloat16, and autograd alone in float32.
    untied = shape_of(plan, tie_embeddings=False)
    narrow = _differences(parallel, "bfloat16", untied, 1e-5) if plan in SAME_PRODUCTS else []
    exact = _differences(parallel, "float32", shape_of(plan, **DYNAMIC_TANH), 1e-5)
    return narrow, exact, _held(parallel, shape_of(plan))


COVERED = (
    "fsdp-2",
    "fsdp-4",
    "tp-2",
    "ddp-3",
    "hsdp-2x2-every",
    "ddp-2-cp-2",
    "ddp-2-tp-2",
    "fsdp-2-pp-2",
)  # by others that divide the same way, or by compositions


@pytest.mark.parametrize(
    "plan", [pytest.param(plan, marks=[pytest.mark.slow] if plan in COVERED else []) for plan in PLANS]
)
def test_a_plan_computes_what_one_process_does_and_each_rank_keeps_norms_in_float32_and_alike(plan):
    """Equal but for the order of float32 sums, also with gains that bfloat16 would round to 1."""
    ranks, _, expected_messages = PLANS[plan]
    results = on_ranks(ranks, _findings, plan)
    norms: dict[str, Any] = {}
    for narrow, exact, (wrong, messages, held) in results:
        assert narrow == [], "in bfloat16"
        assert exact == [], "in float32"
        assert wrong == []
        assert messages == expected_messages
        for name, values in held.items():
            assert norms.setdefault(name, values) == values, name  # bit for bit, after three steps
    with torch.device("meta"):
        of_all = {name for name, weight in SWAMLAModel(shape_of(plan)).named_parameters() if weight.ndim < 2}
    assert norms.keys() == of_all


def _summed_over_a_further_dimension() -> list[list[float]]:
    """Gradients of a norm, and of a matrix that FSDP2 would shard, where ranks along "expert" hold summands too."""
    init_gloo()
    rank = dist.get_rank()
    names = ("pipeline", "replicate", "shard", "expert", "tensor")
    weights = init_device_mesh("cpu", (1, 1, 2, 2, 1), mesh_dim_names=names)
    world = World(rank, 4, torch.device("cpu"), Degrees(), weights=weights, stage_group=dist.group.WORLD)
    norm = torch.nn.Parameter(torch.zeros(1))
    mesh = weights["shard"]
    matrix = torch.nn.Parameter(DTensor.from_local(torch.zeros(1, 1), mesh, [Shard(0)], run_check=False))
    norm.grad = torch.tensor([10.0**rank])
    matrix.grad = DTensor.from_local(torch.tensor([[10.0**rank]]), mesh, [Shard(0)], run_check=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_parallel, "GRADIENT_DIMENSIONS", frozenset({"replicate", "shard", "expert", "tensor"}))
        all_reduce_replicated_grads([norm, matrix], world)
    return [norm.grad.tolist(), local(matrix.grad).flatten().tolist()]


def test_a_further_dimension_is_summed_over_its_own_group():
    found = on_ranks(4, _summed_over_a_further_dimension)
    assert found == [[[1111.0], [sum]] for sum in (11.0, 11.0, 1100.0, 1100.0)]
