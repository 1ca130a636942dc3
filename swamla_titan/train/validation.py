"""Validations, which all ranks share: loss and bits per byte on held-out text, and tasks of lm-evaluation-harness."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from swamla_titan.config import Config
from swamla_titan.data import IGNORED, Tokenizer, ValidationSet
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import RunFailed, UserError
from swamla_titan.optim import AveragedWeights
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.train.policy import Values
from swamla_titan.train.scoring import Scorer

logger = logging.getLogger(__name__)


class Validation(ABC):
    """Measures a model every `interval` steps, and after the last."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    @abstractmethod
    def __call__(self, model: ParallelModel, average: AveragedWeights | None = None) -> Values:
        """The values to log, on rank 0; all ranks call this. With `average` the model computes with its weights."""

    @abstractmethod
    def line(self, values: Values) -> str:
        """The values for the console."""


class Validator(Validation):
    """Evaluates a model on this rank's slice of the held-out sequences.

    All ranks run equally many micro-batches, so that collectives inside the model match.
    """

    def __init__(
        self, held_out: ValidationSet, world: World, micro_batch_size: int, interval: int = 1, number: int = 1
    ) -> None:
        """`number`: which text of the run it is, see validation_record. UserError where there is nothing to predict."""
        super().__init__(interval)
        self.number = {"val_set": number} if number > 1 else {}
        self.micro_batches = list(held_out.micro_batches(world.data_rank, world.degrees.data, micro_batch_size))
        self.num_targets = int((held_out.targets != IGNORED).sum())
        self.num_bytes = int(held_out.target_bytes.sum())
        if self.num_bytes == 0:
            raise UserError(
                "the validation text is a single token long, so there is nothing to predict: raise "
                "validation.fraction, give a longer validation.path, or set validation.interval = 0"
            )

    def __call__(self, model: ParallelModel, average: AveragedWeights | None = None) -> Values:
        """`val_loss`: mean cross-entropy in nats a target token; `val_bits_per_byte`: the same in bits a byte of text.

        The end-of-text token counts in the loss and adds no bytes. `val_set`: the number of the text, if not the first.
        """
        with average.in_place_of_weights() if average else nullcontext():
            nats = model.evaluate(self.micro_batches).item()
        return {
            "val_loss": nats / self.num_targets,
            "val_bits_per_byte": nats / math.log(2) / self.num_bytes,
            **self.number,
        }

    def line(self, values: Values) -> str:
        """See Validation."""
        return f"loss {values['val_loss']:.4f}, {values['val_bits_per_byte']:.4f} bits per byte"


class MixtureValidator(Validation):
    """Evaluates a model on the held-out text of each source of a mixture.

    The joint values are those of text in which the sources have their weights, so they are comparable to the training
    loss however much text there is of each.
    """

    def __init__(
        self,
        held_out: Mapping[str, ValidationSet],
        weights: Mapping[str, float],
        world: World,
        micro_batch_size: int,
        interval: int = 1,
        number: int = 1,
    ) -> None:
        """`held_out` and `weights` by source; `number` as for Validator."""
        super().__init__(interval)
        self.weights = weights
        self.of_sources = {name: Validator(each, world, micro_batch_size) for name, each in held_out.items()}
        self.number = {"val_set": number} if number > 1 else {}

    def __call__(self, model: ParallelModel, average: AveragedWeights | None = None) -> Values:
        """`val_loss`, `val_bits_per_byte`, `val_set` as of Validator; `val_loss/NAME` and the like for each source."""
        with average.in_place_of_weights() if average else nullcontext():
            found = {name: each(model) for name, each in self.of_sources.items()}
        loss = sum(self.weights[name] * values["val_loss"] for name, values in found.items())
        bytes_a_target = sum(
            self.weights[name] * each.num_bytes / each.num_targets for name, each in self.of_sources.items()
        )
        own = {f"{key}/{name}": value for name, values in found.items() for key, value in values.items()}
        return {"val_loss": loss, "val_bits_per_byte": loss / math.log(2) / bytes_a_target, **own, **self.number}

    def line(self, values: Values) -> str:
        """See Validation."""
        own = ", ".join(f"{name} {values[f'val_loss/{name}']:.4f}" for name in self.of_sources)
        return f"loss {values['val_loss']:.4f}, {values['val_bits_per_byte']:.4f} bits per byte ({own})"


class TaskValidator(Validation):
    """Scores the tasks of validation.tasks."""

    def __init__(self, config: Config, world: World, tokenizer: Tokenizer, micro_batch_size: int) -> None:
        """All ranks call this. UserError for tasks that there are not, whose data cannot be had, or that generate."""
        from swamla_titan.train.harness import Tasks  # needs lm_eval, which few runs have

        super().__init__(config.validation.tasks_interval)
        self.world, self.tokenizer, self.micro_batch_size = world, tokenizer, micro_batch_size
        self.seq_len, self.limit = config.training.seq_len, config.validation.tasks_limit
        self.tasks = Tasks(task_names(config.validation.tasks), world, generates=False)

    def __call__(self, model: ParallelModel, average: AveragedWeights | None = None) -> Values:
        """TASK/METRIC of each task. What the harness raises is logged, and the run continues without values."""
        scorer = Scorer(self.world, self.seq_len, self.micro_batch_size, model.score)
        try:
            with average.in_place_of_weights() if average else nullcontext():
                return self.tasks.run(self.tokenizer, scorer, None, self.seq_len, self.limit)
        except RunFailed as error:
            if self.world.is_rank_0:
                logger.warning("validation: %s", error)
            return {}

    def line(self, values: Values) -> str:
        """See Validation."""
        return ", ".join(f"{name} {value:.4f}" for name, value in values.items()) or "no tasks"


def task_names(text: str) -> list[str]:
    """Names that commas separate."""
    return [name.strip() for name in text.split(",") if name.strip()]


def require_harness(by: str) -> Any:
    """The package lm_eval. Raises UserError, which says that `by` asks for it, unless it can be imported."""
    try:
        import lm_eval.evaluator
    except Exception as error:  # whatever a broken installation raises
        raise UserError(
            f"{by} needs lm-evaluation-harness, which cannot be imported ({type(error).__name__}: {error}): "
            "pip install 'swamla-titan[eval]'"
        ) from None
    return lm_eval
