"""Weights that FSDP2 gathers in float8, and checkpoints of them, on gloo."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from swamla_titan.checkpoint.state import OptimizerStates, Weights
from swamla_titan.config import Config
from swamla_titan.config.sections import Compile, Float8, Optimizer, Parallel, Training
from swamla_titan.data import MicroBatch
from swamla_titan.distributed.dtensor import local
from swamla_titan.kernels.float8 import linear as float8_linears
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import ModelConfig
from swamla_titan.optim import build_optimizer
from swamla_titan.parallel import data_parallel
from swamla_titan.parallel import model_parts as parallel_model
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.quantization import native
from swamla_titan.quantization.native import NativeLinear
from swamla_titan.train.precision import set_precision_and_determinism
from tests.distributed.job import run_and_listen
from tests.distributed.ranks import on_ranks
from tests.distributed.test_optimizers import as_held, sendable, whole_gradient
from tests.parallel.plan import SMALL, batch
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, train


def _gathered(choice: str, dtype: str) -> set[torch.dtype]:
    """The types that were sent in a training step and a validation."""
    from torchao.float8.float8_linear import Float8Linear

    sent = set()
    real = data_parallel._AllGatherOfBytes.__call__

    def watched(self, output_tensor, input_tensor, group, async_op=False):
        sent.add(input_tensor.dtype)
        return real(self, output_tensor, input_tensor, group, async_op)

    data_parallel._AllGatherOfBytes.__call__ = watched
    config = Config(
        model=ModelConfig(**SMALL),
        float8=Float8(recipe="tensorwise", linear_layers="all", fsdp_all_gather=choice),
        training=Training(seq_len=64, compute_dtype=dtype),
        compile=Compile(enabled=False),
    )
    world = init_distributed(Parallel())
    model = ParallelModel(config, world)
    model.init_weights(0)
    tokens = batch()
    micro_batch = MicroBatch(tokens, tokens, None, tokens.numel())
    model.train_step([micro_batch, micro_batch], tokens.numel())
    for module in model.parts[0].modules():
        if isinstance(module, Float8Linear):
            assert isinstance(module.weight, DTensor)
            scale = getattr(module.weight._local_tensor, "_precomputed_scale", None)
            assert (scale is not None) == (choice == "auto")
            if scale is not None:
                largest = Weights(model.parts).state_dict()[_name_of(model, module)].full_tensor().abs().max()
                torch.testing.assert_close(scale, 448 / largest)
    stored = Weights(model.parts).state_dict()
    for name, parameter in model.parts[0].named_parameters():
        assert type(local(stored[name])) is torch.Tensor
        assert type(local(parameter.detach())) is torch.Tensor
        local(stored[name]).add_(1)  # what is loaded into it is what is trained
        assert torch.equal(local(parameter.detach()), local(stored[name]))
    model.evaluate([micro_batch])
    assert all(type(local(parameter.detach())) is torch.Tensor for parameter in model.parts[0].parameters())
    return sent


OPTIMIZERS = [{"name": name} for name in ("adamw_fp8", "adamw8bit", "adamw4bit", "lion", "muon")]
OPTIMIZERS += [{"name": "adamw", "moments": "bfloat16"}]


def _moved(settings: list[dict[str, str]], choice: str) -> list[dict[str, Any]]:
    """Weights and states after three steps with each optimizer, the second one bad, with gradients of our own."""
    found = []
    for each in settings:
        config = Config(
            model=ModelConfig(**SMALL),
            float8=Float8(recipe="tensorwise", linear_layers="all", fsdp_all_gather=choice),
            optimizer=Optimizer(**each),
            training=Training(seq_len=64),
            compile=Compile(enabled=False),
        )
        world = init_distributed(config.parallel)
        model = ParallelModel(config, world)
        model.init_weights(0)
        [part] = model.parts
        optimizer = build_optimizer(part, config.optimizer, world.stage_group)
        tokens = batch()
        for step in range(3):
            model.train_step([MicroBatch(tokens, tokens, None, tokens.numel())], tokens.numel())
            for name, parameter in part.named_parameters():
                parameter.grad = as_held(parameter, whole_gradient(name, parameter.shape, step))
            optimizer.step(0.01, bad=torch.tensor(float(step == 1)))
            optimizer.zero_grad()
        groups = Weights(model.parts), OptimizerStates(model.parts, [optimizer], config.optimizer)
        tensors = groups[0].state_dict() | groups[1].state_dict()
        found.append({name: sendable(tensor) for name, tensor in tensors.items()})
    return found


@pytest.mark.parametrize(
    "settings", [OPTIMIZERS[:1], pytest.param(OPTIMIZERS[1:], marks=pytest.mark.slow)], ids=["adamw_fp8", "others"]
)
def test_every_optimizer_moves_weights_that_are_gathered_in_float8_as_it_does_others(settings):
    gathered, plain = (on_ranks(2, _moved, settings, choice) for choice in ("always", "never"))
    for of_rank, expected in zip(gathered, plain):
        for one, other in zip(of_rank, expected, strict=True):
            assert one.keys() == other.keys()
            assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.slow
def test_a_run_with_moments_and_gathered_weights_in_float8_is_resumed_bit_for_bit(tiny: Path, tmp_path: Path):
    both = ("--float8.recipe", "tensorwise", "--float8.linear_layers", "all", "--float8.fsdp_all_gather", "always")
    settings = (*both, "--optimizer.name", "adamw_fp8", "--validation.interval", "0", "--ema.decay", "0.9")
    settings = (*settings, "--lr_schedule.min_lr_ratio", "1", "--checkpoint.interval", "2")
    for steps in ("2", "4"):
        assert on_ranks(2, train, tiny, *settings, "--training.steps", steps) == [0, 0]
    whole = tmp_path / "whole"
    assert on_ranks(2, train, tiny, *settings, "--training.steps", "4", "--job.dump_folder", str(whole)) == [0, 0]
    assert_same_checkpoint(checkpoint(tmp_path / "run", 4), checkpoint(whole, 4))


def _name_of(model: ParallelModel, module: torch.nn.Module) -> str:
    return next(name for name, each in model.parts[0].named_modules() if each is module) + ".weight"


@pytest.mark.parametrize(
    "choice, dtype, expected",
    [
        ("auto", "bfloat16", {torch.float8_e4m3fn, torch.bfloat16}),  # the embedding stays as it is
        pytest.param("never", "bfloat16", {torch.bfloat16}, marks=pytest.mark.slow),
    ],
)
def test_products_are_gathered_in_float8_with_scales_made_at_once(choice, dtype, expected):
    assert on_ranks(2, _gathered, choice, dtype) == [expected] * 2


def test_weights_that_ranks_cannot_share_evenly_are_not(tiny: Path):
    """torchao sends each rank's part as it is: with parts of several sizes ranks would wait for ever."""
    float8 = ("--float8.recipe", "tensorwise", "--float8.linear_layers", "all", "--training.steps", "1")
    assert on_ranks(3, train, tiny, *float8) == [0] * 3
    ended = on_ranks(3, run_and_listen, str(tiny), *float8, "--float8.fsdp_all_gather", "always")
    assert [each.code for each in ended] == [2] * 3
    assert "3 ranks cannot share the " in ended[0].err


@pytest.mark.parametrize("reshard, kept", [("always", False), ("never", True)])
def test_native_weights_in_float8_wait_for_the_backward_pass_where_weights_do(reshard: str, kept: bool):
    assert on_ranks(2, _saves_transposed, reshard) == [{kept}] * 2


def _native(parallel: Parallel) -> Config:
    return Config(
        model=ModelConfig(**SMALL),
        float8=Float8(recipe="native", linear_layers="all"),
        training=Training(seq_len=64),
        compile=Compile(enabled=False),
        parallel=parallel,
    )


def _saves_transposed(reshard: str) -> set[bool]:
    config = _native(Parallel(reshard_after_forward=reshard))
    model = ParallelModel(config, init_distributed(config.parallel))
    return {module.saves_transposed for module in model.parts[0].modules() if isinstance(module, NativeLinear)}


def _casts_of_weights(data_parallel: str, once: bool) -> tuple[int, list[float], list[float]]:
    """How often a step of three micro-batches casts weights of one shape; then losses and norms of two steps."""
    config = _native(Parallel(data_parallel=data_parallel))
    casts = []
    for file in (float8_linears, native):
        real = file.float8_cast

        def watched(x, *arguments, real=real, **options):
            casts.append(x.shape)
            return real(x, *arguments, **options)

        file.float8_cast = watched
    if not once:
        parallel_model.cast_weights = lambda model, through: None
    model = ParallelModel(config, init_distributed(config.parallel))
    model.init_weights(0)
    optimizer = build_optimizer(model.parts[0], config.optimizer)
    tokens = batch() + torch.distributed.get_rank()
    micro_batch = MicroBatch(tokens, tokens, None, len(tokens))
    losses, norms, of_down = [], [], 0
    for _ in range(2):
        casts.clear()
        losses.append(model.train_step([micro_batch] * 3, 6 * tokens.numel()).item())
        of_down = casts.count(model.parts[0].blocks["0"].feed_forward.down.weight.shape)
        norms.append(model.gradient_norm().item())
        optimizer.step(config.optimizer.lr)
        optimizer.zero_grad()
        losses.append(model.evaluate([micro_batch] * 2).item())
    return of_down, losses, norms


def test_replicated_weights_are_cast_once_a_step_to_the_same_bits():
    layers, micro_batches = SMALL["num_layers"], 3
    once, each_time = (on_ranks(2, _casts_of_weights, "ddp", once) for once in (True, False))
    assert [of_rank[0] for of_rank in once] == [layers] * 2
    assert [of_rank[0] for of_rank in each_time] == [layers * micro_batches] * 2
    assert [of_rank[1:] for of_rank in once] == [of_rank[1:] for of_rank in each_time]


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_any_recipe(tiny: Path, tmp_path: Path):
    short = ("--validation.interval", "0", "--checkpoint.interval", "3", "--float8.linear_layers", "all")
    steps = 0
    for recipe in ("tensorwise", "native", "rowwise", "tensorwise"):
        steps += 3
        options = ("--training.steps", str(steps), "--float8.recipe", recipe, *short)
        assert on_ranks(2, train, tiny, *options) == [0, 0]
    steps += 3
    assert train(tiny, "--training.steps", str(steps), *short[:-2]) == 0
    assert list(metrics(tmp_path / "run")) == list(range(1, steps + 1))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line).get("loss", 1.0) < 6 for line in lines)


def _trained(recipe: str, compiled: bool, reshard: str, folder: str) -> list[float]:
    """Losses and gradient norms of three steps of two micro-batches, and the loss of a validation."""
    real = parallel_model.compile_model
    parallel_model.compile_model = lambda model, config, budget: real(model, config, budget, backend="aot_eager")
    config = Config(
        model=ModelConfig(**SMALL),
        float8=Float8(recipe=recipe, linear_layers="all"),
        training=Training(seq_len=64),
        compile=Compile(enabled=compiled, cache_folder=folder),
        parallel=Parallel(reshard_after_forward=reshard),
    )
    model = ParallelModel(config, init_distributed(config.parallel))
    model.init_weights(0)
    optimizer = build_optimizer(model.parts[0], config.optimizer)
    tokens = batch()
    micro_batch = MicroBatch(tokens, tokens, None, len(tokens))
    found = []
    for _ in range(3):
        loss = model.train_step([micro_batch, micro_batch], 2 * tokens.numel())
        found += [loss.item(), model.gradient_norm().item()]
        optimizer.step(config.optimizer.lr)
        optimizer.zero_grad()
    return [*found, model.evaluate([micro_batch]).item()]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tensorwise", "native"])
def test_compiled_or_not_and_freed_or_kept_weights_give_the_same_bits(recipe: str, tmp_path: Path):
    plain, *others = (
        on_ranks(2, _trained, recipe, compiled, reshard, str(tmp_path))
        for compiled, reshard in ((False, "never"), (True, "never"), (True, "always"))
    )
    assert plain[0] == plain[1]
    assert all(other == plain for other in others)


def _trained_on_gpus(recipe: str, parallel: Parallel, folder: str, optimizer: str = "adamw") -> list[float]:
    """Losses and gradient norms of three compiled steps of four micro-batches over all ranks, and a held-out loss."""
    config = Config(
        model=ModelConfig(num_layers=3, dim=256, num_heads=2, vocab_size=512, max_seq_len=256),
        float8=Float8(recipe=recipe, linear_layers="all"),
        training=Training(seq_len=256),
        compile=Compile(cache_folder=folder),
        parallel=parallel,
        optimizer=Optimizer(optimizer),
    )
    world = init_distributed(config.parallel)
    set_precision_and_determinism(config, world.device, world.rank)
    model = ParallelModel(config, world)
    model.init_weights(0)
    moved_by = build_optimizer(model.parts[0], config.optimizer, compiled=True)
    tokens = torch.randint(512, (2, 256), generator=torch.Generator().manual_seed(0)).to(world.device)
    micro_batches = [MicroBatch(tokens, tokens, None, len(tokens))] * (4 // world.degrees.data)
    found = []
    for _ in range(3):
        loss = model.train_step(micro_batches, 4 * tokens.numel())
        found += [loss.item(), model.gradient_norm().item()]
        moved_by.step(config.optimizer.lr)
        moved_by.zero_grad()
    return [*found, model.evaluate(micro_batches[: 2 // world.degrees.data]).item()]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "plan",
    [
        {"reshard_after_forward": "always"},
        {"reshard_after_forward": "never"},
        {"data_parallel": "ddp"},
        {"tensor": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe, tolerance", [("native", 1e-2), ("tensorwise", 6e-2)])
def test_on_gpus_float8_trains_as_on_one(recipe: str, tolerance: float, plan: dict[str, Any], tmp_path: Path):
    """Every rank has the same sequences. Under tensor parallelism the shards of a weight have scales of their own.

    Native float8 there is compared three times as widely after the first step: AdamW's first steps move a weight by its
    gradient's sign, so that a gradient whose rounding changes the sign moves it the other way.
    """
    later = 3 * tolerance if recipe == "native" and "tensor" in plan else tolerance
    [expected] = on_ranks(1, _trained_on_gpus, recipe, Parallel(), str(tmp_path))
    for found in on_ranks(2, _trained_on_gpus, recipe, Parallel(**plan), str(tmp_path)):
        assert found[:2] == pytest.approx(expected[:2], rel=tolerance)
        assert found[2:] == pytest.approx(expected[2:], rel=later)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recipe, tolerance", [("native", 1e-2), ("tensorwise", 6e-2)])
def test_on_gpus_products_moments_and_gathered_weights_in_float8_train_as_on_one(recipe, tolerance, tmp_path: Path):
    [expected] = on_ranks(1, _trained_on_gpus, recipe, Parallel(), str(tmp_path), "adamw_fp8")
    for found in on_ranks(2, _trained_on_gpus, recipe, Parallel(), str(tmp_path), "adamw_fp8"):
        assert found == pytest.approx(expected, rel=tolerance)
