"""Log lines: to the console without breaking the progress bar, and to logs/ in the dump folder."""

import logging
import sys
from pathlib import Path

from tqdm import tqdm

_FORMAT = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def log_to_console(level: int = logging.INFO) -> None:
    """Send this package's log lines to standard output."""
    package = logging.getLogger("swamla_titan")
    package.handlers.clear()
    package.setLevel(level)
    package.propagate = False
    console = _Console()
    console.setFormatter(_FORMAT)
    package.addHandler(console)


def log_to_folder(folder: Path, rank: int) -> None:
    """Also append them to logs/rank-N.log under the dump folder."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "logs" / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("swamla_titan").addHandler(handler)
