"""Rules of [parallel] that do not depend on the number of processes; distributed/degrees.py has the others."""

import math
from collections.abc import Iterator

from swamla_titan.conditions import Conflict
from swamla_titan.config.effects import has_effect
from swamla_titan.config.sections import Config

# Pipeline schedule -> stages that a rank holds if parallel.pipeline_stages_per_rank does not say.
STAGES_PER_RANK = {"GPipe": 1, "1F1B": 1, "Interleaved1F1B": 2, "InterleavedZeroBubble": 2, "ZBVZeroBubble": 2}
_SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble")
_ANY_NUMBER_OF_STAGES = ("Interleaved1F1B", "InterleavedZeroBubble")  # from two on


def parallel_conflicts(config: Config) -> Iterator[Conflict]:
    """Conflicts between [parallel], the model and the sequence length."""
    yield from _data_parallel(config)
    yield from _tensor(config)
    yield from _sequence_length(config)
    yield from _pipeline(config)


def _data_parallel(config: Config) -> Iterator[Conflict]:
    kind, shard, replicate = config.parallel.data_parallel, config.parallel.dp_shard, config.parallel.dp_replicate
    both = ("parallel.dp_replicate", "parallel.dp_shard", "parallel.data_parallel")
    for key, value in (("parallel.dp_shard", shard), ("parallel.dp_replicate", replicate)):
        if value == 0:
            yield Conflict((key,), "0: expected a number of ranks from 1, or -1 for all that are left")
    if 0 in (shard, replicate):
        return
    if kind == "fsdp" and replicate != 1:
        yield Conflict(
            ("parallel.dp_replicate", "parallel.data_parallel"),
            f'{replicate}, but data_parallel = "fsdp" keeps one copy of the weights: use "hsdp" for several, each '
            "shared by dp_shard ranks, or leave dp_replicate out",
        )
    if kind == "ddp" and shard not in (-1, 1):
        yield Conflict(
            ("parallel.dp_shard", "parallel.data_parallel"),
            f'{shard}, but with data_parallel = "ddp" each rank has all weights: use "hsdp" to share each copy among '
            f'{shard} ranks, "fsdp" for one copy, or leave dp_shard out',
        )
    if kind != "hsdp":
        return
    if replicate == -1 and shard == -1:
        yield Conflict(
            both, "dp_replicate and dp_shard are both -1, the rest: give one, such as dp_shard = the GPUs of a machine"
        )
    elif replicate == 1:
        yield Conflict(
            both,
            '1 copy of the weights is what data_parallel = "fsdp" has: use that, or give the number of copies, such as '
            "the number of machines",
        )
    elif shard == 1 and config.parallel.context == 1:  # the ranks of a sequence share the weights as well
        yield Conflict(
            ("parallel.dp_shard", *both),
            'a copy of the weights on 1 rank each is what data_parallel = "ddp" has: use that, or give the ranks that '
            "share a copy, such as the GPUs of a machine",
        )


def _tensor(config: Config) -> Iterator[Conflict]:
    model, tensor = config.model, config.parallel.tensor
    if tensor == 1:
        return
    groups = model.ffn_width // model.ffn_group
    units = f"the {groups} groups of {model.ffn_width // groups} hidden units of the feed-forward network"
    shared = [("ffn_hidden_dim", f"{units} (model.ffn_hidden_dim = {model.ffn_width})", groups)]
    heads: dict[int, str] = {}
    for key, number in model.quantities("heads").items():
        if number and has_effect(config, f"model.{key}"):
            heads.setdefault(number, key)  # reported once for a number that several kinds have
    shared = [*((key, f"model.{key} = {number}", number) for number, key in heads.items()), *shared]
    if model.vocab_size:  # else the tokenizer's, which is not known here
        padded = model.padded_vocab_size
        shared.append(("vocab_size", f"the {padded} rows of the padded vocabulary", padded))
    for key, what, number in shared:
        if problem := why_not_shared(tensor, what, number):
            yield Conflict(("parallel.tensor", f"model.{key}", "model.flavor"), problem)


def why_not_shared(tensor: int, what: str, number: int) -> str | None:
    """Why tensor-parallel ranks cannot divide `number` units of `what` evenly; None: they can."""
    if number % tensor == 0:
        return None
    divisor = next(degree for degree in range(tensor - 1, 0, -1) if number % degree == 0)
    return f"{tensor} ranks cannot share {what} equally: use tensor = {divisor}, or change the model"


def _sequence_length(config: Config) -> Iterator[Conflict]:
    length, tensor, context = config.training.seq_len, config.parallel.tensor, config.parallel.context
    # Each rank of `context` takes a slice from the front of the sequence and one from its end, for equal work under a
    # causal mask. Between linear layers the ranks of `tensor` shard these tokens.
    parts = {"2 x context": 2 * context if context > 1 else 1, "tensor": tensor}
    unit = math.prod(parts.values())
    if length % unit:
        names = " x ".join(name for name, count in parts.items() if count > 1)
        below, above = length // unit * unit, -(-length // unit) * unit
        choices = f"{below} or {above}" if below else f"{above}"
        keys = ("parallel.context", "parallel.tensor") if context > 1 else ("parallel.tensor",)
        yield Conflict(("training.seq_len", *keys), f"{length} must be a multiple of {names} = {unit}: use {choices}")


def _pipeline(config: Config) -> Iterator[Conflict]:
    parallel, layers = config.parallel, config.model.num_layers
    schedule, given = parallel.pipeline_schedule, parallel.pipeline_stages_per_rank
    if parallel.pipeline == 1:
        return
    needed = STAGES_PER_RANK[schedule]
    keys = ("parallel.pipeline_stages_per_rank", "parallel.pipeline_schedule")
    if given and given != needed and not (given > needed and schedule in _ANY_NUMBER_OF_STAGES):
        if needed == 1:
            instead = f'leave it out, or use pipeline_schedule = "{_ANY_NUMBER_OF_STAGES[0]}"'
        elif given == 1:
            instead = 'leave it out, or use pipeline_schedule = "1F1B"'
        else:
            instead = "leave it out"
        more = " or more" if schedule in _ANY_NUMBER_OF_STAGES else ""
        yield Conflict(keys, f'{given}, but pipeline_schedule = "{schedule}" takes {needed}{more}: {instead}')
        return
    per_rank = given or needed
    stages = parallel.pipeline * per_rank
    if layers < stages:
        yield Conflict(
            ("parallel.pipeline", "model.num_layers", "model.flavor", *keys),
            f"{parallel.pipeline} ranks x {per_rank} stages are {stages} stages, more than the {layers} layers of the "
            f"model: use pipeline <= {max(layers // per_rank, 1)}"
            + (', or a schedule of one stage a rank, such as "1F1B"' if per_rank > 1 else ""),
        )
    if schedule in _SPLIT_BACKWARD:
        yield from _split_backward(config)


def _split_backward(config: Config) -> Iterator[Conflict]:
    """Conflicts of schedules that split a backward pass: gradients of inputs first, those of weights later."""
    at, schedule = ("parallel.pipeline_schedule",), f'"{config.parallel.pipeline_schedule}"'
    way_out = 'or use pipeline_schedule = "Interleaved1F1B"'
    if config.compile.enabled:
        # A compiled block is one node of the graph: torch raises when it runs twice (donated buffers), and forced to,
        # it computes all its gradients both times.
        yield Conflict(
            (*at, "compile.enabled"),
            f"{schedule} splits backward passes in two, which compiled blocks cannot: set compile.enabled = false, "
            + way_out,
        )
    if config.activation_checkpoint.mode != "none":
        # Correct, but a block would be recomputed for each of its weights, not once.
        yield Conflict(
            (*at, "activation_checkpoint.mode"),
            f"{schedule} would recompute a block once for each of its weights with activation_checkpoint.mode = "
            f'"{config.activation_checkpoint.mode}": set that to "none", {way_out}',
        )
    if config.parallel.reshard_after_forward == "always":
        # FSDP2 then frees the weights that the graph refers to before their gradients are computed, and loses those.
        yield Conflict(
            (*at, "parallel.reshard_after_forward"),
            f"{schedule} needs gathered weights until their gradients are computed, late: set reshard_after_forward = "
            f'"auto", {way_out}',
        )
