"""An optimizer whose parameter groups have different update rules, all of which obey the flag of bad steps."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw as fused_adamw

from swamla_titan.config.sections import Optimizer
from swamla_titan.distributed.dtensor import local, local_slices
from swamla_titan.model.row_table import Piece, RowSteps, row_tables
from swamla_titan.optim import updates
from swamla_titan.optim.groups import Kind, groups
from swamla_titan.optim.matrices import column_units, separate_rows
from swamla_titan.optim.moments import code_tables, moments_in, new_state
from swamla_titan.optim.muon import Orthogonalizer, step_sizes
from swamla_titan.optim.updates import fuse_elementwise

# From this many elements on, compiled AdamW is worth a launch of its own: a call takes 0.2 ms of host time, and saves a
# fifth of an H100's time (16M elements: 161 instead of 206 us).
_LARGE = 1 << 22


class GroupedOptimizer(torch.optim.Optimizer):
    """AdamW with moments of any format, Lion, and Muon, which leaves all but hidden matrices to AdamW; Adam of tables.

    States exist from the start, as plain tensors or as DTensors sharded as their parameters. `skip_where` sets
    `found_inf`, `clip_gradients` sets `grad_scale`.
    """

    def __init__(
        self, model: nn.Module, config: Optimizer, group: dist.ProcessGroup | None = None, compiled: bool = False
    ) -> None:
        """`group`: the ranks that hold shards of the same weights, all of which must call `step`. `compiled`: fuse the
        update of a parameter into one kernel, unless torch's own is faster.
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
        self.tables = row_tables(model)
        units = column_units(model)
        for kind, parameters in of_kind.items():
            for parameter in parameters:
                self.state[parameter] = new_state(parameter, kind, units.get(parameter, 0), self.tables.get(parameter))
                if table := self.tables.get(parameter):
                    state = self.state[parameter]
                    table.steps = RowSteps(local(state["touched"]), state["step"])
        # Those of AdamW with float32 moments that are worth it; other rules always use our formulas.
        self._by_rule = {each for each in self.state if compiled and _pays(local(each))}
        names = ("adamw", "lion", "muon_momentum", "muon_weight")
        self._updates = {name: fuse_elementwise(getattr(updates, name), compiled) for name in names}
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
        """Update every parameter; either all parameters of a group have gradients, or none."""
        for group in self.param_groups:
            parameters, rule = group["params"], group["kind"].rule
            if rule in ("rows", "all_rows"):
                self._adam_of_tables(group)
            elif parameters[0].grad is None:
                continue
            elif rule == "lion":
                self._lion(group)
            elif rule == "adamw" and group["kind"].moments != "float32":
                self._adamw(group, parameters)
            elif rule == "adamw":
                self._adamw(group, [each for each in parameters if each in self._by_rule])
                self._fused_adamw(group, [each for each in parameters if each not in self._by_rule])
        if self._orthogonalizer:
            self._muon(self._orthogonalizer)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; those of tables too."""
        super().zero_grad(set_to_none)
        for table in self.tables.values():
            table.gradient.clear()

    def _adam_of_tables(self, group: dict[str, Any]) -> None:
        """Of those in which this rank has looked rows up, or other ranks this rank's rows."""
        is_lazy = group["kind"].rule == "rows"
        for parameter in group["params"]:
            gradient, state = self.tables[parameter].gradient, self.state[parameter]
            if gradient.sums is None:
                continue
            if is_lazy:
                self._advance([state["step"]])
            else:
                self._adamw(group, [parameter])
            for piece in gradient.pieces():
                stays = piece.stays(self.found_inf)
                if is_lazy:
                    self._adam_of_rows(group, parameter, piece, stays)
                touched = local(state["touched"])
                touched.index_copy_(0, piece.rows, torch.where(stays > 0, touched[piece.rows], state["step"].int()))

    def _adam_of_rows(self, group: dict[str, Any], parameter: nn.Parameter, piece: Piece, stays: Tensor) -> None:
        state, table = self.state[parameter], self.tables[parameter]
        held = [local(each).detach() for each in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        weight, *moments = moved = [table.gather(each, piece, stays) for each in held]
        factors = self._factors_of_adamw(group, weight.device, stays)
        self._updates["adamw"](weight, piece.gradients, state["step"], [[each] for each in moments], *factors)
        for each, values in zip(held, moved):
            table.scatter(each, piece, stays, values)

    def _fused_adamw(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        """torch's kernel: few launches for all, and 32 bytes per element when it clips, where ours has 28."""
        states = [self.state[parameter] for parameter in parameters]
        fused_adamw(
            [local(parameter).detach() for parameter in parameters],
            [self._gradient(parameter) for parameter in parameters],
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
        steps = [self.state[parameter]["step"] for parameter in parameters]
        self._advance(steps)
        factors = self._factors_of_adamw(group, steps[0].device, self.found_inf)
        for parameter, step in zip(parameters, steps):
            weight, moments = local(parameter).detach(), moments_in(self.state[parameter], group["kind"])
            if weight.numel():
                shape = (len(moments[0][-1]), -1) if len(moments[0]) > 1 else (-1,)
                blocks = weight.view(shape), self._gradient(parameter).reshape(shape)
                self._updates["adamw"](*blocks, step, moments, *factors)

    def _advance(self, steps: list[Tensor]) -> None:
        """Count a step that is not bad."""
        torch._foreach_add_(steps, 1)
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def _factors_of_adamw(self, group: dict[str, Any], device: torch.device, bad: Tensor | None) -> tuple[Any, ...]:
        """What `updates.adamw` takes behind the tensors of a parameter."""
        config, kind = self._config, group["kind"]
        factors = self.grad_scale, bad, _scalar(_rate(group)), kind.moments
        constants = config.beta1, config.beta2, config.eps, _scalar(group["weight_decay"])
        return (code_tables(kind, device), *factors, *constants)

    def _lion(self, group: dict[str, Any]) -> None:
        lr, decay = _scalars(group)
        kind, betas = group["kind"], (self._config.beta1, self._config.beta2)
        for parameter in group["params"]:
            weight = local(parameter).detach()
            if weight.numel():
                [momentum] = moments_in(self.state[parameter], kind)
                flat = weight.view(-1), self._gradient(parameter).reshape(-1), momentum
                self._updates["lion"](*flat, self.grad_scale, self.found_inf, lr, decay, kind.moments, *betas)

    def _muon(self, orthogonalizer: Orthogonalizer) -> None:
        config = self._config
        of_weight: dict[nn.Parameter, tuple[Kind, Tensor, Tensor]] = {}
        for group in self.param_groups:
            if group["kind"].rule == "muon":
                of_weight |= dict.fromkeys(group["params"], (group["kind"], *_scalars(group)))

        def update_of(weight: nn.Parameter) -> Tensor:
            gradient, (kind, *_) = self._gradient(weight), of_weight[weight]
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

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        if parameter in self.tables:
            return self.tables[parameter].gradient.dense(len(local(parameter)))
        assert parameter.grad is not None
        return local(parameter.grad)


def _pays(weight: Tensor) -> bool:
    """Whether compiled AdamW is faster than torch's fused kernel; not on a CPU, which would compile it first."""
    return weight.is_cuda and weight.numel() >= _LARGE


def _rate(group: dict[str, Any]) -> float:
    """The learning rate as a float, because torch's optimizers allow a tensor of one element too."""
    return float(group["lr"])


def _scalars(group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The learning rate, and the factor that weight decay multiplies a weight by."""
    return _scalar(_rate(group)), _scalar(1 - _rate(group) * group["weight_decay"])


def _scalar(value: float) -> Tensor:
    """A tensor and not a number, so that compiled code does not depend on the value."""
    return torch.tensor(value, dtype=torch.float32)
