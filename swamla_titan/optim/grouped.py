"""An optimizer whose groups move by different rules, all of which obey the flag of bad steps."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw as fused_adamw

from swamla_titan.config.sections import Optimizer
from swamla_titan.distributed.dtensor import local, local_slices
from swamla_titan.optim import updates
from swamla_titan.optim.groups import Kind, groups
from swamla_titan.optim.matrices import column_units, separate_rows
from swamla_titan.optim.moments import maps_of, moments_in, new_state
from swamla_titan.optim.muon import Orthogonalizer, step_sizes
from swamla_titan.optim.updates import pointwise

# Elements from which compiled AdamW is worth a launch of its own: a call takes 0.2 ms of the host, and saves an H100 a
# fifth of its time (16M elements: 161 instead of 206 us).
_LARGE = 1 << 22


class GroupedOptimizer(torch.optim.Optimizer):
    """AdamW with moments of any width, Lion, Muon; what Muon is not meant for moves by AdamW.

    States are there from the start, plain tensors or DTensors cut like their parameters. Set `found_inf` through
    `skip_where`, `grad_scale` through `clip_gradients`.
    """

    def __init__(
        self, model: nn.Module, config: Optimizer, group: dist.ProcessGroup | None = None, compiled: bool = False
    ) -> None:
        """`group`: the ranks that hold parts of the same weights, all of which must call `step`. `compiled`: fuse what
        a rule does to a parameter into one kernel, unless torch's own does it faster.
        """
        of_kind = groups(model, config)
        of_groups = [
            {"params": parameters, "weight_decay": kind.weight_decay, "kind": kind}
            for kind, parameters in of_kind.items()
        ]
        super().__init__(of_groups, {"lr": config.lr})
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self._config = config
        units = column_units(model)
        for kind, parameters in of_kind.items():
            for parameter in parameters:
                self.state[parameter] = new_state(parameter, kind, units.get(parameter, 0))
        # If AdamW with float32 moments is to move them; every other rule moves all that it is given.
        self._by_rule = {each for each in self.state if compiled and _pays(local(each))}
        names = ("adamw", "lion", "muon_momentum", "muon_weight")
        self._updates = {name: pointwise(getattr(updates, name), compiled) for name in names}
        self._orthogonalizer, self._sizes = None, dict[nn.Parameter, Tensor]()
        matrices = [parameter for kind, each in of_kind.items() if kind.rule == "muon" for parameter in each]
        if matrices:
            rows = separate_rows(model)
            self._orthogonalizer = Orthogonalizer(matrices, rows, config.muon_ns_steps, group)
            for matrix in matrices:
                sizes = step_sizes(matrix.shape, rows.get(matrix, []), config.muon_adjust_lr_fn)
                own, _ = local_slices(matrix)
                self._sizes[matrix] = sizes[own].to(local(matrix).device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter; all have gradients, or those of a group none."""
        for group in self.param_groups:
            if group["params"][0].grad is None:
                continue
            parameters, rule = group["params"], group["kind"].rule
            if rule == "lion":
                self._lion(group)
            elif rule == "adamw" and group["kind"].moments != "float32":
                self._adamw(group, parameters)
            elif rule == "adamw":
                self._adamw(group, [each for each in parameters if each in self._by_rule])
                self._fused_adamw(group, [each for each in parameters if each not in self._by_rule])
        if self._orthogonalizer:
            self._muon(self._orthogonalizer)

    def _fused_adamw(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        """All of them in few launches, which move 32 bytes an element where gradients are divided, compiled code 28."""
        states = [self.state[parameter] for parameter in parameters]
        fused_adamw(
            [local(parameter).detach() for parameter in parameters],
            [_gradient(parameter) for parameter in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            lr=_rate(group),
            weight_decay=group["weight_decay"],
            eps=self._config.eps,
            maximize=False,
        )

    def _adamw(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            return
        config, kind, lr = self._config, group["kind"], _scalar(_rate(group))
        steps = [self.state[parameter]["step"] for parameter in parameters]
        torch._foreach_add_(steps, 1)
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))
        maps = maps_of(kind, steps[0].device)
        factors = self.grad_scale, self.found_inf, lr, kind.moments
        constants = config.beta1, config.beta2, config.eps, _scalar(group["weight_decay"])
        for parameter, step in zip(parameters, steps):
            weight, moments = local(parameter).detach(), moments_in(self.state[parameter], kind)
            if weight.numel():
                shape = (len(moments[0][-1]), -1) if len(moments[0]) > 1 else (-1,)
                blocks = weight.view(shape), _gradient(parameter).reshape(shape)
                self._updates["adamw"](*blocks, step, moments, maps, *factors, *constants)

    def _lion(self, group: dict[str, Any]) -> None:
        lr, decay = _scalars(group)
        kind, betas = group["kind"], (self._config.beta1, self._config.beta2)
        for parameter in group["params"]:
            weight = local(parameter).detach()
            if weight.numel():
                [momentum] = moments_in(self.state[parameter], kind)
                flat = weight.view(-1), _gradient(parameter).reshape(-1), momentum
                self._updates["lion"](*flat, self.grad_scale, self.found_inf, lr, decay, kind.moments, *betas)

    def _muon(self, orthogonalizer: Orthogonalizer) -> None:
        config = self._config
        of_weight: dict[nn.Parameter, tuple[Kind, Tensor, Tensor]] = {}
        for group in self.param_groups:
            if group["kind"].rule == "muon":
                of_weight |= dict.fromkeys(group["params"], (group["kind"], *_scalars(group)))

        def update_of(weight: nn.Parameter) -> Tensor:
            gradient, (kind, *_) = _gradient(weight), of_weight[weight]
            if not gradient.numel():
                return gradient.bfloat16()
            [momentum] = moments_in(self.state[weight], kind)
            factors = self.grad_scale, self.found_inf, kind.moments, config.muon_momentum, config.muon_nesterov
            update: Tensor = self._updates["muon_momentum"](gradient.reshape(-1), momentum, *factors)
            return update.view(gradient.shape)

        def apply(weight: nn.Parameter, direction: Tensor) -> None:
            own, (_, lr, decay) = local(weight).detach(), of_weight[weight]
            if own.numel():
                self._updates["muon_weight"](own, direction, self._sizes[weight], self.found_inf, lr, decay)

        orthogonalizer(update_of, apply)


def _pays(weight: Tensor) -> bool:
    """Whether compiled AdamW is faster than torch's fused kernel, which a CPU need not compile first."""
    return weight.is_cuda and weight.numel() >= _LARGE


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return local(parameter.grad)


def _rate(group: dict[str, Any]) -> float:
    """The learning rate, which others may have made a tensor of one number, as torch's optimizers allow."""
    return float(group["lr"])


def _scalars(group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The learning rate, and what a step leaves of a weight by decay."""
    return _scalar(_rate(group)), _scalar(1 - _rate(group) * group["weight_decay"])


def _scalar(value: float) -> Tensor:
    """Not a number, so that compiled code is the same for all."""
    return torch.tensor(value, dtype=torch.float32)
