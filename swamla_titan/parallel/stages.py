"""Arithmetic of pipeline schedules: which rank holds which stages, how many micro-batches run, what cannot be.

Nothing here needs processes, so that a configuration can be judged before any is started.
"""

from swamla_titan.config.parallel_rules import STAGES_PER_RANK
from swamla_titan.config.sections import Parallel


def stages_per_rank(parallel: Parallel) -> int:
    """Stages that each pipeline rank holds."""
    return parallel.pipeline_stages_per_rank or STAGES_PER_RANK[parallel.pipeline_schedule]


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
