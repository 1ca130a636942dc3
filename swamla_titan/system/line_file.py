"""A file of lines that only grows, on a disk that may be full for a while."""

import logging
import os
from contextlib import suppress
from pathlib import Path


class LineFile:
    """Appends whole lines; what the disk does not take waits in memory and goes first at the next line.

    A process that is killed may leave the last line cut short; it is ended before the next one, which so starts on its
    own. Raises OSError if the file cannot be opened; later nothing is raised.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._refused = False
        self._open()

    def _open(self) -> None:
        # Not through Python's buffer: after an error nobody could tell how much of it has been written.
        self._file = self.path.open("a+b", buffering=0)
        with suppress(OSError):  # no file that has an end, like a pipe
            if self._file.seek(0, os.SEEK_END) > 0:
                self._file.seek(-1, os.SEEK_END)
                self._waiting = b"" if self._file.read(1) == b"\n" else b"\n"

    def write(self, line: str) -> str | None:
        """Append a line. Returns what a user should know, once each time: the disk begins, or ceases, to refuse."""
        self._waiting += line.encode(errors="backslashreplace") + b"\n"
        error = self._write()
        if error and not self._refused:
            self._refused = True
            return f"{self.path} cannot be written ({error.strerror}); its lines wait in memory until it can"
        if not error and self._refused:
            self._refused = False
            return f"{self.path} can be written again, and holds all lines"
        return None

    def follow(self) -> str | None:
        """Open the file of this name anew, if it was removed or another one put there; returns what a user should know.

        Only where its folder is known to be this run's still.
        """
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return None
        except FileNotFoundError:
            pass
        except OSError:
            return None
        before, waiting = self._file, self._waiting
        try:
            self._open()
        except OSError:
            return None  # it is tried again at the next line
        self._waiting += waiting
        before.close()
        return f"{self.path} was removed or replaced; its lines go on in the file of this name, without those before"

    def close(self) -> str | None:
        """Try once more and close; returns what a user should know: lines were lost."""
        error = self._write()
        self._file.close()
        lines = self._waiting.count(b"\n")
        return f"{self.path} lacks the last {lines} lines ({error.strerror})" if error else None

    def _write(self) -> OSError | None:
        """Write what waits, as far as the disk takes it."""
        try:
            while self._waiting:
                # A full disk takes a part of it first; the rest follows there when there is room.
                self._waiting = self._waiting[self._file.write(self._waiting) or 0 :]
        except OSError as error:
            return error
        return None


class LineFileHandler(logging.Handler):
    """Sends log lines to a LineFile; that the disk refuses them is itself logged, once."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be opened."""
        super().__init__()
        self._file: LineFile | None = LineFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record as one line, or several if its message has them."""
        if self._file is None:
            return
        try:
            news = self._file.write(self.format(record))
        except Exception:  # a message that its arguments do not fit: logging's own way to tell
            self.handleError(record)
            return
        if news:
            logging.getLogger(__name__).warning("%s", news)  # comes here again, and then is no news

    def close(self) -> None:
        """Write what waits, if the disk takes it now, and close."""
        if self._file:
            file, self._file = self._file, None
            lost = file.close()
            if lost:
                logging.getLogger(__name__).warning("%s", lost)
        super().close()
