"""Optimizers on several ranks take the very steps of one process, under every plan, with sizes that do not divide."""

import functools
import importlib.util
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from swamla_titan.config import Config
from swamla_titan.config.sections import Optimizer, Parallel
from swamla_titan.distributed.dtensor import local, local_slices
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import ModelConfig
from swamla_titan.model.init import plain_name
from swamla_titan.optim import build_optimizer
from swamla_titan.parallel.model_parts import ParallelModel
from tests.distributed.ranks import init_gloo, on_ranks
from tests.optim import test_against_others as others

STEPS = 3
SETTINGS = {
    "adamw": {"name": "adamw"},
    "adamw-no-decay": {"name": "adamw", "weight_decay": 0.0},  # norms move with matrices
    "lion": {"name": "lion"},
    "lion-decays-all": {"name": "lion", "decay_embeddings": True},
    "muon": {"name": "muon"},
    "muon-original": {"name": "muon", "muon_adjust_lr_fn": "original", "moments": "bfloat16"},
    "adamw-bfloat16": {"name": "adamw", "moments": "bfloat16"},
    "adamw8bit": {"name": "adamw8bit"},
    "adamw4bit": {"name": "adamw4bit"},
    "adamw_fp8": {"name": "adamw_fp8"},
}


# Against other implementations, which one process runs


def sharded_steps(names: list[str]) -> dict[str, list[Tensor]]:
    """The matrices of tests/optim's layers, whole, after its steps with each optimizer, by FSDP2."""
    init_gloo()
    found = {}
    for name in names:
        torch.manual_seed(0)
        model = others.layers()
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        optimizer = build_optimizer(model, Optimizer(**others.HYPER, **SETTINGS[name]), torch.distributed.group.WORLD)
        whole = others.layers()
        for lr, _ in zip(others.learning_rates(), others.gradients(whole)):
            for parameter, of_whole in zip(model.parameters(), whole.parameters()):
                parameter.grad = as_held(parameter, of_whole.grad)
            optimizer.step(lr)
        found[name] = [sendable(parameter) for parameter in others.matrices(model)]
    return found


def sendable(tensor: Tensor) -> Any:
    """A whole tensor as an array, which, other than a tensor, outlives the process that sends it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return (whole.float() if whole.dtype == torch.bfloat16 else whole).cpu().numpy()


def as_held(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor's part as this rank would have it, laid out like the parameter."""
    part = whole[local_slices(parameter)].clone().to(local(parameter).device)
    if not isinstance(parameter, DTensor):
        return part
    return DTensor(part, parameter.detach()._spec, requires_grad=False)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_shards_move_as_the_whole_does_with_other_implementations(ranks):
    import torchao.optim

    names = ["muon", *others.QUANTIZED]
    if importlib.util.find_spec("lion_pytorch"):  # where it is not, as on some GPU machines, the others are compared
        names.append("lion")
    found = on_ranks(ranks, sharded_steps, names)
    hyper = others.HYPER
    betas, lr, decay = (hyper["beta1"], hyper["beta2"]), hyper["lr"], hyper["weight_decay"]
    adjust = {"adjust_lr_fn": "match_rms_adamw"}
    for name in names:
        torch.manual_seed(0)
        model = others.layers()
        if name == "lion":
            import lion_pytorch

            others.trained_by(model, lambda them: lion_pytorch.Lion(them, lr, betas, decay), 2)
        elif name == "muon":
            others.trained_by(model, lambda them: torch.optim.Muon(them, lr, weight_decay=decay, **adjust), 2)
        else:
            kind = getattr(torchao.optim, others.QUANTIZED[name])
            with torch.compiler.set_stance("force_eager"):
                others.trained_by(model, functools.partial(kind, lr=lr, betas=betas, weight_decay=decay), 2)
        expected = others.matrices(model)
        for of_rank in found:
            for one, other in zip(of_rank[name][:2], expected):  # the third one is too small for those that quantize
                # Muon's updates are equal; they are taken off the weight with other roundings.
                rounding = others.STEPS * torch.finfo(torch.float32).eps if name == "muon" else 0
                torch.testing.assert_close(torch.from_numpy(one), other, rtol=0, atol=rounding)


# Under the program's plans, against one process


MODEL = {"num_layers": 3, "dim": 96, "num_heads": 2, "vocab_size": 100, "max_seq_len": 64, "ffn_hidden_dim": 200}
NARROW = {"kv_lora_rank": 34, "qk_nope_head_dim": 22, "qk_rope_head_dim": 8, "v_head_dim": 32}
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp-3": (3, {}),
    "ddp-2": (2, {"data_parallel": "ddp"}),
    "tp-2": (2, {"tensor": 2}),
    "pp-2": (2, {"pipeline": 2}),
    "fsdp-2-tp-2": (4, {"tensor": 2}),
    "hsdp-2x2": (4, {"data_parallel": "hsdp", "dp_replicate": 2}),
    "fsdp-2-pp-2": (4, {"pipeline": 2}),
}
SLOW = {"fsdp-3", "tp-2", "pp-2", "ddp-2", "hsdp-2x2", "fsdp-2-pp-2"}


def whole_gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
    return torch.randn(shape, generator=generator)


def moved(settings: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Tensor]:
    """Whole weights and states after some steps, of the parts that this rank holds; the second step is a bad one."""
    config = Config(
        model=ModelConfig(**MODEL, **NARROW, tie_embeddings=False),
        parallel=Parallel(**parallel),
        optimizer=Optimizer(**{"lr": 0.02, "weight_decay": 0.3} | settings, lr_multipliers={"*.wo.*": 2.0}),
    )
    world = init_distributed(config.parallel)
    model = ParallelModel(config, world)
    model.init_weights(0)
    found = {}
    for part in model.parts:
        optimizer = build_optimizer(part, config.optimizer, world.stage_group)
        for step in range(STEPS):
            for name, parameter in part.named_parameters():
                parameter.grad = as_held(parameter, whole_gradient(plain_name(name, False), parameter.shape, step))
            optimizer.step(0.02 * (step + 1), bad=torch.tensor(float(step == 1), device=world.device))
        for name, parameter in part.named_parameters():
            for kind, value in ({"": parameter.detach()} | optimizer.state[parameter]).items():
                found[f"{plain_name(name, False)} {kind}"] = value
    return {name: sendable(value) for name, value in found.items()}


def moved_by_each(names: list[str], parallel: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    return {name: moved(SETTINGS[name], parallel) for name in names}


@functools.cache
def expected_of_each() -> dict[str, dict[str, Tensor]]:
    return moved_by_each(list(SETTINGS), {})


def is_fused(name: str, tensor: str, state: dict[str, Any]) -> bool:
    """Whether torch's fused kernel moves a parameter; on a CPU it rounds the last elements of a part differently."""
    parameter = tensor.split()[0]
    in_bfloat16 = SETTINGS[name].get("moments") == "bfloat16" and state[f"{parameter} "].ndim == 2
    return f"{parameter} exp_avg_sq" in state and (not in_bfloat16 or SETTINGS[name]["name"] == "muon")


@pytest.mark.parametrize(
    "plan", [pytest.param(plan, marks=[pytest.mark.slow] if plan in SLOW else []) for plan in PLANS]
)
def test_every_plan_takes_the_steps_of_one_process_bit_for_bit(plan):
    ranks, parallel = PLANS[plan]
    assert_same_steps(on_ranks(ranks, moved_by_each, list(SETTINGS), parallel), expected_of_each())


def assert_same_steps(of_ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """All tensors of all ranks are those of one process bit for bit, but for those that the fused kernel moves."""
    seen = set()
    for of_rank in of_ranks:
        for name, tensors in of_rank.items():
            for tensor, value in tensors.items():
                if is_fused(name, tensor, expected[name]):
                    numpy.testing.assert_allclose(value, expected[name][tensor], rtol=1e-6, atol=1e-7)
                else:
                    assert (value == expected[name][tensor]).all(), (name, tensor)
                seen.add((name, tensor))
    assert seen == {(name, tensor) for name, tensors in expected.items() for tensor in tensors}
    assert any(tensor.endswith("_codes") for _, tensor in seen)
