"""Log lines on the console, which do not break the progress bar."""

import logging
import os
import sys

from tqdm import tqdm

_FORMAT = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print the record; a console that is gone or full is no reason to end a run, whose folder has the log too."""
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            discard_output()
        except OSError:
            pass


def discard_output() -> None:
    """From now on what is printed goes nowhere: its reader is gone, and Python would complain once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_output() -> None:
    """Print what is still in Python's buffer, or discard it: it must not change the exit code of a run."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()


def log_to_console(level: int = logging.INFO) -> None:
    """Send this package's log lines from `level` on to standard output; those that go elsewhere begin at INFO."""
    package = logging.getLogger("swamla_titan")
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    package.setLevel(logging.INFO)
    package.propagate = False
    console = _Console(level)
    console.setFormatter(_FORMAT)
    package.addHandler(console)
