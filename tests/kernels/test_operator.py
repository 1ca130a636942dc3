"""What a compiler sees of an operator: its kernels on a GPU, on a CPU the operator alone."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

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
