"""Products of keys, each within its own bounds, that would keep `plan` and the start of a run busy for hours."""

from collections.abc import Iterator
from dataclasses import fields

from swamla_titan.config.contradiction import Contradiction
from swamla_titan.config.sections import MOST_RANKS, Config
from swamla_titan.distributed.degrees import DIMENSIONS

_MOST_TOKENS = 1 << 36  # of a step: 69 billion
_MOST_PARAMETERS = 1 << 47  # 140 trillion
_MOST_ACTIONS = 1 << 18  # of a pipeline's schedule
_MOST_CUTS = 1 << 26  # that cutting the layers in stages looks at


def size_contradictions(config: Config) -> Iterator[Contradiction]:
    """Keys that are too large together."""
    training, model, parallel = config.training, config.model, config.parallel
    tokens = training.global_batch_size * training.seq_len
    if tokens > _MOST_TOKENS:
        yield Contradiction(
            ("training.global_batch_size", "training.seq_len"),
            f"{training.global_batch_size} sequences of {training.seq_len} tokens are more than the {_MOST_TOKENS} "
            "tokens that a step may have: lower one of them",
        )
    heads = model.num_heads * (model.qk_nope_head_dim + model.qk_rope_head_dim + 2 * model.v_head_dim)
    layer = model.dim * (3 * model.ffn_width + heads + model.q_lora_rank + model.kv_lora_rank)
    if model.num_layers * layer > _MOST_PARAMETERS:
        yield Contradiction(
            ("model.num_layers", "model.dim", "model.ffn_hidden_dim", "model.num_heads"),
            f"{model.num_layers} layers of width {model.dim} have more than {_MOST_PARAMETERS} parameters: lower one "
            "of model.num_layers, model.dim, model.ffn_hidden_dim, model.num_heads and the widths of heads",
        )
    keys = {dimension.key for dimension in DIMENSIONS}
    degrees = {each.name: getattr(parallel, each.name) for each in fields(parallel) if each.name in keys}
    ranks = 1
    for degree in degrees.values():
        ranks *= max(degree, 1)
    if ranks > MOST_RANKS:
        named = {name: degree for name, degree in degrees.items() if degree > 1}
        yield Contradiction(
            tuple(f"parallel.{name}" for name in named),
            f"{' x '.join(f'{name} {degree}' for name, degree in named.items())} are more than {MOST_RANKS} ranks: "
            "lower one of them",
        )
    if parallel.pipeline == 1:
        return
    stages = parallel.pipeline * max(parallel.pipeline_stages_per_rank, 1)
    at_a_time = training.local_batch_size * max(parallel.dp_shard, 1) * max(parallel.dp_replicate, 1)
    micro_batches = -(-training.global_batch_size // at_a_time)
    if stages * micro_batches > _MOST_ACTIONS:
        yield Contradiction(
            ("training.global_batch_size", "training.local_batch_size", "parallel.pipeline"),
            f"{micro_batches} micro-batches through {stages} stages are more than a schedule of {_MOST_ACTIONS} steps: "
            "raise training.local_batch_size, or lower this",
        )
    if stages * model.num_layers**2 > _MOST_CUTS:
        yield Contradiction(
            ("parallel.pipeline", "model.num_layers"),
            f"{model.num_layers} layers cannot be cut in {stages} stages within a reasonable time: lower one of them",
        )
