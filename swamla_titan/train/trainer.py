"""The trainer: the parts of a run, and the loop over its steps."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from swamla_titan.checkpoint.async_save import Saver
from swamla_titan.checkpoint.dump_folder import Hold, log_to_folder
from swamla_titan.checkpoint.records import TrainState
from swamla_titan.data import StepBatch, completed_epochs
from swamla_titan.distributed.mesh import all_gather_dict, all_ranks_or_raise, broadcast_from_rank_0
from swamla_titan.errors import EXIT_DONE, EXIT_RE_RENDEZVOUS, RunFailed, UserError
from swamla_titan.launch.signals import Stop, StopRequest
from swamla_titan.parallel.compile import compilation
from swamla_titan.system.events import now, timed_event
from swamla_titan.train.logging import MetricsLogger
from swamla_titan.train.policies.batch_digests import batch_digests
from swamla_titan.train.policies.garbage_collection import GarbageCollection
from swamla_titan.train.policies.lookup_metrics import lookup_metrics
from swamla_titan.train.policies.mixture_metrics import mixture_metrics
from swamla_titan.train.policies.padding import padding_metric
from swamla_titan.train.policies.profiling import StepProfiler
from swamla_titan.train.policies.stages import StageChanges
from swamla_titan.train.policies.streaks import bad_step_policy
from swamla_titan.train.policies.unreadable_data import UnreadableData, next_batch
from swamla_titan.train.policies.watchdog import Watchdog
from swamla_titan.train.policy import Policy, Values
from swamla_titan.train.setup import Setup
from swamla_titan.train.startup_summary import log_startup_summary
from swamla_titan.train.step import TrainStep
from swamla_titan.train.throughput import DataWait, Throughput
from swamla_titan.train.validation import Validation

logger = logging.getLogger(__name__)


class Trainer:
    """One run: from its setup to the last step; every rank has one.

    Its loop asks policies directly too: `bad_steps` (to rewind, end, save), `unreadable` (skipped data), `throughput`.
    """

    def __init__(self, setup: Setup, stop: StopRequest, watchdog: Watchdog, hold: Hold | None = None) -> None:
        """Build the model, and then what writes to the dump folder. `hold`: of this folder, on the rank that holds it.

        Raises UserError, on every rank, before anything is written, and DamagedCheckpoints where the checkpoint turns
        out damaged and an older one may be intact.
        """
        self.setup, self.config, self.world = setup, setup.config, setup.world
        self.stop, self.hold, self.folder = stop, hold, Path(self.config.job.dump_folder)
        if hold:
            setup.checkpoints.may_write = hold.require
        self.step = setup.train_state.step
        self.loader = setup.open_loader()
        self.cursors = self.loader.cursors  # of this rank's streams, after `step`
        try:
            if self.step < self.config.training.steps:
                all_ranks_or_raise(self.world, self.loader.start)  # it reads ahead while the model is built
            self._build(watchdog)
        except BaseException:
            self.loader.close()
            raise

    def _build(self, watchdog: Watchdog) -> None:
        setup, config, world = self.setup, self.config, self.world
        self.state = setup.build_state()
        # From here on only the dump folder itself can be refused, for what writing to it shows.
        unfinished = self.step < config.training.steps  # the folder of a finished run keeps its configuration
        if unfinished:
            broadcast_from_rank_0(world, setup.prepare_folder)
        all_ranks_or_raise(world, lambda: log_to_folder(self.folder, world.rank, unfinished))
        self.unreadable = UnreadableData(self.folder, setup.corpus, setup.train_state, writes=self._may_write)
        self.metrics = all_ranks_or_raise(
            world, lambda: MetricsLogger(config, self.folder, self.step) if world.is_rank_0 else None
        )
        expected = self.state.size() if unfinished else 0
        self.saver = Saver(config.checkpoint, setup.checkpoints, world.device, self.step, expected)
        self.train_step = TrainStep(setup.stage, world, self.state, self.saver.before_update)
        self.profiler = StepProfiler(config.profiling, self.folder / "traces", world.rank)
        self.throughput = Throughput.of(setup.stage, world)
        self.data_wait = DataWait.of(config.data, setup.corpus.corpora, world.degrees.data)
        self.bad_steps = bad_step_policy(setup, self.state, self.loader)
        # Each hook is called in this order.
        self.policies: list[Policy] = [
            watchdog,  # after a step: first, because what other policies then do counts towards the next step
            GarbageCollection(config, self.step + 1),  # before a step: collects what the step before it left
            self.profiler,  # then begins its trace, which shows the wait for data
            self.throughput,  # in a log line: reads the clock before the others wait for the device
            StageChanges(setup, [watchdog, self.train_step, self.throughput, self.bad_steps]),  # before a step
            self.bad_steps,  # before a step: remembers where the batch begins, which the loader then moves on from
            *self.state.policies,
            *lookup_metrics(config.model, self.state, world),
            *mixture_metrics(setup, self.state.model),
            *padding_metric(config.data, world),
            self.unreadable,
            *batch_digests(config.metrics, self.folder, world),
            *([self.metrics] if self.metrics else []),  # on rank 0; closed last, when no policy logs any more
        ]
        log_startup_summary(setup, self.state.model.parts)

    def run(self) -> int:
        """Train to the last step; returns the exit code. A signal ends the run early, with a checkpoint."""
        config, first_step = self.config, self.step + 1
        for policy in self.policies:
            policy.begin(self.step)
        while self.step < config.training.steps:
            for policy in self.policies:
                policy.before_step(self.step + 1)
            with self.throughput.data_wait():
                batch = self._next_batch()
            if isinstance(batch, Stop):
                return self._stopped_while_waiting(batch)
            for policy in self.policies:
                policy.take_batch(self.step + 1, batch)
            self.outcome = self.train_step(batch, self.step + 1)
            self.step += 1
            self.cursors = batch.cursors
            for policy in self.policies:
                policy.after_step(self.step, self.outcome)
            # Asked once: a signal that comes later in this step ends the next one.
            stop = self.stop.agreed(self.world.all_reduce_max)
            finished = self.step == config.training.steps
            save = finished or stop is not None or self.step % config.checkpoint.interval == 0
            due = [each for each in self.setup.validations if finished or self.step % each.interval == 0]
            too_many_bad = self.bad_steps.too_many(self.step)
            log = self.step == first_step or self.step % config.metrics.log_interval == 0
            if log or save or due or too_many_bad:
                with self.metrics.one_line() if self.metrics else nullcontext():
                    self._log_step()
                    self._end_streak(too_many_bad)
                    for validation in due:
                        self._validate(validation)
            if config.compile.enabled and self.step == first_step:
                logger.info("%s", compilation())
            if save:
                self._save(last=finished or stop is not None)
            # Before a re-rendezvous a finished run returns too, so that the new machines see that it is finished.
            if stop and (not finished or stop.code == EXIT_RE_RENDEZVOUS):
                logger.info("%s after step %d; %s", stop.reason, self.step, stop.outlook)
                return stop.code
        logger.info('done; let it write: swamla-titan generate %s --prompt "The"', self.folder)
        return EXIT_DONE

    def close(self, alone: bool = False, folder_lost: bool = False) -> None:
        """Stop the loader's processes, finish the checkpoint in flight, and close the policies.

        `alone`: this rank ends and the others do not, so that its device may wait forever. `folder_lost`: the dump
        folder is not this run's any more.
        """
        self.loader.close()
        with self._pause("checkpoint"):
            self.saver.close(alone)
        for policy in self.policies:
            policy.close(discard=alone or folder_lost)

    def _next_batch(self) -> StepBatch | Stop:
        """The batch of the next step, or what stops the run while it waits for it.

        Where the data cannot be read, the steps so far are saved before the run ends.
        """
        try:
            return next_batch(self.world, self.loader, self.step + 1, self.stop, self.unreadable)
        except (UserError, RunFailed) as error:
            try:
                self._save_if_new()
            except RunFailed:
                logger.error("%s", error)  # the cause, which the raised error would hide
                raise
            raise

    def _stopped_while_waiting(self, stop: Stop) -> int:
        self._save_if_new()
        logger.info("%s while waiting for data after step %d; %s", stop.reason, self.step, stop.outlook)
        return stop.code

    def _log_step(self) -> None:
        """Read the step's metrics from the device, which waits for it, and log them."""
        self._require_folder()
        (loss, grad_norm, lr), tokens = self.outcome, self.setup.schedule.after(self.step).tokens
        epoch = int(-self.world.all_reduce_max(-completed_epochs(self.cursors.values())))
        values: Values = {"time": now(), "tokens": tokens, "epoch": epoch}
        values |= {"loss": loss.item(), "grad_norm": grad_norm.item(), "lr": lr}
        for policy in self.policies:
            values |= policy.metrics()
        values["memory_gib"] = self.world.all_reduce_max(values["memory_gib"])
        if self.metrics:
            self.metrics.log_step(self.step, values)
        if warning := self.data_wait.warning(self.throughput.interval):
            logger.warning("%s", warning)
        self.bad_steps.require_finite(self.step, self.outcome)

    def _end_streak(self, too_many_bad: bool) -> None:
        """Where too many bad steps followed each other, rewind, or save and raise RunFailed, on every rank."""
        if failure := self.bad_steps.end_streak(self.step, too_many_bad, self._pause_to_rewind()):
            self._save(last=True)
            raise failure

    @contextmanager
    def _pause(self, doing: str) -> Iterator[None]:
        """Encloses work between steps: no policy takes it for a part of one."""
        with ExitStack() as stack:
            stack.enter_context(timed_event("pause", step=self.step, doing=doing))
            for policy in self.policies:
                stack.enter_context(policy.pause(doing))
            yield

    @contextmanager
    def _pause_to_rewind(self) -> Iterator[None]:
        with self._pause("rewind"):
            self.saver.settle()
            yield

    def _validate(self, validation: Validation) -> None:
        average = self.state.ema if self.config.validation.use_ema else None
        with self._pause("validation"):
            self.saver.before_update()  # weights and their average are swapped
            values = validation(self.state.model, average)
        if values and self.metrics:
            of = "validation of the average" if average else "validation"
            self.metrics.log(self.step, values, f"{of}: {validation.line(values)}")

    def _save_if_new(self) -> None:
        """Save before the run ends, unless this step is saved already."""
        with self._pause("checkpoint"):
            saved = self.saver.saved_step
        if self.step > saved:
            self._save(last=True)

    def _save(self, last: bool = False) -> None:
        self._require_folder()
        self.bad_steps.report()
        if not self.bad_steps.require_finite(self.step, self.outcome, to_save=True):
            logger.warning("step %d is not saved: its weights are not finite; a rewind is due", self.step)
            return
        with self._pause("checkpoint"):
            cursors, more = all_gather_dict(self.world, self.cursors), self.unreadable.state(self.world)
            for policy in self.policies:
                more |= policy.train_state()
            state = TrainState(*self.setup.schedule.after(self.step), cursors, self.setup.fingerprint, **more)
            self.saver.save(self.state.tensors(), state, self.setup.files, last)

    def _may_write(self) -> bool:
        """Whether this rank writes the run's shared files in the dump folder, and may still do so."""
        return self.world.is_rank_0 and not (self.hold and self.hold.is_lost)

    def _require_folder(self) -> None:
        """Raise FolderLost, on every rank, if the dump folder is not this run's any more."""
        broadcast_from_rank_0(self.world, lambda: self.hold.require() if self.hold else None)
