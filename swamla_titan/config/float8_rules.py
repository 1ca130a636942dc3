"""Rules of [float8]. A value that is not the default and would have no effect is refused, as in parallel_rules.py."""

from collections.abc import Iterator

from swamla_titan.config.contradiction import Contradiction
from swamla_titan.config.sections import Config, Float8
from swamla_titan.kernels.limits import FLOAT8_MULTIPLE

_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "native", "auto")
_ONLY_WITH = {  # key -> recipes that it is for
    "products": _RECIPES,
    "output_head": _RECIPES,
    "fsdp_all_gather": ("tensorwise",),
    "gradient_dtype": ("native", "auto"),
    "fast_accumulation": ("native", "auto"),
    "loss_scaling": _RECIPES,
}


def float8_contradictions(config: Config) -> Iterator[Contradiction]:
    """Every set of keys with some of [float8] that cannot all hold."""
    float8, training, parallel = config.float8, config.training, config.parallel
    for name, recipes in _ONLY_WITH.items():
        value = getattr(float8, name)
        never = name == "fsdp_all_gather" and value == "never"  # says what is so anyway
        if value != getattr(Float8(), name) and float8.recipe not in recipes and not never:
            shown = str(value).lower() if isinstance(value, bool) else f'"{value}"'
            yield Contradiction(
                (f"float8.{name}", "float8.recipe"),
                f'{shown} has no effect with recipe = "{float8.recipe}": leave it out, or choose '
                f"{' or '.join(recipes[-2:])}",
            )
    if float8.recipe == "off":
        return
    # The latent's projections of MLA multiply the tokens of one tensor rank, the others those of a context rank.
    tokens, odd = divmod(training.seq_len, parallel.context * parallel.tensor)
    if float8.recipe != "auto" and (odd or tokens % FLOAT8_MULTIPLE):
        yield Contradiction(
            ("training.seq_len", "float8.recipe", "parallel.context", "parallel.tensor"),
            f'{training.seq_len}: float8.recipe = "{float8.recipe}" needs tokens a rank in multiples of '
            f"{FLOAT8_MULTIPLE}: make seq_len / (parallel.context x parallel.tensor) one",
        )
    if float8.output_head and config.kernels.loss == "fused":
        yield Contradiction(
            ("float8.output_head", "kernels.loss"),
            'true, but kernels.loss = "fused" computes the head with the loss in full precision: use "plain" or set '
            "this to false",
        )
    if float8.fsdp_all_gather == "always" and (why := why_not_gathered(config)):
        yield Contradiction(
            ("float8.fsdp_all_gather", *why), f'"always" cannot be with {" and ".join(why)} as set: use "auto"'
        )
    if float8.recipe == "native" and parallel.async_tensor:
        yield Contradiction(
            ("parallel.async_tensor", "float8.recipe"),
            'true has no effect with recipe = "native", whose products the compiler does not cut into pieces: set it '
            'to false, or choose "rowwise"',
        )
    if float8.loss_scaling and not config.fault_tolerance.skip_bad_steps:
        yield Contradiction(
            ("float8.loss_scaling", "fault_tolerance.skip_bad_steps"),
            "true finds its scale by steps that overflow and are skipped, but skip_bad_steps = false: make that true",
        )


def why_not_gathered(config: Config) -> list[str]:
    """Keys that keep FSDP2 from gathering weights in float8, as far as the number of ranks does not matter."""
    parallel = config.parallel
    keys = {
        "float8.recipe": config.float8.recipe != "tensorwise",
        "parallel.data_parallel": parallel.data_parallel == "ddp",
        "parallel.tensor": parallel.tensor > 1,
        "parallel.cpu_offload": parallel.cpu_offload,
    }
    return [key for key, stands_in_the_way in keys.items() if stands_in_the_way]
