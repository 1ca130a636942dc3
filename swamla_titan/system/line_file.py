"""An append-only file of lines, on a disk that may be full temporarily."""

import logging
import os
from contextlib import suppress
from pathlib import Path


class LineFile:
    """Appends lines; what cannot be written stays in memory, and is written before the next line.

    A process that is killed may truncate the last line; the next process ends that line before it appends. Raises
    OSError if the file cannot be opened, and later nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._refused = False
        self._open()

    def _open(self) -> None:
        # Unbuffered, because after an error of a buffered write it is unknown how much has been written.
        self._file = self.path.open("a+b", buffering=0)
        with suppress(OSError):  # not seekable, like a pipe
            if self._file.seek(0, os.SEEK_END) > 0:
                self._file.seek(-1, os.SEEK_END)
                self._waiting = b"" if self._file.read(1) == b"\n" else b"\n"

    def write(self, line: str) -> str | None:
        """Append a line. Returns a warning for the user when writes begin to fail, and when they succeed again."""
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
        """Open the file again if its path was removed or replaced; returns a warning for the user.

        The caller must know that the folder still belongs to this run.
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
            return None  # retried at the next line
        self._waiting += waiting
        before.close()
        return f"{self.path} was removed or replaced; its lines continue in the file of this name, without those before"

    def close(self) -> str | None:
        """Write what is in memory and close; returns a warning if lines were lost."""
        error = self._write()
        self._file.close()
        lines = self._waiting.count(b"\n")
        return f"{self.path} lacks the last {lines} lines ({error.strerror})" if error else None

    def _write(self) -> OSError | None:
        """Write what is in memory, as far as possible; returns the error, if any."""
        try:
            while self._waiting:
                # On a full disk a write may be partial; the rest follows when there is room.
                self._waiting = self._waiting[self._file.write(self._waiting) or 0 :]
        except OSError as error:
            return error
        return None


class LineFileHandler(logging.Handler):
    """Writes log records to a LineFile, and logs its warnings."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be opened."""
        super().__init__()
        self._file: LineFile | None = LineFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record as one line, or several if its message has them."""
        if self._file is None:
            return
        try:
            warning = self._file.write(self.format(record))
        except Exception:  # arguments do not fit the message's format: logging reports it
            self.handleError(record)
            return
        if warning:
            # This record comes here too, and gives no second warning.
            logging.getLogger(__name__).warning("%s", warning)

    def close(self) -> None:
        """Write what is in memory, if that is possible now, and close."""
        if self._file:
            file, self._file = self._file, None
            lost = file.close()
            if lost:
                logging.getLogger(__name__).warning("%s", lost)
        super().close()
