"""Logs a run: lines to the console, metrics to metrics.jsonl, TensorBoard and Weights & Biases."""

import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from swamla_titan.config import Config, to_toml
from swamla_titan.errors import UserError
from swamla_titan.escaping import one_line
from swamla_titan.metrics import metric, step_line
from swamla_titan.system.console import LogFormatter
from swamla_titan.system.line_file import LineFile
from swamla_titan.train.policy import Policy, StepOutcome, Values

logger = logging.getLogger(__name__)

_FORMAT = LogFormatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print the record above the progress bar.

        Text that the console does not accept is dropped (system/console.py); the log in the dump folder has it too.
        """
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def log_to_console(level: int = logging.INFO) -> None:
    """Send this package's log lines from `level` on to standard output; other handlers get those from INFO on."""
    package = logging.getLogger("swamla_titan")
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    package.setLevel(logging.INFO)
    package.propagate = False
    console = _Console(level)
    console.setFormatter(_FORMAT)
    package.addHandler(console)


class _Destination(NamedTuple):
    """TensorBoard or Weights & Biases; the run continues whatever its functions raise."""

    name: str
    write: Callable[[int, Values], object]
    close: Callable[[], object]


class MetricsLogger(Policy):
    """Sends the metrics of a step to every destination in [metrics]; rank 0 has one.

    metrics.jsonl gets one object a step, appended at once; a key that does not apply is left out (docs/metrics.md lists
    all). Raises UserError if a destination cannot be opened, but not if Weights & Biases does not answer. Later no
    destination ends the run: if the disk is full, lines of metrics.jsonl wait in memory, and if TensorBoard or Weights
    & Biases fail, they get no more metrics until the next start.
    """

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        """For a run of `config` that continues after `step`."""
        self._folder = folder
        self._steps = config.training.steps
        self._joining = False
        self._step, self._values = step, Values()  # whose line is not written yet
        with self._disk():
            wandb = _open_wandb(config, folder) if config.metrics.wandb else None
            self._file = LineFile(folder / "metrics.jsonl")
            tensorboard = (
                _open_tensorboard(config, folder / "tensorboard", step) if config.metrics.tensorboard else None
            )
        self._destinations = [each for each in (tensorboard, wandb) if each]
        self._bar = tqdm(
            total=self._steps,
            initial=step,
            unit="step",
            disable=not (config.metrics.progress_bar and sys.stderr.isatty()),
            dynamic_ncols=True,
            leave=False,
        )

    def after_step(self, step: int, outcome: StepOutcome) -> None:
        """Advance the progress bar."""
        self._bar.update()

    def log_step(self, step: int, values: Values) -> None:
        """See `log`; the line is that of a step, with the time left at its pace."""
        self.log(step, values, step_line(step, self._steps, values, (self._steps - step) * values["step_seconds"]))

    def log(self, step: int, values: Values, line: str) -> None:
        """Write the metrics of a step everywhere, and `line` to the console and the log.

        The folder must still be this run's, because files that were removed are created again.
        """
        if warning := self._file.follow():
            logger.warning("%s", warning)
        self._step = step
        self._values |= values
        if not self._joining:
            self._write()
        logger.info(line)

    @contextmanager
    def one_line(self) -> Iterator[None]:
        """Joins the metrics of a step that are logged inside: they are written at the end, also where this raises."""
        self._joining = True
        try:
            yield
        finally:
            self._joining = False
            self._write()

    def _write(self) -> None:
        step, values, self._values = self._step, self._values, {}
        if not values:
            return
        # JSON has no NaN or infinity; any reader can read null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        if warning := self._file.write(json.dumps({"step": step} | finite)):
            logger.warning("%s", warning)
        for each in list(self._destinations):
            try:
                each.write(step, values)
            except Exception as error:  # a full disk, a removed folder, or whatever a service's client raises
                text = "%s gets no more metrics until the next start (%s); metrics.jsonl has them all"
                logger.warning(text, each.name, error)
                self._destinations.remove(each)
                with suppress(Exception):
                    each.close()

    def close(self, discard: bool = False) -> None:
        """Flush and close every destination; log those that cannot be written, and close the others."""
        self._bar.close()
        lost = self._file.close()
        if lost:
            logger.warning("%s", lost)
        for each in self._destinations:
            try:
                each.close()
            except Exception as error:  # not raised, because training is over, or ends with an error that says more
                logger.warning("the last metrics in %s may be missing (%s)", self._folder, error)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Turns an error of the disk into a UserError, because the next start would have it too."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"job.dump_folder = {self._folder}: the metrics of the run cannot be written there ({error}). Make "
                "room or allow it, and start the same command again: it continues from the newest checkpoint"
            ) from error


def require_wandb() -> Any:
    """The package `wandb`; raises UserError if it is not installed, or does not work."""
    try:
        import wandb
    except ImportError:
        raise UserError("metrics.wandb = true needs the package: pip install wandb, or set it to false") from None
    except Exception as error:
        raise UserError(
            f"metrics.wandb = true: the package cannot be imported ({type(error).__name__}: {error}); install it "
            "again: pip install --force-reinstall wandb, or set metrics.wandb to false"
        ) from error
    return wandb


def _open_tensorboard(config: Config, folder: Path, step: int) -> _Destination | None:
    """For steps after `step`; None, with a warning, where TensorBoard cannot use the folder's name."""
    from torch.utils.tensorboard import SummaryWriter  # imported late because it takes a second
    from torch.utils.tensorboard.summary import hparams

    try:
        writer = SummaryWriter(str(folder), purge_step=step + 1)
    except UnicodeEncodeError:
        logger.warning(
            "TensorBoard gets no metrics, because its folder's name is not UTF-8; metrics.jsonl has them all"
        )
        return None
    opened = os.stat(folder)
    writer.add_text(
        "config", "    " + to_toml(config).rstrip().replace("\n", "\n    "), step
    )  # indented: code in Markdown
    file: Any = writer.file_writer
    for summary in hparams(_hyperparameters(config), dict.fromkeys((metric("loss").tag, metric("val_loss").tag), 0.0)):
        file.add_summary(summary)

    def write(step: int, values: Values) -> None:
        # TensorBoard would continue to write to a deleted file without noticing.
        if not os.path.samestat(os.stat(folder), opened):
            raise FileNotFoundError("its folder was replaced")
        for name, value in values.items():
            if name != "time":  # each value has its own
                writer.add_scalar(metric(name).tag, value, step)
        writer.flush()  # its own timer reads a clock that users can set

    return _Destination("TensorBoard", write, writer.close)


def _hyperparameters(config: Config) -> dict[str, int | float | str]:
    """The keys of the sections that decide what is learned, as SECTION.KEY; others than numbers as text."""
    sections = {name: getattr(config, name) for name in ("model", "training", "optimizer", "lr_schedule")}
    return {
        f"{name}.{key}": value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
        for name, section in sections.items()
        for key, value in asdict(section).items()
    }


def _open_wandb(config: Config, folder: Path) -> _Destination | None:
    """Open the W&B run; None, with a warning, if the service does not answer; UserError without an account.

    Its id is stored in the dump folder, so that a resumed run continues it; another run of the project may have the
    folder's name.
    """
    id_file = folder / "wandb" / "run-id.txt"
    if not id_file.exists():
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(secrets.token_hex(8))
    wandb = require_wandb()
    try:
        with _without_terminal():
            run = wandb.init(
                project=config.metrics.wandb_project,
                name=one_line(folder.resolve().name),
                id=id_file.read_text().strip(),
                resume="allow",
                dir=folder,
                config=asdict(config),
            )
    except Exception as error:  # whatever the service's client raises
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
            raise
        if {kind.__name__ for kind in type(error).__mro__} & {"UsageError", "AuthenticationError"}:
            raise UserError(
                f"metrics.wandb = true, but Weights & Biases accepts no run here ({' '.join(str(error).split())}). "
                "Log in (`wandb login`, or the variable WANDB_API_KEY), set WANDB_MODE=offline to upload later, or set "
                "metrics.wandb to false"
            ) from error
        logger.warning(
            "Weights & Biases gets no metrics until the next start (%s: %s); metrics.jsonl has them all. Set "
            "WANDB_MODE=offline where it cannot be reached",
            type(error).__name__,
            error,
        )
        return None
    return _Destination("Weights & Biases", lambda step, values: run.log(values, step=step), run.finish)


@contextmanager
def _without_terminal() -> Iterator[None]:
    """Replaces standard input, because without an account wandb would ask at the terminal and wait forever."""
    terminal = sys.stdin
    with open(os.devnull, encoding="utf-8") as empty:
        sys.stdin = empty
        try:
            yield
        finally:
            sys.stdin = terminal
