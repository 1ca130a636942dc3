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


@pytest.mark.filterwarnings("ignore:Triton")
def test_with_triton_it_is_seen_through_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(module, "has_triton", lambda: True)

    @module.operator("swamla_test::seen_through")
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    assert seen(double, "cuda") == ["aten.mul.Tensor", "aten.add.Tensor"]
    assert seen(double, "cpu") == ["swamla_test.seen_through.default", "aten.add.Tensor"]


def test_without_triton_it_is_opaque(monkeypatch):
    monkeypatch.setattr(module, "has_triton", lambda: False)

    @module.operator("swamla_test::opaque")
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    assert seen(double, "cpu") == seen(double, "cuda") == ["swamla_test.opaque.default", "aten.add.Tensor"]
