"""Arithmetic of pipeline schedules: which rank holds which stages, how many micro-batches run, what cannot be.

Nothing here needs processes, so that a configuration can be judged before any is started.
"""

from swamla_titan.config.sections import Config, Parallel

SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble")  # gradients of inputs first, those of weights later
ONE_STAGE_A_RANK = ("GPipe", "1F1B")


def stages_per_rank(parallel: Parallel) -> int:
    """Stages that each pipeline rank holds."""
    return parallel.pipeline_stages_per_rank or (1 if parallel.pipeline_schedule in ONE_STAGE_A_RANK else 2)


def stage_count(parallel: Parallel) -> int:
    """Stages in all."""
    return parallel.pipeline * stages_per_rank(parallel)


def stage_numbers(parallel: Parallel, rank: int) -> list[int]:
    """The stages of a pipeline rank, ascending.

    Dealt out in turn, and on ZBVZeroBubble there and back: the first rank then holds the first and the last stage, and
    the last rank two that follow each other.
    """
    stages = range(stage_count(parallel))
    if parallel.pipeline_schedule == "ZBVZeroBubble":
        return [rank, stages[-1 - rank]]
    return list(stages[rank :: parallel.pipeline])


def holder(parallel: Parallel, stage: int) -> int:
    """The pipeline rank that holds a stage."""
    return next(rank for rank in range(parallel.pipeline) if stage in stage_numbers(parallel, rank))


def runnable_count(parallel: Parallel, micro_batches: int) -> int:
    """The smallest number of micro-batches, at least `micro_batches`, that the schedule can run.

    1F1B needs one for each stage; the interleaved ones go in rounds of about as many as there are ranks, equally long.
    """
    if parallel.pipeline_schedule == "1F1B":
        return max(micro_batches, stage_count(parallel))
    count = micro_batches
    if parallel.pipeline_schedule.startswith("Interleaved"):
        while count % max(1, count // parallel.pipeline):
            count += 1
    return count


def pipeline_problems(config: Config) -> list[str]:
    """Why the pipeline of this configuration cannot run, each with a way out; empty if it can."""
    parallel = config.parallel
    schedule, given = parallel.pipeline_schedule, parallel.pipeline_stages_per_rank
    if parallel.pipeline == 1:
        if given:
            return [f"parallel.pipeline_stages_per_rank = {given} applies to parallel.pipeline > 1; set it to 0"]
        return []
    found = []
    if schedule in ONE_STAGE_A_RANK and given > 1:
        found.append(
            f'parallel.pipeline_schedule = "{schedule}" holds one stage a rank, parallel.pipeline_stages_per_rank = '
            f'{given}: set that to 0, or the schedule to "Interleaved1F1B"'
        )
    elif schedule == "Interleaved1F1B" and given == 1:
        found.append(
            'parallel.pipeline_schedule = "Interleaved1F1B" interleaves at least two stages a rank, '
            'parallel.pipeline_stages_per_rank = 1: set that to 0, or the schedule to "1F1B"'
        )
    elif schedule == "ZBVZeroBubble" and given not in (0, 2):
        found.append(
            'parallel.pipeline_schedule = "ZBVZeroBubble" holds two stages a rank, parallel.pipeline_stages_per_rank = '
            f'{given}: set that to 0, or the schedule to "InterleavedZeroBubble"'
        )
    elif stage_count(parallel) > config.model.num_layers:
        found.append(
            f"parallel.pipeline = {parallel.pipeline} with {stages_per_rank(parallel)} stage(s) a rank makes "
            f"{stage_count(parallel)} stages of model.num_layers = {config.model.num_layers}: each needs a layer, so "
            "lower parallel.pipeline or parallel.pipeline_stages_per_rank, or set another parallel.pipeline_schedule"
        )
    if parallel.reduce_every_micro_batch:
        found.append(
            "parallel.reduce_every_micro_batch = true: a pipeline reduces gradients once, after its last backward "
            "pass; set it to false"
        )
    if schedule in SPLIT_BACKWARD:
        found += _split_backward_problems(config)
    return found


def _split_backward_problems(config: Config) -> list[str]:
    # Gradients of weights come from a second run over the graph, from where the first run, for the inputs, passed.
    schedule = f'parallel.pipeline_schedule = "{config.parallel.pipeline_schedule}"'
    way_out = 'or set parallel.pipeline_schedule = "Interleaved1F1B"'
    found = []
    if config.compile.enabled:
        # A compiled block is one node of the graph: torch refuses to run it twice (donated buffers), and made to, it
        # computes all its gradients both times.
        found.append(
            f"{schedule} splits backward passes in two, which compiled blocks cannot: set compile.enabled = false, "
            + way_out
        )
    if config.activation_checkpoint.mode != "none":
        # Right, but a block is computed again for each of its weights: 45 times where 1F1B does it 6 times.
        found.append(
            f"{schedule} would recompute a block once for each of its weights with activation_checkpoint.mode = "
            f'"{config.activation_checkpoint.mode}": set that to "none", {way_out}'
        )
    if config.parallel.data_parallel != "ddp" and config.parallel.reshard_after_forward == "always":
        # FSDP2 then frees the weights that the graph refers to before their gradients are computed, and loses those.
        found.append(
            f"{schedule} computes gradients of weights late and needs the gathered weights until then: set "
            f'parallel.reshard_after_forward = "auto", {way_out}'
        )
    return found
