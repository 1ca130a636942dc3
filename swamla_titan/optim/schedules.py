"""Learning rate as a pure function of the step: nothing to save, nothing to apply twice after a resume."""

import math

from swamla_titan.config.sections import LRSchedule
from swamla_titan.config.stability import warmup_steps


def lr_factor(schedule: LRSchedule, step: int, steps: int) -> float:
    """Share of the peak learning rate at a step.

    Linear warm-up over `warmup_steps` (the first step already moves: it has 1/warmup_steps), then
    cosine: half a cosine from 1 to `min_lr_ratio` at the last step;
    linear: a straight line likewise;
    wsd: 1 until the last `decay_steps`, then a straight line to `min_lr_ratio`
    (warmup-stable-decay, arXiv 2404.06395).

    `step` counts from 0; `steps` is the length of the run.
    """
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "wsd":
        decay = schedule.decay_steps or max(1, steps // 10)
        start = max(steps - decay, warmup)
    else:
        start = warmup
    # The step before `start` still has the whole peak, the last one has min_lr_ratio.
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, steps - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape
