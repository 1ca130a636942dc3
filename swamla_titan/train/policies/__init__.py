"""What a run does beside its steps, one policy a file: bad steps, rewinding, watchdog, profiler and others.

The trainer calls the hooks of its policies in the order of one list, `Trainer.policies`.
"""


class Policy:
    """The hooks that the trainer calls. A policy overrides those that it needs.

    All ranks have the same policies but for the metrics logger, which rank 0 has; so only hooks of the others may
    communicate.
    """

    def before_step(self, step: int) -> None:
        """The batch of `step` (from 1) is about to be taken from the loader."""

    def after_step(self, step: int) -> None:
        """`step` was submitted to the device, which may still compute it."""

    def metrics(self) -> dict[str, float | int]:
        """This policy's values for the line of a step that is logged. The device is idle."""
        return {}

    def close(self, discard: bool) -> None:
        """The run ends. `discard`: without waiting for the device and without writing to the dump folder."""
