"""The cases of [float8]: what becomes of the products of a real run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from swamla_titan.kernels.float8 import linear as float8_linears
from swamla_titan.model import SWAMLAModel
from swamla_titan.quantization.native import NativeHead, NativeLinear
from tests.config.runner import Runner, before_every_call_of

ONE_CALL = ("--training.steps", "1", "--training.local_batch_size", "5")
ALL = ("--float8.linear_layers", "all")


def recipe(run: Runner) -> None:
    losses, norms = {}, set()
    for name in ("off", "tensorwise", "rowwise", "rowwise_with_gw_hp", "native"):
        found: list[str] = []

        def look(model: nn.Module, *_: Any, found: list[str] = found) -> None:
            modules = model.named_modules()
            found += [name for name, module in modules if hasattr(module, "config") or isinstance(module, NativeLinear)]

        with before_every_call_of(SWAMLAModel, look):
            result = run(*ONE_CALL, "--float8.recipe", name, *(ALL if name != "off" else ()))
        losses[name] = result.series()[0]
        norms.add(result.series("grad_norm")[0])
        converted = [name for name in found if name.startswith("blocks.")]
        assert len(converted) == (0 if name == "off" else 14)
    # The last three scale rows alike, by powers of two, and may differ in their backward passes alone.
    assert len({losses[name] for name in ("off", "tensorwise", "rowwise")}) == 3
    assert len(norms) == 5
    assert list(losses.values()) == pytest.approx([losses["off"]] * 5, rel=0.02)
    assert "expected one of" in run.refusal("--float8.recipe", "rows")


def products(run: Runner) -> None:
    nowhere = ("--data.source", "local", "--data.path", "nowhere")  # it is not looked at
    refused = run.refusal(*ONE_CALL, "--float8.recipe", "native", *nowhere)
    assert "would convert none of 14 linear layers" in refused
    assert 'float8.linear_layers = "all"' in refused
    done = run(*ONE_CALL, "--float8.recipe", "native", *ALL)
    assert "in float8 will cost more than they gain" in (done.folder / "logs/rank-0.log").read_text()
    assert "leave it out" in run.refusal(*ALL)


def converted_head(run: Runner, *overrides: str) -> type[nn.Module]:
    kinds: set[type[nn.Module]] = set()
    with before_every_call_of(SWAMLAModel, lambda model, *_: kinds.add(type(model.head))):
        run(*ONE_CALL, *ALL, *overrides)
    (kind,) = kinds
    return kind


def output_head(run: Runner) -> None:
    head = ("--float8.output_head", "true")
    assert converted_head(run, "--float8.recipe", "native").__name__ == "Head"
    assert converted_head(run, "--float8.recipe", "native", *head) is NativeHead
    assert converted_head(run, "--float8.recipe", "rowwise", *head).__name__ == "Float8MasterLinear"
    fused = run.refusal("--float8.recipe", "native", *head, "--kernels.loss", "fused")
    assert 'kernels.loss = "fused" computes the head' in fused


def fsdp_all_gather(run: Runner) -> None:
    tensorwise = ("--float8.recipe", "tensorwise", *ALL)
    said = {}
    for name in ("auto", "never"):
        seen = run.on_ranks(2, *tensorwise, "--float8.fsdp_all_gather", name)[0]
        said[name] = "gathers the weights of matmuls in 8 bits" in (seen.folder / "logs/rank-0.log").read_text()
    assert said == {"auto": True, "never": False}  # and tests/distributed/test_float8_gather.py looks
    other = run.on_ranks(2, *tensorwise, "--optimizer.name", "adamw_fp8")[0]
    assert "gathers the weights of matmuls in 8 bits" in (other.folder / "logs/rank-0.log").read_text()
    cannot = ("--float8.fsdp_all_gather", "always", "--parallel.data_parallel", "ddp")
    assert '"always" is not possible with parallel.data_parallel as set' in run.refusal(*tensorwise, *cannot)
    assert "every rank has full weights" in run.refusal(*tensorwise, "--float8.fsdp_all_gather", "always")
    assert "has no effect" in run.refusal("--float8.recipe", "rowwise", "--float8.fsdp_all_gather", "always")


def watched(run: Runner, *overrides: str) -> set[tuple[torch.dtype, bool]]:
    """(first factor's type, fast) of the products of a step."""
    seen = set()
    real = float8_linears.scaled_matmul

    def look(a: Any, a_scale: Any, b: Any, b_scale: Any, dtype: torch.dtype, fast: bool = False) -> Any:
        seen.add((a.dtype, fast))
        return real(a, a_scale, b, b_scale, dtype, fast)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float8_linears, "scaled_matmul", look)
        run(*ONE_CALL, "--float8.recipe", "native", *ALL, *overrides)
    return seen


def gradient_dtype(run: Runner) -> None:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert watched(run) == {(e4m3, True), (e5m2, False)}
    assert watched(run, "--float8.gradient_dtype", "e4m3") == {(e4m3, True), (e4m3, False)}
    assert "has no effect" in run.refusal("--float8.recipe", "rowwise", "--float8.gradient_dtype", "e4m3")


def fast_accumulation(run: Runner) -> None:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert watched(run, "--float8.fast_accumulation", "true") == {(e4m3, True), (e5m2, True)}
    assert "has no effect" in run.refusal("--float8.fast_accumulation", "true")


def loss_scaling(run: Runner) -> None:
    """More in tests/train/test_loss_scale.py."""
    native = ("--float8.recipe", "native", *ALL)
    scaled, plain = (run(*ONE_CALL, *native, "--float8.loss_scaling", each) for each in ("true", "false"))
    assert scaled.series("loss_scale") == [2.0**16]
    assert scaled.series() == plain.series()
    refused = run.refusal(*native, "--float8.loss_scaling", "true", "--fault_tolerance.skip_bad_steps", "false")
    assert "skip_bad_steps = false" in refused


FLOAT8_CASES: dict[str, Callable[[Runner], None]] = {
    "float8.recipe": recipe,
    "float8.linear_layers": products,
    "float8.output_head": output_head,
    "float8.fsdp_all_gather": fsdp_all_gather,
    "float8.gradient_dtype": gradient_dtype,
    "float8.fast_accumulation": fast_accumulation,
    "float8.loss_scaling": loss_scaling,
}
