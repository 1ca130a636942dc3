"""The update rules of optimizers: what each keeps of a parameter between steps, and how a step moves it.

A rule is a subclass of `Rule` and its line of `RULES`. optimizer.name chooses it, or for tables the module that has
them (model/layers.py).
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw as fused_adamw

from swamla_titan.config.sections import Optimizer
from swamla_titan.distributed.dtensor import local, local_slices, zeros_sharded_like
from swamla_titan.kernels.device import why_no_kernels
from swamla_titan.kernels.rows import adam_of_rows
from swamla_titan.model.row_table import Piece, RowSteps, RowTable, row_tables
from swamla_titan.optim import updates
from swamla_titan.optim.muon import Orthogonalizer, separate_rows, step_sizes
from swamla_titan.optim.state import BLOCKS, Format, code_tables, layout, moments_in
from swamla_titan.optim.updates import fuse_elementwise
from swamla_titan.quiet_torchao import quiet_torchao

# From this many elements on, compiled AdamW is worth a launch of its own: a call takes 0.2 ms of host time, and saves a
# fifth of an H100's time (16M elements: 161 instead of 206 us).
_LARGE = 1 << 22


@dataclass(frozen=True)
class Kind:
    """The settings that the parameters of a group share.

    `rule`: its name in RULES. `moments`: their format.
    """

    rule: str
    moments: Format
    weight_decay: float
    lr_multiplier: float

    def __str__(self) -> str:
        kept = "" if self.moments == "float32" else f" with moments of {self.moments.removeprefix('adamw').lstrip('_')}"
        decay = f"decay {self.weight_decay:g}" if self.weight_decay else "no decay"
        rule = RULES[self.rule].words or self.rule
        return f"{rule}{kept}, {decay}" + (f", lr x {self.lr_multiplier:g}" if self.lr_multiplier != 1 else "")


class Step(NamedTuple):
    """What moves all parameters in a step, see GroupedOptimizer.step."""

    lr: float
    divisor: Tensor | None
    bad: Tensor | None


class Given(NamedTuple):
    """What a rule is made from: all groups that have it, and the optimizer with the arguments that it was made with."""

    groups: Mapping[Kind, Sequence[nn.Parameter]]
    optimizer: torch.optim.Optimizer
    config: Optimizer
    model: nn.Module
    ranks: dist.ProcessGroup | None
    compiled: bool


class Rule:
    """How the parameters of the groups with this rule move."""

    moments: ClassVar[tuple[str, ...]]  # names in the state, those of torch's optimizers
    counts_steps: ClassVar[bool] = False  # in the state, as "step"
    of_hidden_matrices: ClassVar[bool] = False  # alone; AdamW moves the others
    words: ClassVar[str] = ""  # of log lines, in place of its name

    def __init__(self, given: Given) -> None:
        self.groups, self.config = given.groups, given.config
        self.optimizer = weakref.proxy(given.optimizer)  # which has this rule: a cycle would keep freed states alive

    def __call__(self, step: Step) -> None:
        """Move each parameter; either all parameters of a group have gradients, or none."""
        for kind, parameters in self.groups.items():
            if parameters[0].grad is not None:
                self.move(kind, parameters, step)

    def move(self, kind: Kind, parameters: Sequence[nn.Parameter], step: Step) -> None:
        """Move the parameters of one group, which have gradients, unless the step is bad."""
        raise NotImplementedError

    @classmethod
    def new_state(cls, parameter: nn.Parameter, kind: Kind, unit: int, table: RowTable | None) -> dict[str, Tensor]:
        """Zeroed moments in the parameter's memory, sharded as it is, and the step count.

        `unit`: from `column_units`; `table`: the one that the parameter is the weight of.
        """
        if kind.moments in BLOCKS:
            quiet_torchao()  # before it is imported, which happens within compiled code too
        zeros, columns = table.zeros if table else partial(zeros_sharded_like, parameter), parameter.shape[-1]
        kept = layout(cls.moments, kind.moments, columns, unit)
        state = {name: zeros(columns // divisor, dtype) for name, (dtype, divisor) in kept.items()}
        return state | ({"step": torch.zeros((), device=local(parameter).detach().device)} if cls.counts_steps else {})

    @classmethod
    def state_bytes(cls, parameter: nn.Parameter, kind: Kind, unit: int) -> int:
        """Bytes of `new_state` on this rank; the parameter may be on the meta device."""
        kept = layout(cls.moments, kind.moments, parameter.shape[-1], unit).values()
        held = local(parameter).numel()
        return sum(held // divisor * dtype.itemsize for dtype, divisor in kept) + (4 if cls.counts_steps else 0)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """This rank's shard of the gradient."""
        assert parameter.grad is not None
        return local(parameter.grad)

    def kept(self, parameter: nn.Parameter, kind: Kind) -> list[list[Tensor]]:
        """This rank's shards of the moments, as in state.py's `moments_in`."""
        return moments_in(self.optimizer.state[parameter], self.moments, kind.moments)


class AdamW(Rule):
    """AdamW (arXiv:1711.05101) with moments of any format."""

    moments = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self._update = fuse_elementwise(updates.adamw, given.compiled)
        # Of those with float32 moments; others always use our formulas.
        self.large = {each for of in given.groups.values() for each in of if given.compiled and _pays(local(each))}

    def move(self, kind: Kind, parameters: Sequence[nn.Parameter], step: Step) -> None:
        """As in Rule, by torch's kernel unless ours is faster or the moments are not float32."""
        ours = [each for each in parameters if kind.moments != "float32" or each in self.large]
        self._move(kind, ours, step)
        if others := [each for each in parameters if kind.moments == "float32" and each not in self.large]:
            self._move_fused(kind, others, step)

    def _move(self, kind: Kind, parameters: Sequence[nn.Parameter], step: Step) -> None:
        if not parameters:
            return
        steps = [self.optimizer.state[parameter]["step"] for parameter in parameters]
        _count(steps, step.bad)
        factors = self._factors(kind, steps[0].device, step)
        for parameter, number in zip(parameters, steps):
            weight, moments = local(parameter).detach(), self.kept(parameter, kind)
            if weight.numel():
                shape = (len(moments[0][-1]), -1) if len(moments[0]) > 1 else (-1,)
                blocks = weight.view(shape), self.gradient(parameter).reshape(shape)
                self._update(*blocks, number, moments, *factors)

    def _move_fused(self, kind: Kind, parameters: Sequence[nn.Parameter], step: Step) -> None:
        """torch's kernel: few launches for all, and 32 bytes per element when it clips, where ours has 28."""
        states = [self.optimizer.state[parameter] for parameter in parameters]
        fused_adamw(
            [local(parameter).detach() for parameter in parameters],
            [self.gradient(parameter) for parameter in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=step.divisor,
            found_inf=step.bad,
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=_rate(kind, step),
            weight_decay=kind.weight_decay,
            eps=self.config.eps,
            maximize=False,
        )

    def _factors(self, kind: Kind, device: torch.device, step: Step) -> tuple[Any, ...]:
        """What `updates.adamw` takes behind the tensors of a parameter."""
        config = self.config
        factors = step.divisor, step.bad, _scalar(_rate(kind, step)), kind.moments
        constants = config.beta1, config.beta2, config.eps, _scalar(kind.weight_decay)
        return (code_tables(self.moments, kind.moments, device), *factors, *constants)


class AdamOfAllRows(AdamW):
    """Adam of all rows of a table in each step, as AdamW moves them.

    The state has also `touched` [rows, 1], int32: the step count at which a row was last looked up; on the device.
    """

    words = "adam of all rows"

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self._tables = row_tables(given.model)
        for parameter in (parameter for parameters in given.groups.values() for parameter in parameters):
            state = given.optimizer.state[parameter]
            self._tables[parameter].steps = RowSteps(local(state["touched"]), state["step"])

    @classmethod
    def new_state(cls, parameter: nn.Parameter, kind: Kind, unit: int, table: RowTable | None) -> dict[str, Tensor]:
        """As in Rule."""
        state = super().new_state(parameter, kind, unit, table)
        step = state.pop("step")
        return state | {"touched": zeros_sharded_like(parameter, 1, torch.int32), "step": step}

    @classmethod
    def state_bytes(cls, parameter: nn.Parameter, kind: Kind, unit: int) -> int:
        """As in Rule."""
        return super().state_bytes(parameter, kind, unit) + 4 * len(local(parameter))

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """As in Rule; a table's gradient is kept by its rows."""
        return self._tables[parameter].gradient.dense(len(local(parameter)))

    def __call__(self, step: Step) -> None:
        """Move tables in which this rank has looked rows up, or other ranks this rank's rows."""
        for kind, parameters in self.groups.items():
            for parameter in parameters:
                if self._tables[parameter].gradient.sums is not None:
                    self.move_table(kind, parameter, step)

    def move_table(self, kind: Kind, parameter: nn.Parameter, step: Step) -> None:
        """Move all rows, and set `touched` of those that were looked up."""
        self._move(kind, [parameter], step)
        self.move_pieces(kind, parameter, step)

    def move_pieces(self, kind: Kind, parameter: nn.Parameter, step: Step) -> None:
        """`move_piece` of all rows that were looked up."""
        for piece in self._tables[parameter].gradient.pieces():
            self.move_piece(kind, parameter, piece, piece.stays(step.bad), step)

    def move_piece(self, kind: Kind, parameter: nn.Parameter, piece: Piece, stays: Tensor, step: Step) -> None:
        """Set `touched` of rows that were looked up, but for those that stay: where `stays` [rows, 1] is 1."""
        state = self.optimizer.state[parameter]
        touched = local(state["touched"])
        touched.index_copy_(0, piece.rows, torch.where(stays > 0, touched[piece.rows], state["step"].int()))


class AdamOfRows(AdamOfAllRows):
    """Adam of the rows of a table that a step looked up; others keep weights and moments."""

    words = "adam of the rows looked up"

    def move_table(self, kind: Kind, parameter: nn.Parameter, step: Step) -> None:
        """Count the step, and move the rows; on a GPU by one kernel."""
        state, config = self.optimizer.state[parameter], self.config
        _count([state["step"]], step.bad)
        if why_no_kernels(local(parameter).device):
            self.move_pieces(kind, parameter, step)
            return
        held, gradient = (*self._held(parameter), local(state["touched"])), self._tables[parameter].gradient
        rates = _scalar(_rate(kind, step)), config.beta1, config.beta2, config.eps, _scalar(kind.weight_decay)
        adam_of_rows(held, gradient.looked_up(), state["step"], step.divisor, step.bad, *rates)

    def move_piece(self, kind: Kind, parameter: nn.Parameter, piece: Piece, stays: Tensor, step: Step) -> None:
        """Move rows that were looked up, and set their `touched`."""
        held = self._held(parameter)
        weight, *moments = moved = [each[piece.rows] for each in held]
        factors = self._factors(kind, weight.device, step._replace(bad=stays))
        number = self.optimizer.state[parameter]["step"]
        self._update(weight, piece.gradients, number, [[each] for each in moments], *factors)
        for each, values in zip(held, moved):
            each.index_copy_(0, piece.rows, values)
        super().move_piece(kind, parameter, piece, stays, step)

    def _held(self, parameter: nn.Parameter) -> list[Tensor]:
        """This rank's rows of weight and moments."""
        state = self.optimizer.state[parameter]
        return [local(each).detach() for each in (parameter, *(state[name] for name in self.moments))]


class Lion(Rule):
    """Lion (arXiv:2302.06675)."""

    moments = ("exp_avg",)

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self._update = fuse_elementwise(updates.lion, given.compiled)

    def move(self, kind: Kind, parameters: Sequence[nn.Parameter], step: Step) -> None:
        """As in Rule."""
        lr, decay = _scalars(kind, step)
        for parameter in parameters:
            weight = local(parameter).detach()
            if weight.numel():
                [momentum] = self.kept(parameter, kind)
                flat = weight.view(-1), self.gradient(parameter).reshape(-1), momentum
                constants = kind.moments, self.config.beta1, self.config.beta2
                self._update(*flat, step.divisor, step.bad, lr, decay, *constants)


class Muon(Rule):
    """Muon: orthogonalized updates of hidden matrices, each orthogonalized on one rank (muon.py)."""

    moments = ("momentum_buffer",)
    of_hidden_matrices = True

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self._momentum = fuse_elementwise(updates.muon_momentum, given.compiled)
        self._weight = fuse_elementwise(updates.muon_weight, given.compiled)
        self._kinds = {matrix: kind for kind, matrices in given.groups.items() for matrix in matrices}
        rows = separate_rows(given.model)
        self.orthogonalizer = Orthogonalizer(list(self._kinds), rows, given.config.muon_ns_steps, given.ranks)
        self._sizes: dict[nn.Parameter, Tensor] = {}
        for matrix in self._kinds:
            sizes = step_sizes(matrix.shape, rows.get(matrix, []), given.config.muon_adjust_lr_fn)
            own, _ = local_slices(matrix)
            self._sizes[matrix] = sizes[own].to(local(matrix).device)

    def __call__(self, step: Step) -> None:
        """Move all matrices; a collective of the ranks that hold their shards."""
        factors = {kind: _scalars(kind, step) for kind in self.groups}

        def update_of(weight: nn.Parameter) -> Tensor:
            gradient, kind = self.gradient(weight), self._kinds[weight]
            if not gradient.numel():
                return gradient.bfloat16()
            [momentum] = self.kept(weight, kind)
            constants = kind.moments, self.config.muon_momentum, self.config.muon_nesterov
            update: Tensor = self._momentum(gradient.reshape(-1), momentum, step.divisor, step.bad, *constants)
            return update.view(gradient.shape)

        def apply(weight: nn.Parameter, direction: Tensor) -> None:
            own = local(weight).detach()
            if own.numel():
                self._weight(own, direction, self._sizes[weight], step.bad, *factors[self._kinds[weight]])

        self.orthogonalizer(update_of, apply)


# In the order in which a step applies them; Muon's collectives come last.
RULES: dict[str, type[Rule]] = {
    "adamw": AdamW,
    "lion": Lion,
    "rows": AdamOfRows,
    "all_rows": AdamOfAllRows,
    "muon": Muon,
}


def _pays(weight: Tensor) -> bool:
    """Whether compiled AdamW is faster than torch's fused kernel; not on a CPU, which would compile it first."""
    return weight.is_cuda and weight.numel() >= _LARGE


def _count(steps: list[Tensor], bad: Tensor | None) -> None:
    """Count a step that is not bad."""
    torch._foreach_add_(steps, 1)
    if bad is not None:
        torch._foreach_sub_(steps, [bad] * len(steps))


def _rate(kind: Kind, step: Step) -> float:
    return step.lr * kind.lr_multiplier


def _scalars(kind: Kind, step: Step) -> tuple[Tensor, Tensor]:
    """The learning rate, and the factor that weight decay multiplies a weight by."""
    return _scalar(_rate(kind, step)), _scalar(1 - _rate(kind, step) * kind.weight_decay)


def _scalar(value: float) -> Tensor:
    """A tensor and not a number, so that compiled code does not depend on the value."""
    return torch.tensor(value, dtype=torch.float32)
