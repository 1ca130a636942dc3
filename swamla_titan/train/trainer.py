"""The trainer: what a run is made of, and the loop over its steps."""

import gc
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from swamla_titan.config import Config, to_toml, with_vocabulary
from swamla_titan.data import (
    BatchLoader,
    StepBatch,
    build_validation_set,
    load_tokenizer,
    micro_batch_count,
    micro_batches,
    open_corpus,
)
from swamla_titan.errors import EXIT_DONE, EXIT_STOPPED, RunFailed, UserError
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.flops import training_flops_per_token
from swamla_titan.optim import build_optimizer, clip_gradients, lr_factor, set_learning_rate
from swamla_titan.parallel.parallelize import parallelize
from swamla_titan.parallel.world import join_world
from swamla_titan.train.announce import announce
from swamla_titan.train.checkpoint import (
    CONFIG,
    VOCABULARY,
    Checkpoints,
    Record,
    load_tensors,
    read_record,
    refuse_other_run,
    tensors_of,
)
from swamla_titan.train.dump_folder import exclusive, log_to_folder, prepare_folder
from swamla_titan.train.identity import run_identity
from swamla_titan.train.metrics import MetricsLogger, require_wandb, step_line
from swamla_titan.train.numerics import set_numerics
from swamla_titan.train.profiling import StepProfiler
from swamla_titan.train.random_state import random_state, set_random_state
from swamla_titan.train.signals import StopRequest
from swamla_titan.train.throughput import Throughput
from swamla_titan.train.validation import Validator

logger = logging.getLogger(__name__)


class Trainer:
    """One run: built from a configuration, resumed from its newest whole checkpoint if there is one.

    Raises UserError for anything wrong with the configuration, tokenizer, data or checkpoint before it writes to
    the dump folder.
    """

    def __init__(self, config: Config, stop: StopRequest) -> None:
        self.stop = stop
        self.world = join_world()
        self.device = self.world.device
        set_numerics(config, self.device)
        tokenizer = load_tokenizer(config.data.tokenizer)
        self.config = config = with_vocabulary(config, tokenizer.vocab_size)
        self.tokens_per_step = config.training.global_batch_size * config.training.seq_len
        self.rows = min(config.training.local_batch_size, -(-config.training.global_batch_size // self.world.size))

        corpus = open_corpus(config.data, config.validation, config.job.seed, tokenizer)
        self.identity = run_identity(config, corpus)
        self.folder = Path(config.job.dump_folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.checkpoint.keep_latest)
        newest = self.checkpoints.newest_whole()
        record = read_record(newest) if newest else Record(step=0, tokens=0, cursors={}, identity=self.identity)
        if newest:
            refuse_other_run(newest, record.identity, self.identity)

        self.validator = None
        if config.validation.interval:
            held_out = build_validation_set(corpus, config.validation, config.training.seq_len)
            assert held_out is not None, "the configuration's rules ask for a path or a fraction"
            self.validator = Validator(held_out, self.world, self.rows)

        with torch.device("meta"):
            self.model = SWAMLAModel(config.model)
        self.model.to_empty(device=self.device)
        if not newest:
            self.model.init_weights(config.job.seed)
        parallelize(self.model, config)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        if newest:
            self._load(newest)
        self.step, self.tokens, self.replaced = record.step, record.tokens, record.replaced_bytes
        self._saved_step = record.step

        self.loader = BatchLoader(
            corpus,
            seq_len=config.training.seq_len,
            global_batch_size=config.training.global_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            cursors=record.cursors if newest else None,
            start_step=self.step,
        )
        if config.metrics.wandb:
            require_wandb()
        # From here on nothing is refused any more.
        if self.step < config.training.steps:  # else the folder tells of the run that is finished
            prepare_folder(self.folder, to_toml(config))
        log_to_folder(self.folder, self.world.rank)
        self.metrics = MetricsLogger(config.metrics, self.folder, asdict(config), self.step, config.training.steps)
        self.profiler = StepProfiler(config.profiling, self.folder / "traces")
        flops = training_flops_per_token(config.model, config.training.seq_len)
        self.throughput = Throughput(self.device, self.world.size, flops, self.tokens_per_step)
        announce(config, self.device, corpus, self.rows, self.step, newest)

    def run(self) -> int:
        """Train to the last step; returns the exit code. Ends early, checkpointed, when a signal asks for it."""
        config = self.config
        first_step = self.step + 1
        batches = iter(self.loader)
        if config.training.gc_interval:
            gc.disable()  # a collection at a random moment on one rank stalls all; below all collect at the same steps
        while self.step < config.training.steps:
            self.profiler.before_step(self.step + 1)
            with self.throughput.data_wait():
                batch = self._next_batch(batches)
            self.outcome = self.train_step(batch)
            self.step += 1
            self.tokens += self.tokens_per_step
            self.metrics.advance()
            self.profiler.after_step(self.step)

            stopped_by = self.stop.received  # read once: a signal later in this step is for the next one
            finished = self.step == config.training.steps
            save = finished or stopped_by or self.step % config.checkpoint.interval == 0
            validate = self.validator and (finished or self.step % config.validation.interval == 0)
            if save or validate or self.step == first_step or self.step % config.metrics.log_interval == 0:
                self._log_step()
            if self.validator and validate:
                self._validate(self.validator)
            if save:
                self._save()
            if config.training.gc_interval and self.step % config.training.gc_interval == 0:
                gc.collect(1)
            if stopped_by and not finished:
                logger.info("stopped by %s after step %d; the same command goes on", stopped_by.name, self.step)
                return EXIT_STOPPED
        logger.info('done; let it write: swamla-titan generate %s --prompt "The"', self.folder)
        return EXIT_DONE

    def train_step(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on this rank's part of a global batch, without waiting for the device.

        Returns the mean loss over the global batch's targets and the gradient norm before clipping, on the device.
        """
        training = self.config.training
        lr = self.config.optimizer.lr * lr_factor(self.config.lr_schedule, self.step, training.steps)
        set_learning_rate(self.optimizer, lr)
        count = micro_batch_count(
            self.step, training.global_batch_size, self.config.data.streams, self.world.size, self.rows
        )
        loss = torch.zeros((), device=self.device)
        for micro_batch in micro_batches(batch, self.rows, count):
            inputs = micro_batch.to(self.device)
            # A sum over the global count: the mean over the global batch, however it is cut in micro-batches.
            part = self.model(inputs.tokens, inputs.targets, inputs.document_ids, loss_denominator=self.tokens_per_step)
            part.backward()
            loss += part.detach()
        grad_norm = clip_gradients(self.model, training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, grad_norm

    def close(self) -> None:
        """Stop the loader's processes, write a profile that was begun and flush the metrics."""
        gc.enable()
        self.loader.close()
        self.profiler.close()
        self.metrics.close()

    def _next_batch(self, batches: Any) -> StepBatch:
        """The next step's batch. If the data turns out bad, what was learnt so far is saved before the run ends."""
        try:
            batch: StepBatch = next(batches)
        except (UserError, RunFailed):
            if self.step > self._saved_step:
                self._save()
            raise
        if batch.replaced and not self.replaced:
            logger.warning("the data holds bytes that are not UTF-8; they are read as U+FFFD and counted")
        self.replaced += batch.replaced
        return batch

    def _log_step(self) -> None:
        """Read the step's values from the device, which waits for it, and send them to the logs."""
        loss, grad_norm = self.outcome
        values: dict[str, float | int] = {
            "tokens": self.tokens,
            "loss": loss.item(),
            "grad_norm": grad_norm.item(),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        values |= self.throughput.read()
        eta = (self.config.training.steps - self.step) * values["step_seconds"]
        self.metrics.log(self.step, values, step_line(self.step, self.config.training.steps, values, eta))
        self._require_finite()

    def _require_finite(self) -> None:
        """Raise RunFailed if the last step's loss or gradient norm is no number: its weights must not be kept."""
        loss, grad_norm = (value.item() for value in self.outcome)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise RunFailed(
                f"step {self.step}: loss {loss}, gradient norm {grad_norm}; this step is not saved. "
                "Lower optimizer.lr or lengthen lr_schedule.warmup_steps, and start the same command again. If the "
                "loss had risen for long, move the newest checkpoints away first"
            )

    def _validate(self, validator: Validator) -> None:
        with self.throughput.paused():
            values = validator(self.model)
        line = f"validation: loss {values['val_loss']:.4f}, {values['val_bits_per_byte']:.4f} bits per byte"
        self.metrics.log(self.step, values, line)

    def _save(self) -> None:
        self._require_finite()
        with self.throughput.paused():
            cursors = self.loader.state_dict()
            record = Record(self.step, self.tokens, cursors, self.identity, self.replaced)
            tensors = tensors_of(self.model, self.optimizer) | {"random": random_state(self.device)}
            path = self.checkpoints.save(tensors, record, self._files())
            self._saved_step = self.step
        logger.info("checkpoint %s", path)

    def _files(self) -> dict[str, bytes]:
        """What a checkpoint needs to be used elsewhere: the configuration, and a vocabulary that lies in a file."""
        files = {CONFIG: to_toml(self.config).encode()}
        vocabulary = Path(self.config.data.tokenizer)
        return files | ({VOCABULARY: vocabulary.read_bytes()} if vocabulary.suffix == ".tiktoken" else {})

    def _load(self, path: Path) -> None:
        tensors = tensors_of(self.model, self.optimizer) | {"random": random_state(self.device)}
        load_tensors(path, tensors)
        set_random_state(tensors["random"], self.device)


def train(config: Config) -> int:
    """Run a configuration to its end; returns the exit code."""
    stop = StopRequest()
    try:
        with exclusive(Path(config.job.dump_folder)):
            trainer = Trainer(config, stop)
            stop.finish_step_first = True
            try:
                return trainer.run()
            finally:
                trainer.close()
    finally:
        stop.forget()
