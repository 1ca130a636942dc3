"""Settings against divergence: the default warm-up, and advice for configurations that lack one."""

from swamla_titan.config.schedule import Schedule
from swamla_titan.config.sections import Config, LRSchedule

WARMUP = 400  # steps: by then Adam's second moments, with beta2 = 0.95 to 0.99, have long forgotten their start
_SHARE = 10  # a short run warms up for a tenth of its steps
_LONG = 1000  # steps; shorter runs get no advice


def warmup_steps(schedule: LRSchedule, steps: int) -> int:
    """Warm-up of a run of `steps`: as configured, or 400 steps, a tenth of a short run, and not into wsd's decay."""
    if schedule.warmup_steps >= 0:
        return schedule.warmup_steps
    return max(0, min(WARMUP, steps // _SHARE, steps - schedule.decay_steps))


def stability_advice(config: Config) -> list[str]:
    """The warnings of `check` and of a run's start."""
    config = Schedule.of(config).longest.config
    training, model = config.training, config.model
    lines = []
    warmup, usual = warmup_steps(config.lr_schedule, training.steps), min(WARMUP, training.steps // _SHARE)
    if training.steps >= _LONG and warmup < usual:
        lines.append(
            f"lr_schedule.warmup_steps = {warmup} is short for a run of {training.steps:,} steps, whose first are "
            f"likeliest to diverge: {usual} or more, or leave it out"
        )
    for kind in dict.fromkeys(model.block_kinds):
        is_cut = any(window < training.seq_len for window in model.quantities("window", kind).values())
        lines += [
            f"model.{key} = 0: past the first window no query sees a sink token, on which softmax puts the attention "
            "that it does not need; 4 is usual"
            for key, sink in model.quantities("sink", kind).items()
            if is_cut and sink == 0
        ]
    if training.max_grad_norm == 0:
        lines.append(
            "training.max_grad_norm = 0 clips no gradients, so one bad batch can throw the weights off; 1.0 is usual"
        )
    return lines
