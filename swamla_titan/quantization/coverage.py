"""Which linear layers of a model compute in float8, which do not, and why: for the conversion, `plan` and `check`."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from swamla_titan.config.rules import wants_fused_loss
from swamla_titan.config.sections import Config, Float8, Recipe
from swamla_titan.errors import UserError
from swamla_titan.kernels.device import has_triton
from swamla_titan.kernels.limits import FLOAT8_CAPABILITY
from swamla_titan.kernels.limits import FLOAT8_MULTIPLE as MULTIPLE
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.branch import Branch
from swamla_titan.model.layers import spec_of

Sides = Callable[[str, nn.Linear], tuple[int, int]]
"""(name, linear layer) -> [out, in] of the weight, or shard, that a rank multiplies with."""

# Measured on an H100 in matmuls with sides of one to eight thousand (LOG.md, 2026-11-23): FLOP/s in both dtypes, and
# memory bandwidth in bytes per second. By recipe, the bytes that casting an element of the input, and one of the
# gradient, reads and writes.
_BFLOAT16, _FLOAT8, _BYTES = 720e12, 1310e12, 3.0e12
_CAST_BYTES = {"native": (7, 7), "tensorwise": (9, 9), "rowwise": (28, 12), "rowwise_with_gw_hp": (12, 6)}
# Of a weight's three matmuls, how many are in float8: in the last recipe, not that of the weight's gradient.
_MATMULS = {"native": 3, "tensorwise": 3, "rowwise": 3, "rowwise_with_gw_hp": 2}
_WEIGHT_BYTES = 10  # to cast a float32 element: read for amax, read again, written twice

# A warning is due where a smaller share of the operations that a recipe can take is in float8.
_LITTLE = 0.6


@dataclass(frozen=True)
class LinearCoverage:
    """Whether a linear layer computes in float8 (`why_not` is None), with the sides of its weight on a rank."""

    name: str
    out: int
    inner: int
    branch: str | None  # where it reads a norm's output; the readers in one branch can share a cast
    why_not: str | None

    @property
    def kind(self) -> str:
        """The layer's name without the number of its block."""
        room, _, rest = self.name.partition(".")
        return rest.partition(".")[2] if room in ("blocks", "annexes") else self.name


def gain(recipe: Recipe, out: int, inner: int, is_cast: bool = False) -> float:
    """Seconds per token that float8 matmuls of a layer save, minus the time to cast input and gradient.

    `is_cast`: the input is in float8 already, as a norm's output is with "native". The constants are fitted to
    benchmarks/float8_products.py on an H100, so that this is positive where float8 was faster.
    """
    of_input, of_gradient = _CAST_BYTES[recipe]
    return _saved(recipe) * out * inner - (of_gradient * out + (0 if is_cast else of_input * inner)) / _BYTES


def _saved(recipe: Recipe) -> float:
    """Seconds per element of a weight and per token that float8 matmuls save, forward and backward."""
    return 2 * _MATMULS[recipe] * (1 / _BFLOAT16 - 1 / _FLOAT8)


def full_sides(name: str, linear: nn.Linear) -> tuple[int, int]:
    """`Sides` without tensor parallelism, of the full weight."""
    return linear.out_features, linear.in_features


def survey(
    model: SWAMLAModel, config: Float8, sides: Sides = full_sides, norms_cast: bool = True
) -> list[LinearCoverage]:
    """The coverage of every linear layer of a model or a pipeline stage, in order; `config.recipe` is not "off".

    `norms_cast`: with "native", norms return float8, which they do not under tensor parallelism.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: sides(name, linear) for name, linear in linears.items()}
    branches = {name: module for name, module in model.named_modules() if isinstance(module, Branch)}
    readers = {f"{name}.{each}": name for name, branch in branches.items() for each in branch.input_readers()}
    reasons = {name: _impossible(name, *shape, config) for name, shape in shapes.items()}
    reasons |= {name: "reads a memory" for name, linear in linears.items() if spec_of(name, linear).role.stays_wide}
    if config.linear_layers == "auto":
        possible = {name: shape for name, shape in shapes.items() if reasons[name] is None}
        small = _too_small(possible, readers if norms_cast else {}, config.recipe)
        reasons |= dict.fromkeys(small, "too small to pay")
    return [LinearCoverage(name, *shape, readers.get(name), reasons[name]) for name, shape in shapes.items()]


def _impossible(name: str, out: int, inner: int, config: Float8) -> str | None:
    if name == "head" and not config.output_head:
        return "float8.output_head = false"
    odd = next((side for side in (out, inner) if side % MULTIPLE), None)
    return None if odd is None else f"{odd} is no multiple of {MULTIPLE}"


def _too_small(shapes: Mapping[str, tuple[int, int]], readers: Mapping[str, str], recipe: Recipe) -> set[str]:
    """The names of the layers, of those in `shapes` ([out, in] by name), that would be slower in float8.

    `readers`: layers that read a norm's output, with their branch. With "native" the readers of one norm share the cast
    of their input if all are in float8; so they are judged both one by one and together.
    """
    small = {name for name, shape in shapes.items() if gain(recipe, *shape) < 0}
    if recipe != "native":
        return small
    of_norm: dict[str, list[str]] = {}
    for name in shapes:
        if name in readers:
            of_norm.setdefault(readers[name], []).append(name)
    for names in of_norm.values():
        own_cast = [gain(recipe, *shapes[name]) for name in names]
        # The first one pays for the cast of the input.
        together = own_cast[0] + sum(gain(recipe, *shapes[name], is_cast=True) for name in names[1:])
        if len(names) > 1 and together >= sum(max(own, 0) for own in own_cast):
            small -= set(names)
    return small


def validate_device(recipe: Recipe, device: torch.device) -> None:
    """Raise UserError for a GPU without float8 tensor cores, and for "native" without Triton; a CPU emulates float8."""
    if recipe == "off" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FLOAT8_CAPABILITY:
        raise UserError(
            f"float8.recipe needs a GPU of compute capability 8.9 or higher (Ada, Hopper, ...); "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}. Set it to off"
        )
    if recipe == "native" and not has_triton():
        raise UserError('float8.recipe = "native" needs the package triton, which comes with PyTorch for CUDA')


def validate_coverage(coverage: Sequence[LinearCoverage], config: Float8) -> None:
    """Raise UserError if a recipe would convert no linear layer in the blocks of a full model."""
    blocks = [each for each in coverage if each.name != "head"]
    if not blocks or any(each.why_not is None for each in blocks):
        return
    reasons = "; ".join(dict.fromkeys(f"{each.kind} {each.inner} -> {each.out}: {each.why_not}" for each in blocks))
    small = any(each.why_not == "too small to pay" for each in blocks)
    hint = ', or float8.linear_layers = "all" to convert them nevertheless' if small else ""
    raise UserError(
        f'float8.recipe = "{config.recipe}" would convert none of {len(blocks)} linear layers ({reasons}). Choose '
        f"other widths{hint}, or set it to off"
    )


def table(coverage: Sequence[LinearCoverage], recipe: Recipe, emulated: bool = False) -> Iterator[str]:
    """Lines for the log: each kind of linear layer, how many there are, and whether in float8 or why not."""
    inside = sum(each.why_not is None for each in coverage)
    how, share = recipe + (", emulated" if emulated else ""), share_of(coverage, recipe)
    yield f"float8 ({how}): {inside} of {len(coverage)} linear layers, {share:.0%} of their operations"
    kinds = Counter((each.kind, f"{each.inner} -> {each.out}", each.why_not) for each in coverage)
    for (kind, sides, why_not), count in kinds.items():
        yield f"  {kind:<22} {count:>3} x {sides:<15} {'float8' if why_not is None else f'as it was: {why_not}'}"


def warnings(coverage: Sequence[LinearCoverage], config: Config, micro_batch_size: int) -> Iterator[str]:
    """Why float8 will not pay off on a rank with micro-batches of this many sequences; empty without linear layers."""
    if not coverage:
        return
    yield from little_gained(coverage, config, micro_batch_size)
    recipe = config.float8.recipe
    inside = {each.name: (each.out, each.inner) for each in coverage if each.why_not is None}
    readers = {each.name: each.branch for each in coverage if each.branch is not None}
    small = _too_small(inside, readers if config.parallel.tensor == 1 else {}, recipe)
    if small:
        kinds = ", ".join(
            dict.fromkeys(f"{each.kind} {each.inner} -> {each.out}" for each in coverage if each.name in small)
        )
        yield f'{kinds} in float8 will cost more than they gain: leave them with float8.linear_layers = "auto"'
    if config.float8.output_head and wants_fused_loss(
        replace(config, float8=replace(config.float8, output_head=False))
    ):
        yield "float8.output_head = true: head and loss are not computed as one then, and all logits are held in memory"


def little_gained(coverage: Sequence[LinearCoverage], config: Config, micro_batch_size: int) -> Iterator[str]:
    """Why the recipe gains little or nothing at all, on a rank with micro-batches of this many sequences."""
    recipe = config.float8.recipe
    share = share_of(coverage, recipe)
    if share < _LITTLE * _MATMULS[recipe] / 3:
        yield (
            f'float8.recipe = "{recipe}" takes {share:.0%} of the operations of linear layers at these shapes '
            "(as an H100 was measured): little will be gained, and casts cost; wider models gain"
        )
    if not config.compile.enabled:
        yield "compile.enabled = false: casts are fused with nothing then, and cost more than float8 gains"
    tokens = micro_batch_size * config.training.seq_len // config.parallel.context
    # Not divided by parallel.tensor, which divides the weights, and so the time to cast them, as well.
    fewest = int(_WEIGHT_BYTES / _BYTES / _saved(recipe))
    if tokens < fewest:
        yield (
            f"{tokens} tokens on a rank at a time: casting the weights takes longer than float8 saves below "
            f"{fewest}; raise training.local_batch_size"
        )


def share_of(coverage: Sequence[LinearCoverage], recipe: Recipe) -> float:
    """The share of all linear layers' operations, forward and backward, that is in float8."""
    total = sum(each.out * each.inner for each in coverage)
    inside = sum(each.out * each.inner for each in coverage if each.why_not is None)
    return inside / total * _MATMULS[recipe] / 3 if total else 0.0
