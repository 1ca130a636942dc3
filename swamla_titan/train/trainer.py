"""The trainer: what a run is made of, and the loop over its steps."""

import dataclasses
import gc
import logging
import math
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from swamla_titan.checkpoint.async_save import Saver
from swamla_titan.checkpoint.dump_folder import Hold, log_to_folder, prepare_folder
from swamla_titan.checkpoint.manifest import CONFIG, DATA, VOCABULARY
from swamla_titan.checkpoint.resume import Origin, find_origin, require_same_data, run_fingerprint
from swamla_titan.checkpoint.store import Checkpoints
from swamla_titan.checkpoint.train_state import TrainState, data_record, validation_record
from swamla_titan.config import Config, to_toml
from swamla_titan.data import (
    BatchLoader,
    Corpus,
    StepBatch,
    micro_batch_count,
    micro_batches,
    pinned,
    prepare_workers,
    rows_at_a_time,
)
from swamla_titan.distributed.agreement import all_gather_dict, all_ranks_or_raise, broadcast_from_rank_0
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import EXIT_DONE, EXIT_REGROUP, RunFailed, UserError
from swamla_titan.launch.signals import Stop, StopRequest
from swamla_titan.model.flops import training_flops_per_token
from swamla_titan.optim import clip_gradients, lr_factor, refuse_old_gpu, set_learning_rate, skip_where
from swamla_titan.parallel.activation_checkpoint import refuse_recomputation
from swamla_titan.parallel.automatic import Choice, choose, float8_moments_advice, saved_by_float8_moments
from swamla_titan.parallel.compile import compilation, warm_compiler
from swamla_titan.parallel.parallelize import refuse_float8
from swamla_titan.train.announce import announce
from swamla_titan.train.kernels import attention_of, pointwise_of
from swamla_titan.train.metrics import MetricsLogger, require_wandb, step_line
from swamla_titan.train.next_batch import next_batch
from swamla_titan.train.numerics import set_numerics
from swamla_titan.train.open_data import open_data
from swamla_titan.train.policies.bad_batches import BatchPlaces
from swamla_titan.train.policies.bad_steps import are_finite, remedies, warning
from swamla_titan.train.policies.data_wait import DataWait, cores_per_rank, what_helps
from swamla_titan.train.policies.profiling import StepProfiler
from swamla_titan.train.policies.rewinding import Rewinding
from swamla_titan.train.policies.skipped_files import SkippedFiles
from swamla_titan.train.policies.watchdog import Watchdog
from swamla_titan.train.state import GROUPS, RunState
from swamla_titan.train.throughput import Throughput
from swamla_titan.train.validation import Validator

logger = logging.getLogger(__name__)


class Trainer:
    """One run: built from a configuration, resumed from its newest intact checkpoint if there is one.

    Every rank builds one. Raises UserError, on every rank, for anything wrong with the configuration, tokenizer, data
    or checkpoint before it writes to the dump folder, and DamagedCheckpoints where there may be an older one to use.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        stop: StopRequest,
        watchdog: Watchdog,
        hold: Hold | None = None,
        damaged: dict[Path, str] | None = None,
    ) -> None:
        """`hold`: of the dump folder, by the rank that holds it for all. `damaged`: of a DamagedCheckpoints before."""
        self.hold = hold
        self.world, self.stop, self.watchdog = world, stop, watchdog
        self.device = world.device
        set_numerics(config, self.device, world.rank)
        all_ranks_or_raise(world, lambda: _refuse_what_cannot_be(config, world))
        all_ranks_or_raise(world, lambda: _start_helpers(config, world))
        config = dataclasses.replace(config, data=broadcast_from_rank_0(world, lambda: pinned(config.data)))
        self.folder = Path(config.job.dump_folder)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            config.checkpoint.keep_latest,
            world.with_group_of_its_own(),
            config.checkpoint.keep_every,
            damaged,
            GROUPS,
        )
        if hold:
            self.checkpoints.may_write = hold.require
        origin = find_origin(self.checkpoints)
        with self.checkpoints.loading(origin.path):
            self.config, corpus, held_out = all_ranks_or_raise(world, lambda: open_data(config, origin.data))
        require_same_data(world, corpus)
        corpus = corpus.with_segments(broadcast_from_rank_0(world, lambda: corpus.segments))
        # Only now: the head's share of the products depends on the vocabulary.
        self.config, self.choices = agree_on_auto(self.config, world, origin)
        config = self.config
        self.tokens_per_step = config.training.global_batch_size * config.training.seq_len
        training = config.training
        self.rows = rows_at_a_time(training.local_batch_size, training.global_batch_size, world.degrees.data)
        self.validator = all_ranks_or_raise(world, lambda: held_out and Validator(held_out, world, self.rows))

        validation = validation_record(origin.data, held_out)
        self.validation_set = validation["set"] if validation else 1
        self.files = all_ranks_or_raise(world, lambda: _files(config, corpus, validation))
        self.fingerprint = run_fingerprint(config, corpus)
        details = {"source": corpus.change}
        state = broadcast_from_rank_0(world, lambda: origin.resume(self.fingerprint, config.checkpoint.allow, details))

        self.step, self.tokens, self.sequences = state.step, state.tokens, state.sequences
        self.replaced_before = state.replaced_bytes  # by all ranks, before this start
        self.replaced = 0  # by this rank, since
        with self.checkpoints.loading(origin.path):
            self.loader = all_ranks_or_raise(world, lambda: self._open_loader(corpus, state.cursors or None))
        with ExitStack() as refused:
            refused.callback(self.loader.close)
            if self.step < training.steps:
                all_ranks_or_raise(world, self.loader.start)  # it reads ahead while the model is made
            self._prepare(corpus, state, origin.path)
            refused.pop_all()

    def _prepare(self, corpus: Corpus, train_state: TrainState, newest: Path | None) -> None:
        """Make what trains, filled from the checkpoint `newest` if there is one, and what writes to the folder."""
        config, world = self.config, self.world
        with self.checkpoints.loading(newest):
            self.state = RunState(config, world, newest, train_state.step)
        self.model, self.optimizers = self.state.model, self.state.optimizers
        self.bad_steps = self.state.bad_steps
        self.rewinding = self.bad_steps and Rewinding(config, self.checkpoints, self.bad_steps, world)
        self.loss_scale = self.state.loss_scale
        # The row that stops a run, and the step after it, see BadSteps.too_many.
        self.places = BatchPlaces(self.loader, steps=config.fault_tolerance.max_bad_steps + 1)
        if config.metrics.wandb:
            all_ranks_or_raise(world, require_wandb)
        # From here on nothing is refused any more.
        if self.step < config.training.steps:  # else the folder tells of the run that is finished
            broadcast_from_rank_0(world, lambda: prepare_folder(self.folder, to_toml(config)))
        all_ranks_or_raise(world, lambda: log_to_folder(self.folder, world.rank))
        self.skipped_files = SkippedFiles(self.folder, corpus, train_state.cursors, writes=self._may_write)
        self.metrics = all_ranks_or_raise(world, self._open_metrics)
        expected = self.state.size() if self.step < config.training.steps else 0
        self.saver = Saver(config.checkpoint, self.checkpoints, self.device, self.step, expected)
        self.profiler = StepProfiler(config.profiling, self.folder / "traces", world.rank)
        flops = training_flops_per_token(config.model, config.training.seq_len)
        self.throughput = Throughput(self.device, world.size, flops, self.tokens_per_step)
        streams = -(-config.data.streams // world.degrees.data)
        self.data_wait = DataWait(what_helps(config.data, corpus.source.num_units, streams, cores_per_rank()))
        announce(config, world, corpus, self.rows, train_state, newest, self.choices)
        self._advise_float8_moments()

    def _advise_float8_moments(self) -> None:
        saved = self.world.all_reduce_max(saved_by_float8_moments(self.model.parts, self.config))
        if saved > 0 and self.world.is_rank_0:
            logger.info(f"float8: {float8_moments_advice(int(saved))}; a run keeps the optimizer that it began with")

    def run(self) -> int:
        """Train to the last step; returns the exit code. Ends early, checkpointed, when a signal asks for it."""
        config = self.config
        first_step = self.step + 1
        if config.training.gc_interval:
            gc.disable()  # a collection at a random moment on one rank stalls all; below all collect at the same steps
            gc.freeze()  # what is here stays, and need not be looked through
        self.watchdog.begin(self.step)
        while self.step < config.training.steps:
            self.profiler.before_step(self.step + 1)
            if self.bad_steps:
                self.places.before_batch(self.step + 1)
            with self.throughput.data_wait():
                batch = self._next_batch()
            if isinstance(batch, Stop):
                return self._stopped_while_waiting(batch)
            self.outcome = self.train_step(batch)
            self.step += 1
            self.watchdog.progress(self.step)
            self.tokens += self.tokens_per_step
            self.sequences += config.training.global_batch_size
            if self.metrics:
                self.metrics.advance()
            self.profiler.after_step(self.step)

            stop = self.stop.agreed(
                self.world.all_reduce_max
            )  # asked once: a signal later in this step is for the next one
            finished = self.step == config.training.steps
            save = finished or stop or self.step % config.checkpoint.interval == 0
            validate = self.validator and (finished or self.step % config.validation.interval == 0)
            hopeless = self.bad_steps is not None and self.bad_steps.too_many(self.step)
            log = self.step == first_step or self.step % config.metrics.log_interval == 0
            if log or save or validate or hopeless:
                self._log_step()
                self._rewind_or_give_up_if(hopeless)
            if config.compile.enabled and self.step == first_step:
                logger.info("%s", compilation())
            if self.validator and validate:
                self._validate(self.validator)
            if save:
                self._save(last=finished or stop is not None)
            if config.training.gc_interval and not finished and not stop:
                self._collect_garbage(self.step == first_step, saved=self.step % config.checkpoint.interval == 0)
            if stop and (not finished or stop.code == EXIT_REGROUP):  # all meet again, also to see that it is done
                logger.info("%s after step %d; %s", stop.reason, self.step, stop.outlook)
                return stop.code
        logger.info('done; let it write: swamla-titan generate %s --prompt "The"', self.folder)
        return EXIT_DONE

    def _collect_garbage(self, first: bool, saved: bool) -> None:
        """All of it at checkpoints, which takes milliseconds: what begins with the run is not looked through."""
        if first and self.config.compile.enabled:
            gc.collect()
            gc.freeze()  # compiled code stays too
        elif saved or self.step % self.config.training.gc_interval == 0:
            gc.collect(2 if saved else 1)

    def train_step(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on this rank's part of a global batch, without waiting for the device.

        Returns the mean loss over the global batch's targets and the gradient norm before clipping, on the device. A
        step that is bad by them changes neither weights nor optimizer states, see policies/bad_steps.py.
        """
        training = self.config.training
        lr = self.config.optimizer.lr * lr_factor(self.config.lr_schedule, self.step, training.steps)
        count = micro_batch_count(
            batch.first, training.global_batch_size, self.config.data.streams, self.world.degrees.data, self.rows
        )
        # Sums over the global count: the mean over the global batch, however it is cut into micro-batches and ranks.
        loss = self.model.train_step(list(micro_batches(batch, self.rows, count)), self.tokens_per_step)
        grad_norm = self.model.gradient_norm()
        self.saver.before_update()
        bad = self.bad_steps.judge(self.step + 1, loss, grad_norm) if self.bad_steps else None
        if self.loss_scale:
            self.loss_scale.update(grad_norm)
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, lr)
            clip_gradients(optimizer, grad_norm, training.max_grad_norm)
            skip_where(optimizer, bad)
            optimizer.step()
            optimizer.zero_grad()
        if self.state.ema:
            self.state.ema.update(self.step + 1, bad)
        self.lr = lr
        return loss, grad_norm

    def close(self, alone: bool = False, folder_lost: bool = False) -> None:
        """Stop the loader's processes, write a profile that was begun and flush the metrics.

        `alone`: this rank ends and the others do not, so that its device may never be done; a profile is dropped then,
        and where the folder is not this run's any more.
        """
        gc.enable()
        gc.unfreeze()
        self.loader.close()
        with self.watchdog.pause("checkpoint"):
            self.saver.close(alone)
        if alone or folder_lost:
            self.profiler.discard()
        else:
            self.profiler.close()
        if self.metrics:
            self.metrics.close()

    def _next_batch(self) -> StepBatch | Stop:
        """The next step's batch, or what asks to stop while it is waited for.

        If the data turn out bad, what was learnt so far is saved before the run ends.
        """
        try:
            batch = next_batch(self.world, self.loader, self.step + 1, self.sequences, self.stop, self.skipped_files)
        except (UserError, RunFailed) as error:
            try:
                self._save_if_new()
            except RunFailed:
                logger.error("%s", error)  # else only what follows from it would be told
                raise
            raise
        if isinstance(batch, Stop):
            return batch
        if batch.replaced and not self.replaced + self.replaced_before:
            logger.warning("the data holds bytes that are not UTF-8; they are read as U+FFFD and counted")
        self.replaced += batch.replaced
        return batch

    def _stopped_while_waiting(self, stop: Stop) -> int:
        """Save, if there is anything new, and return the exit code."""
        self._save_if_new()
        logger.info("%s while waiting for data after step %d; %s", stop.reason, self.step, stop.outlook)
        return stop.code

    def _may_write(self) -> bool:
        """Whether this rank writes what there is one of in the dump folder, and may do so."""
        return self.world.is_rank_0 and not (self.hold and self.hold.is_lost)

    def _require_folder(self) -> None:
        """Raise FolderLost, on every rank, if the dump folder is not this run's any more."""
        broadcast_from_rank_0(self.world, lambda: self.hold.require() if self.hold else None)

    def _log_step(self) -> None:
        """Read the step's values from the device, which waits for it, and send them to the logs."""
        self._require_folder()
        loss, grad_norm = self.outcome
        values: dict[str, float | int] = {
            "tokens": self.tokens,
            "loss": loss.item(),
            "grad_norm": grad_norm.item(),
            "lr": self.lr,
        }
        values |= self.throughput.read()
        if self.bad_steps:
            self._report_bad_steps()
            values["skipped_steps"] = self.bad_steps.skipped
            values |= {"rewinds": self.bad_steps.rewinds} if self.bad_steps.rewinds else {}
        if self.loss_scale:
            values["loss_scale"] = self.loss_scale.value.item()
        if self.skipped_files.count:
            values["skipped_files"] = self.skipped_files.count
        values["memory_gib"] = self.world.all_reduce_max(values["memory_gib"])
        eta = (self.config.training.steps - self.step) * values["step_seconds"]
        self._log(values, step_line(self.step, self.config.training.steps, values, eta))
        if warning_of_wait := self.data_wait.warning(self.throughput.interval):
            logger.warning("%s", warning_of_wait)
        self._require_finite()

    def _log(self, values: dict[str, float | int], line: str) -> None:
        """Have the first rank write `values`."""
        if self.metrics:
            self.metrics.log(self.step, values, line)

    def _open_metrics(self) -> MetricsLogger | None:
        if not self.world.is_rank_0:
            return None
        config = self.config
        return MetricsLogger(config.metrics, self.folder, asdict(config), self.step, config.training.steps)

    def _report_bad_steps(self) -> None:
        """Warn of the steps skipped since the last call; waits for the device."""
        news = self.bad_steps.read() if self.bad_steps else []
        if self.bad_steps and news:
            logger.warning("%s. %s", warning(news, self.bad_steps.skipped), remedies(self.config))

    def _require_finite(self, to_save: bool = False) -> bool:
        """Whether the weights may be kept; if not, and nothing mends them, raise RunFailed, on every rank.

        Where bad steps are applied they are those of a step whose loss or gradient norm is no number. Where they are
        skipped, weights that have themselves become no numbers, by a good step that was far too large: all steps after
        it are bad, and none mends them, but a rewind does. Looked for before saving, and where a bad step gives cause.
        """
        loss, grad_norm = (value.item() for value in self.outcome)
        if self.bad_steps and self.rewinding:
            suspected = to_save or self.bad_steps.in_row > 0
            kept = not suspected or are_finite(self.model.parts, self.world)
            what = "the weights are no finite numbers any more; they are not saved"
            if not kept and self.rewinding.may_mend(self.step):
                return False
        else:
            kept, what = math.isfinite(loss) and math.isfinite(grad_norm), "this step is not saved"
        if not kept:
            raise RunFailed(
                f"step {self.step}: loss {loss}, gradient norm {grad_norm}; {what}. "
                f"{remedies(self.config)}. Then start the same command again. If the loss had risen for long, move "
                "the newest checkpoints away first"
            )
        return True

    def _rewind_or_give_up_if(self, hopeless: bool) -> None:
        """If too many steps in a row were bad, now or a step ago, rewind, or save and raise RunFailed on every rank."""
        if not self.bad_steps or not self.rewinding:
            return
        full = self.bad_steps.in_row >= self.config.fault_tolerance.max_bad_steps
        # At once where it is known; but a rewind changes the weights, and must not come earlier for a line in a log.
        if not hopeless and not (full and not self.rewinding.is_possible(self.step)):
            return
        row = self.bad_steps.row()
        path = self.folder / "traces" / f"bad-steps-{self.step}.json"
        size = self.config.training.global_batch_size
        first = self.sequences - self.step * size  # not 0 where checkpoint.allow has changed the batch or the data
        self.places.write(path, row, first, size, self.config.data.streams, self.world)
        what = f"{len(row)} bad steps in a row, up to step {row[-1]}"
        if self.rewinding.is_possible(self.step):
            with self.throughput.paused(), self.watchdog.pause("rewind"):
                self.saver.settle()
                target = self.rewinding.rewind(self.step, self.state)
            if target:
                logger.warning("%s: %s; %s lists their data", what, self.rewinding.report(target, self.step), path)
                return
        self.bad_steps.forgive()
        self._save(last=True)
        raise RunFailed(
            f"{what}. They changed nothing; step {self.step} is saved, "
            f"and {path} says which data they read. {self.rewinding.why_not()}If those are at fault, start the same "
            f"command again: it goes on after them. {remedies(self.config)}. If the loss had risen before, move the "
            "newest checkpoints away first. If good steps pass for spikes, raise fault_tolerance.spike_sigma"
        )

    def _open_loader(self, corpus: Corpus, cursors: dict[int, dict[str, Any]] | None) -> BatchLoader:
        return BatchLoader(
            corpus,
            seq_len=self.config.training.seq_len,
            global_batch_size=self.config.training.global_batch_size,
            rank=self.world.data_rank,
            world_size=self.world.degrees.data,
            cursors=cursors,
            first=self.sequences,
        )

    def _validate(self, validator: Validator) -> None:
        ema = self.state.ema if self.config.validation.use_ema else None
        with self.throughput.paused(), self.watchdog.pause("validation"):
            self.saver.before_update()  # averages and weights change places
            with ema.in_place_of_weights() if ema else nullcontext():
                values: dict[str, float | int] = {**validator(self.model)}
        if self.validation_set > 1:
            values["val_set"] = self.validation_set
        of = "validation of the average" if ema else "validation"
        line = f"{of}: loss {values['val_loss']:.4f}, {values['val_bits_per_byte']:.4f} bits per byte"
        self._log(values, line)

    def _save_if_new(self) -> None:
        """Save before the run ends, unless this step is saved already."""
        with self.watchdog.pause("checkpoint"):
            saved = self.saver.saved_step
        if self.step > saved:
            self._save(last=True)

    def _save(self, last: bool = False) -> None:
        self._require_folder()
        self._report_bad_steps()
        if not self._require_finite(to_save=True):
            logger.warning("step %d is not saved: its weights are no finite numbers; a rewind is due", self.step)
            return
        with self.throughput.paused(), self.watchdog.pause("checkpoint"):
            # By the sequence: if a batch could not be read on one rank, the others are past theirs.
            cursors = all_gather_dict(self.world, self.loader.state_dict(self.sequences))
            replaced = self.replaced_before + sum(
                all_gather_dict(self.world, {self.world.data_rank: self.replaced}).values()
            )
            state = TrainState(self.step, self.tokens, self.sequences, cursors, self.fingerprint, replaced)
            self.saver.save(self.state.tensors(), state, self.files, last)


def _refuse_what_cannot_be(config: Config, world: World) -> None:
    """On this machine, or on so many ranks."""
    attention_of(config, world)
    pointwise_of(config, world)
    refuse_float8(config, world.device, world.degrees)
    refuse_recomputation(config, world.device)
    refuse_old_gpu(config.optimizer, world.device)


def agree_on_auto(config: Config, world: World, origin: Origin) -> Choice:
    """What "auto" stands for in this run; all ranks come here."""
    choice = choose(config, world, origin.optimizer)
    all_ranks_or_raise(world, lambda: refuse_old_gpu(choice.config.optimizer, world.device))
    return choice


def _start_helpers(config: Config, world: World) -> None:
    """The processes that read data and compile, beside what comes first here; in vain where a run is finished."""
    prepare_workers(config.data.num_workers)
    warm_compiler(config.compile, world.device)


def _files(config: Config, corpus: Corpus, validation: dict[str, Any] | None) -> dict[str, bytes]:
    """What a checkpoint needs to be used elsewhere: the configuration, and a vocabulary that lies in a file.

    Read once: the file may not be there any more when a checkpoint is written.
    """
    files = {CONFIG: to_toml(config).encode(), DATA: data_record(corpus, validation)}
    vocabulary = Path(config.data.tokenizer)
    if vocabulary.suffix == ".tiktoken":
        try:
            files[VOCABULARY] = vocabulary.read_bytes()
        except OSError as error:
            raise UserError(f"data.tokenizer: {vocabulary} cannot be read ({error.strerror})") from None
    return files
