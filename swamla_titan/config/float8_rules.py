"""Rules of [float8]."""

from collections.abc import Iterator

from swamla_titan.config.conflict import Conflict
from swamla_titan.config.sections import Config
from swamla_titan.kernels.limits import FLOAT8_MULTIPLE


def float8_conflicts(config: Config) -> Iterator[Conflict]:
    """Conflicts between [float8] and other keys."""
    float8, training, parallel = config.float8, config.training, config.parallel
    if float8.recipe == "off":
        return
    # Replicated linear layers multiply the tokens of one tensor-parallel rank, sharded ones those of all.
    tokens, odd = divmod(training.seq_len, parallel.context * parallel.tensor)
    if float8.recipe != "auto" and (odd or tokens % FLOAT8_MULTIPLE):
        yield Conflict(
            ("training.seq_len", "float8.recipe", "parallel.context", "parallel.tensor"),
            f'{training.seq_len}: float8.recipe = "{float8.recipe}" needs tokens a rank in multiples of '
            f"{FLOAT8_MULTIPLE}: make seq_len / (parallel.context x parallel.tensor) one",
        )
    if float8.output_head and config.kernels.loss == "fused":
        yield Conflict(
            ("float8.output_head", "kernels.loss"),
            'true, but kernels.loss = "fused" computes the head with the loss in full precision: use "plain" or set '
            "this to false",
        )
    if float8.recipe == "tensorwise" and float8.fsdp_all_gather == "always" and (why := why_not_gathered(config)):
        yield Conflict(
            ("float8.fsdp_all_gather", *why), f'"always" is not possible with {" and ".join(why)} as set: use "auto"'
        )
    if float8.loss_scaling and not config.fault_tolerance.skip_bad_steps:
        yield Conflict(
            ("float8.loss_scaling", "fault_tolerance.skip_bad_steps"),
            "true finds its scale by steps that overflow and are skipped, but skip_bad_steps = false: make that true",
        )


def why_not_gathered(config: Config) -> list[str]:
    """Keys that prevent FSDP2 from all-gathering weights in float8, whatever the number of ranks."""
    parallel = config.parallel
    keys = {
        "float8.recipe": config.float8.recipe != "tensorwise",
        "parallel.data_parallel": parallel.data_parallel == "ddp",
        "parallel.tensor": parallel.tensor > 1,
        "parallel.cpu_offload": parallel.cpu_offload,
    }
    return [key for key, stands_in_the_way in keys.items() if stands_in_the_way]
