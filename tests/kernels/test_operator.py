"""What a compiler sees of an operator: its kernels on a GPU, on a CPU the operator alone. And what autograd does."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import Tensor
from torch._inductor.ir import ExternKernel, FallbackKernel
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from swamla_titan import kernels
from swamla_titan.kernels import operator as module


def seen(operator, device: str) -> list[str]:
    """What functions are called by a program that calls it, traced as torch.compile does, on no real device."""
    with FakeTensorMode():
        graph = make_fx(dispatch_functionalize(lambda x: operator(x) + 1))(torch.empty(4, device=device)).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("triton", [True, False])
def test_with_triton_it_is_seen_through_on_a_gpu_alone(monkeypatch, triton):
    monkeypatch.setattr(module, "has_triton", lambda: triton)

    @module.operator(f"swamla_test::double_{triton}".lower())
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    opaque = [f"swamla_test.double_{triton}.default".lower(), "aten.add.Tensor"]
    assert seen(double, "cpu") == opaque
    assert seen(double, "cuda") == (["aten.mul.Tensor", "aten.add.Tensor"] if triton else opaque)


def test_gradients_come_of_an_operator_that_takes_inputs_and_outputs_by_their_names():
    @torch.library.custom_op("swamla_test::scaled", mutates_args=())
    def scaled(x: Tensor, y: Tensor | None, factors: list[float]) -> tuple[Tensor, Tensor]:
        return factors[0] * x + (0 if y is None else y), x + 1

    @torch.library.custom_op("swamla_test::scaled_backward", mutates_args=())
    def scaled_backward(grad: Tensor, factors: list[float], y: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        return factors[0] * grad * x, grad.clone()  # not the derivative, so that x is known to be the second output

    module.differentiate(scaled, scaled_backward, ("out", "x"), lambda x, factors, **_: x.numel() * len(factors))
    x, y = torch.tensor([2.0, 3.0], requires_grad=True), torch.zeros(2, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out, _ = scaled(x, y, [5.0])
        out.sum().backward()
    assert (x.grad.tolist(), y.grad.tolist()) == ([15, 20], [1, 1])
    assert counter.get_total_flops() == 2 + 2 * 2
    [grad] = torch.autograd.grad(scaled(x, None, [5.0])[0].sum(), [x])
    assert grad.tolist() == [15, 20]


def test_no_argument_of_our_operators_has_the_name_of_one_that_the_compiler_gives_beside_them():
    """torch.compile passes an operator's arguments on by their names, some of them, to functions with own ones."""
    for each in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        if not each.name.endswith("_triton"):
            importlib.import_module(each.name)
    names = {
        name: {argument.name for argument in made._opoverload._schema.arguments}
        for name, made in OPDEFS.items()
        if name.startswith("swamla_titan::")
    }
    assert {"swamla_titan::window_attention", "swamla_titan::chunked_causal_attention_backward"} <= names.keys()
    taken = {"self", "cls"}
    for function in (FallbackKernel.create, FallbackKernel.__init__, ExternKernel.process_kernel):
        taken |= inspect.signature(function).parameters.keys()
    assert "kernel" in taken
    assert {name: found for name, own in names.items() if (found := own & taken)} == {}
