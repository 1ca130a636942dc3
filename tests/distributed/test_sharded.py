"""Parts of whole tensors: written without communication, counted for the norm of the gradients, clipped."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from swamla_titan.config import Config
from swamla_titan.config.sections import Parallel
from swamla_titan.distributed.dtensor import copy_from_full, local, num_shards
from swamla_titan.distributed.mesh import World
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.optim import clip_divisor
from swamla_titan.parallel.model_parts import ParallelModel, build_parts
from tests.distributed.ranks import on_ranks

HSDP = {"data_parallel": "hsdp", "dp_replicate": 2}
DDP = {"data_parallel": "ddp"}
# Of sizes that 2, 3 and 4 ranks do not divide, one below them (so that some hold nothing), and one of a single number.
SHAPES = ((7, 4), (1, 3), (2,), (6, 5), (1,))


def _whole(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _written(parallel: dict[str, Any]) -> list[tuple[bool, bool, int]]:
    """Of each shape and layout: is the part that of distribute_tensor, and the whole the whole; and how many parts."""
    world = init_distributed(Parallel(**parallel))
    assert world.weights is not None
    meshes = [world.weights["replicate", "shard"], world.weights["shard", "tensor"], world.weights["shard"]]
    layouts = [
        (mesh, placements)
        for mesh in meshes
        for placements in (
            ([Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(1)], [Replicate(), Replicate()])
            if mesh.ndim == 2
            else ([Shard(0)], [Replicate()])
        )
    ]
    found = []
    for mesh, placements in layouts:
        for shape in SHAPES:
            if len(shape) == 1 and Shard(1) in placements:
                continue
            whole = _whole(shape)
            expected = distribute_tensor(whole, mesh, placements)
            parameter = distribute_tensor(torch.zeros_like(whole), mesh, placements)
            copy_from_full(parameter, whole)
            same = torch.equal(local(parameter), local(expected))
            found.append((same, torch.equal(parameter.full_tensor(), whole), num_shards(parameter)))
    return found


@pytest.mark.parametrize(
    "size, parallel",
    [(3, {}), (4, HSDP), (4, {"tensor": 2}), *(pytest.param(n, {}, marks=pytest.mark.slow) for n in (2, 4))],
)
def test_each_rank_writes_its_part_of_uneven_shards(size, parallel):
    for found in on_ranks(size, _written, parallel):
        assert all(same and whole for same, whole, _ in found)
        assert max(parts for *_, parts in found) == size
        assert min(parts for *_, parts in found) == 1


def test_a_plain_tensor_is_written_whole():
    parameter = nn.Parameter(torch.zeros(3, 2))
    copy_from_full(parameter, torch.arange(6.0).view(3, 2))
    assert parameter.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert num_shards(parameter) == 1
    assert local(parameter) is parameter


SMALL = {"num_layers": 3, "dim": 64, "num_heads": 2, "vocab_size": 50, "max_seq_len": 64, "ffn_hidden_dim": 72}


def _drawn(parallel: dict[str, Any]) -> list[str]:
    """Names of the parameters of a model, laid out by the program itself, that are not what one process draws."""
    world = init_distributed(Parallel(**parallel))
    wrong = []
    for tied in (True, False):
        config = Config(model=ModelConfig(**SMALL, tie_embeddings=tied), parallel=Parallel(**parallel))
        whole = SWAMLAModel(config.model)
        whole.init_weights(7)
        expected = dict(whole.named_parameters(remove_duplicate=False))
        for part in build_parts(config, world):
            part.to_empty(device="cpu")
            part.init_weights(7, copy_from_full)
            for name, parameter in part.named_parameters():
                found = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
                if not torch.equal(found, expected[name]):
                    wrong.append(f"{name}, {tied=}")
    return wrong


@pytest.mark.parametrize("size, parallel", [(3, {}), (4, HSDP), (4, {"tensor": 2}), (4, {"tensor": 2, "context": 2})])
def test_a_model_of_any_layout_starts_with_the_weights_of_one_process(size, parallel):
    """50 ids: 25 a tensor-parallel rank, which FSDP cuts into 13 and 12."""
    parallel = parallel | ({} if "context" not in parallel else {"dp_shard": 1})
    assert on_ranks(size, _drawn, parallel) == [[]] * size


class _Held(ParallelModel):
    """A model of bare gradients."""

    def __init__(self, world: World, parameters: list[nn.Parameter]) -> None:
        self.world = world
        self.pipeline = None
        self.parts: list[Any] = [nn.ParameterList(parameters)]


def _clipped(parallel: dict[str, Any], max_norm: float) -> tuple[float, bool, bool]:
    """The norm; are the gradients those that torch clips of whole ones; does this rank hold nothing of one of them."""
    world = init_distributed(Parallel(**parallel))
    assert world.weights is not None
    weights = world.weights
    wholes = [_whole(shape, seed) for seed, shape in enumerate(SHAPES)]
    pairs = [
        (weights["shard"], [Shard(0)]),  # FSDP
        (weights["shard"], [Shard(0)]),
        (weights["replicate", "shard"], [Replicate(), Shard(0)]),  # HSDP
        (weights["shard", "tensor"], [Shard(1), Shard(0)]),  # with tensor parallelism
        None,  # a plain tensor, alike on all ranks
    ]
    parameters = []
    for whole, layout in zip(wholes, pairs):
        laid = whole.clone() if layout is None else distribute_tensor(whole, *layout)
        parameter = nn.Parameter(torch.zeros_like(laid))
        parameter.grad = laid
        parameters.append(parameter)
    norm = _Held(world, parameters).gradient_norm()

    expected = [nn.Parameter(torch.zeros_like(whole)) for whole in wholes]
    for parameter, whole in zip(expected, wholes):
        parameter.grad = whole
    whole_norm = torch.nn.utils.clip_grad_norm_(expected, max_norm)
    found = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in parameters]
    divisor = clip_divisor(norm, max_norm)
    close = [torch.allclose(mine / divisor, p.grad, rtol=1e-13, atol=0) for mine, p in zip(found, expected)]
    empty = any(local(p.grad).numel() == 0 for p in parameters)
    return (norm / whole_norm).item(), all(close), empty


@pytest.mark.parametrize("size, parallel", [(2, {}), (3, {}), (2, DDP), (4, HSDP), (4, {"tensor": 2}), (4, {})])
@pytest.mark.parametrize("max_norm", [0.5, pytest.param(1e3, marks=pytest.mark.slow)])
def test_the_ranks_clip_as_one_process_does(size, parallel, max_norm):
    results = on_ranks(size, _clipped, parallel, max_norm)
    for ratio, close, _ in results:
        assert ratio == pytest.approx(1, rel=1e-13)
        assert close
    assert len({ratio for ratio, *_ in results}) == 1  # bit for bit: else copies of a weight would drift apart
    assert any(empty for *_, empty in results) == (parallel != DDP)
