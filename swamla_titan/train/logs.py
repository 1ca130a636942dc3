"""Log lines on the console, which do not break the progress bar."""

import logging
import sys

from tqdm import tqdm

from swamla_titan.system.console import LogFormatter

_FORMAT = LogFormatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print the record. What the console does not take is dropped (system/console.py): the folder has it too."""
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


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
