"""Parameter groups and optimizers."""

import torch
from torch import Tensor, nn

from swamla_titan.config.sections import Optimizer

# Optimizer -> bytes of its state for a float32 parameter of so many elements: AdamW has two moments, and counts steps.
STATE_BYTES = {"adamw": lambda elements: 2 * 4 * elements + 4}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices, which decay, and vectors and scalars (norms, biases), which do not.

    A weight that is used in two places (tied embedding and head) appears once.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over the model's float32 weights, fused: one kernel per group."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def skip_where(optimizer: torch.optim.Optimizer, bad: Tensor | None) -> None:
    """Make the optimizer's next steps change nothing where `bad` is 1: float32 scalar on the weights' device, 0 or 1.

    Weights, moments, step counts and weight decay all stay, bit for bit, whatever the gradients hold, and the host
    learns nothing of it: the fused kernels read the flag on the device and return (it is the one that torch's
    GradScaler gives them). None: every step counts. DTensors take the plain scalar as one that all ranks have alike.
    """
    assert all(group["fused"] for group in optimizer.param_groups), "only fused kernels know the flag"
    optimizer.found_inf = bad  # type: ignore[attr-defined]
