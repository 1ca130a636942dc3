"""A training step, as the trainer and the benchmarks take it."""

from collections.abc import Callable

from torch import Tensor

from swamla_titan.config import Config
from swamla_titan.data import StepBatch, micro_batch_count, micro_batches
from swamla_titan.distributed.mesh import World
from swamla_titan.optim import lr_factor
from swamla_titan.train.policy import StepOutcome
from swamla_titan.train.state import RunState


class TrainStep:
    """Takes a step: updates the weights of `state` by one global batch, of which this rank reads its slice.

    The host does not wait for the device. A step that is bad by its loss or gradient norm changes neither weights nor
    optimizer states, see bad_steps.py.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        state: RunState,
        micro_batch_size: int,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_update` is called before weights and states change, because a checkpoint may still copy them."""
        self.config, self.world, self.state = config, world, state
        self.micro_batch_size, self.before_update = micro_batch_size, before_update
        self.targets = config.training.global_batch_size * config.training.seq_len

    def __call__(self, batch: StepBatch, step: int) -> StepOutcome:
        """Take step number `step` (from 1); all ranks call this."""
        return self.update(self.forward_backward(batch), step)

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """Compute the gradients of the global batch's mean loss; returns this loss."""
        training, data = self.config.training, self.config.data
        count = micro_batch_count(
            batch.first, training.global_batch_size, data.streams, self.world.degrees.data, self.micro_batch_size
        )
        # Sums over the global count of targets give the mean, however ranks and micro-batches divide the batch.
        return self.state.model.train_step(list(micro_batches(batch, self.micro_batch_size, count)), self.targets)

    def update(self, loss: Tensor, step: int) -> StepOutcome:
        """Apply the gradients in step number `step`, unless it is bad."""
        training, state = self.config.training, self.state
        lr = self.config.optimizer.lr * lr_factor(self.config.lr_schedule, step - 1, training.steps)
        grad_norm = state.model.gradient_norm()
        self.before_update()
        is_bad = state.bad_steps.judge(step, loss, grad_norm) if state.bad_steps else None
        if state.ema:
            state.ema.before_update(is_bad)
        state.optimizers.step(lr, grad_norm, training.max_grad_norm, is_bad)
        if state.ema:
            state.ema.update(step, is_bad)
        return StepOutcome(loss, grad_norm, lr)
