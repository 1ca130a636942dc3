"""Whether output head and loss are one operation, by the configuration."""

from swamla_titan.config.sections import Config


def wants_fused_loss(config: Config) -> bool:
    """Whether they are one operation on a GPU; "auto": wherever it is possible, in 16 bits."""
    if config.kernels.loss != "auto":
        return config.kernels.loss == "fused"
    parallel, float8 = config.parallel, config.float8
    is_split = parallel.tensor > 1 or parallel.pipeline > 1
    return not is_split and not float8.output_head and config.training.compute_dtype != "float32"
