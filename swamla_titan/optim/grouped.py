"""An optimizer whose groups move by different rules, all of which obey the flag of bad steps."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as fused_adamw

from swamla_titan.config.sections import Optimizer
from swamla_titan.optim import updates
from swamla_titan.optim.groups import Kind, groups
from swamla_titan.optim.matrices import column_units, separate_rows
from swamla_titan.optim.moments import maps_of, moments_in, new_state
from swamla_titan.optim.muon import Orthogonalizer, step_sizes
from swamla_titan.optim.pointwise import pointwise
from swamla_titan.parallel.sharded import local, part_of


class GroupedOptimizer(torch.optim.Optimizer):
    """Lion, Muon, and AdamW with moments in fewer bits; what these are not meant for moves by fused AdamW.

    States are there from the start, plain tensors or DTensors cut like their parameters. Set `found_inf` through
    `skip_where`, `grad_scale` through `clip_gradients`.
    """

    def __init__(
        self, model: nn.Module, config: Optimizer, group: dist.ProcessGroup | None = None, compiled: bool = False
    ) -> None:
        """`group`: the ranks that hold parts of the same weights, all of which must call `step`. `compiled`: fuse what
        a rule does to a parameter into one kernel.
        """
        of_kind = groups(model, config)
        super().__init__(param_groups(of_kind), {"lr": config.lr})
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self._config = config
        units = column_units(model)
        self._moments: dict[nn.Parameter, list[list[Tensor]]] = {}  # views of the states, which are loaded in place
        for kind, parameters in of_kind.items():
            for parameter in parameters:
                self.state[parameter] = new_state(parameter, kind, units.get(parameter, 0))
                self._moments[parameter] = moments_in(self.state[parameter], kind)
        names = ("adamw", "lion", "muon_momentum", "muon_weight")
        self._updates = {name: pointwise(getattr(updates, name), compiled) for name in names}
        self._orthogonalizer, self._sizes = None, dict[nn.Parameter, Tensor]()
        matrices = [parameter for kind, each in of_kind.items() if kind.rule == "muon" for parameter in each]
        if matrices:
            rows = separate_rows(model)
            self._orthogonalizer = Orthogonalizer(matrices, rows, config.muon_ns_steps, group)
            for matrix in matrices:
                sizes = step_sizes(matrix.shape, rows.get(matrix, []), config.muon_adjust_lr_fn)
                own, _ = part_of(matrix)
                self._sizes[matrix] = sizes[own].to(local(matrix).device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter; all have gradients, or those of a group none."""
        for group in self.param_groups:
            if group["params"][0].grad is None:
                continue
            if group["kind"].rule == "adamw" and group["kind"].moments == "float32":
                self._fused_adamw(group)
            elif group["kind"].rule == "lion":
                self._lion(group)
            elif group["kind"].rule == "adamw":
                self._adamw(group)
        if self._orthogonalizer:
            self._muon(self._orthogonalizer)

    def _fused_adamw(self, group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in group["params"]]
        fused_adamw(
            [local(parameter).detach() for parameter in group["params"]],
            [local(parameter.grad) for parameter in group["params"]],
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

    def _adamw(self, group: dict[str, Any]) -> None:
        config, kind, lr = self._config, group["kind"], _scalar(_rate(group))
        steps = [self.state[parameter]["step"] for parameter in group["params"]]
        torch._foreach_add_(steps, 1)
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))
        maps = maps_of(kind, steps[0].device)
        factors = self.grad_scale, self.found_inf, lr, kind.moments
        constants = config.beta1, config.beta2, config.eps, group["weight_decay"]
        for parameter, step in zip(group["params"], steps):
            weight, moments = local(parameter).detach(), self._moments[parameter]
            if weight.numel():
                shape = (len(moments[0][-1]), -1) if len(moments[0]) > 1 else (-1,)
                blocks = weight.view(shape), local(parameter.grad).reshape(shape)
                self._updates["adamw"](*blocks, step, moments, maps, *factors, *constants)

    def _lion(self, group: dict[str, Any]) -> None:
        lr, decay = _scalars(group)
        kind, betas = group["kind"], (self._config.beta1, self._config.beta2)
        for parameter in group["params"]:
            weight = local(parameter).detach()
            if weight.numel():
                [momentum] = self._moments[parameter]
                flat = weight.view(-1), local(parameter.grad).reshape(-1), momentum
                self._updates["lion"](*flat, self.grad_scale, self.found_inf, lr, decay, kind.moments, *betas)

    def _muon(self, orthogonalizer: Orthogonalizer) -> None:
        config = self._config
        of_weight: dict[nn.Parameter, tuple[Kind, Tensor, Tensor]] = {}
        for group in self.param_groups:
            if group["kind"].rule == "muon":
                of_weight |= dict.fromkeys(group["params"], (group["kind"], *_scalars(group)))

        def update_of(weight: nn.Parameter) -> Tensor:
            assert weight.grad is not None
            gradient, (kind, *_) = local(weight.grad), of_weight[weight]
            if not gradient.numel():
                return gradient.bfloat16()
            [momentum] = self._moments[weight]
            factors = self.grad_scale, self.found_inf, kind.moments, config.muon_momentum, config.muon_nesterov
            update: Tensor = self._updates["muon_momentum"](gradient.reshape(-1), momentum, *factors)
            return update.view(gradient.shape)

        def apply(weight: nn.Parameter, direction: Tensor) -> None:
            own, (_, lr, decay) = local(weight).detach(), of_weight[weight]
            if own.numel():
                self._updates["muon_weight"](own, direction, self._sizes[weight], self.found_inf, lr, decay)

        orthogonalizer(update_of, apply)


def param_groups(of_kind: Mapping[Kind, list[nn.Parameter]]) -> list[dict[str, Any]]:
    """The groups as torch's optimizers take them, each with its `kind`.

    Cut by meshes: the fused kernel takes DTensors of one, or plain tensors, as norms are that every rank keeps whole.
    """
    of_mesh: dict[tuple[Kind, DeviceMesh | None], list[nn.Parameter]] = {}
    for kind, parameters in of_kind.items():
        for parameter in parameters:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            of_mesh.setdefault((kind, mesh), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": kind.weight_decay, "kind": kind}
        for (kind, _), parameters in of_mesh.items()
    ]


def _rate(group: dict[str, Any]) -> float:
    """The learning rate, which others may have made a tensor of one number, as torch's optimizers allow."""
    return float(group["lr"])


def _scalars(group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The learning rate, and what a step leaves of a weight by decay."""
    return _scalar(_rate(group)), _scalar(1 - _rate(group) * group["weight_decay"])


def _scalar(value: float) -> Tensor:
    """Not a number, so that compiled code is the same for all."""
    return torch.tensor(value, dtype=torch.float32)
