import torch

from swamla_titan.config.sections import Optimizer
from swamla_titan.model import FLAVORS, SWAMLAModel
from swamla_titan.optim import build_optimizer, set_learning_rate


def test_matrices_decay_and_vectors_do_not_and_a_tied_weight_counts_once():
    model = SWAMLAModel(FLAVORS["debug"])
    optimizer = build_optimizer(model, Optimizer(weight_decay=0.3))
    by_decay = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert {p.ndim for p in by_decay[0.3]} == {2}
    assert {p.ndim for p in by_decay[0.0]} <= {0, 1}
    listed = [p for group in by_decay.values() for p in group]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))


def test_a_step_follows_the_formula_of_adamw():
    layer = torch.nn.Linear(3, 2)
    layer.weight.grad = torch.randn_like(layer.weight)
    layer.bias.grad = torch.randn_like(layer.bias)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = build_optimizer(layer, Optimizer(lr=1.0, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    # At the first step the corrected moments are the gradient and its square.
    for name, decay in (("weight", 0.5), ("bias", 0.0)):
        grad = getattr(layer, name).grad
        expected = before[name] * (1 - 0.1 * decay) - 0.1 * grad / (grad.abs() + 1e-3)
        torch.testing.assert_close(getattr(layer, name).detach(), expected)
