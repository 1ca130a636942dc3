"""What is done to blocks, all at once: float8, activation checkpointing, compilation and FSDP2, on gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard

from swamla_titan.config.sections import Compile, Float8, Parallel
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.compile import compile_model
from swamla_titan.quantization.float8 import convert_to_float8
from tests.distributed.ranks import on_ranks
from tests.parallel.plan import MODES, batch, gradients, small_model

CPU = torch.device("cpu")


def _passes(rank: int, size: int, plan: dict[str, Any]) -> tuple[float, dict[str, Any], set[str], int]:
    """Loss, gradients as numpy arrays, names in a checkpoint, and graphs compiled; a rank reads its rows of 12."""
    torch._dynamo.reset()
    model = small_model(torch.float32)
    convert_to_float8(model, Float8(recipe=plan.get("float8", "off"), linear_layers="all"), CPU)
    model.to(plan.get("dtype", torch.float64))
    apply_activation_checkpointing(model, MODES[plan.get("mode", "none")])
    backend = plan.get("backend")
    compile_model(model, Compile(enabled=backend is not None, cache_folder=plan["folder"]), backend=backend or "eager")
    if size > 1:
        mesh = init_distributed(Parallel()).weights
        assert mesh is not None
        for block in model.blocks.values():
            fully_shard(block, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
    rows = 12 // size
    tokens = batch(12)[rank * rows : (rank + 1) * rows]
    counters.clear()
    for _ in range(2):  # the second meets weights that were freed, and compiled code
        model.zero_grad()
        loss = model(tokens, tokens)
        loss.backward()
    found = {name: gradient.numpy() for name, gradient in gradients(model).items()}
    return loss.item(), found, set(get_model_state_dict(model)), counters["stats"]["unique_graphs"]


def _rank(plans: list[dict[str, Any]]) -> list[tuple[float, dict[str, Any], set[str], int]]:
    world = init_distributed(Parallel())
    return [_passes(world.rank, world.size, plan) for plan in plans]


def _assert_equal(size: int, plans: list[dict[str, Any]], single: dict[str, Any], tolerance: float) -> None:
    loss, expected, names, _ = _passes(0, 1, single)
    of_ranks = on_ranks(size, _rank, plans)
    for number, plan in enumerate(plans):
        results = [of_rank[number] for of_rank in of_ranks]
        assert sum(result[0] for result in results) / size == pytest.approx(loss, rel=tolerance)
        for _, found, stored, graphs in results:
            assert stored == names
            assert graphs == (3 if "backend" in plan else 0)  # SWA blocks, MLA blocks, the loss: compiled, and once
            for name, gradient in expected.items():
                difference = abs(found[name] - gradient).max()
                assert difference <= tolerance * abs(gradient).max(), (plan, name)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_checkpointing_with_fsdp_is_one_process_without_any(size: int, tmp_path: Path):
    folder = {"folder": str(tmp_path)}
    plans = [{"mode": mode} | folder for mode in MODES if mode != "none"]
    _assert_equal(size, plans, folder, 1e-11)


@pytest.mark.slow
def test_checkpointing_compiled_with_fsdp_is_one_process_without_any(tmp_path: Path):
    folder = {"folder": str(tmp_path)}
    plans = [{"mode": mode, "backend": "aot_eager"} | folder for mode in ("none", "operators", "full", "both")]
    _assert_equal(2, plans, folder, 1e-11)


def test_float32_too(tmp_path: Path):
    single = {"folder": str(tmp_path), "dtype": torch.float32}
    _assert_equal(2, [{"mode": "operators", "backend": "aot_eager"} | single], single, 2e-6)


@pytest.mark.parametrize(
    "recipe, combinations",
    [
        pytest.param("rowwise", [("operators", False), ("full", True)], marks=pytest.mark.slow),
        ("rowwise_with_gw_hp", [("operators", False)]),
        pytest.param("rowwise", [("operators", True)], marks=pytest.mark.slow),
        pytest.param("native", [("operators", True), ("full", False), ("none", True)], marks=pytest.mark.slow),
        pytest.param("rowwise_with_gw_hp", [("operators", True), ("full", True)], marks=pytest.mark.slow),
    ],
)
def test_float8_too(recipe: str, combinations: list[tuple[str, bool]], tmp_path: Path):
    """Each combination is a mode of checkpointing, compiled or not."""
    # Gradients of weights are products over a rank's tokens, and their scales cover those alone. These recipes round
    # scales to powers of two, which do not change how a number is rounded. "tensorwise" does not, and ranks differ.
    single = {"folder": str(tmp_path), "dtype": torch.float32, "float8": recipe}
    plans = [{"mode": mode} | ({"backend": "aot_eager"} if code else {}) | single for mode, code in combinations]
    _assert_equal(2, plans, single, 1e-5)
