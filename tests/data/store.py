"""An object store of tests: files of a folder through fsspec, as teststore://NAME, that fails where a test wants it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class Store(AbstractFileSystem):
    """Answers requests ("list", "size" or "read") for files below `root`.

    `fails` has, by the kind of a request and the end of a name, how it goes wrong, and for how many times.
    """

    protocol = "teststore"
    cachable = False
    root: ClassVar[Path]
    fails: ClassVar[dict[tuple[str, str], tuple[str, int]]] = {}
    requests: ClassVar[list[tuple[str, str]]] = []

    def ask(self, request: str, path: str) -> str:
        """Note a request; returns how it goes wrong, "" if it does not, or raises the error of a store."""
        self.requests.append((request, path))
        for key, (how, times) in self.fails.items():
            if key[0] == request and path.endswith(key[1]) and times > 0:
                self.fails[key] = how, times - 1
                if how == "throttle":
                    raise OSError(errno.EBUSY, "SlowDown: please reduce your request rate")
                if how == "forbid":
                    raise PermissionError("Access Denied")
                if how == "break":
                    raise ConnectionResetError("connection lost")
                return how
        return ""

    def info(self, path: str, **unused: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self.ask("size", path)
        file = self.root / path
        kind, status = "directory" if file.is_dir() else "file", file.stat()
        return {"name": path, "size": status.st_size, "type": kind, "ETag": f'"{status.st_mtime_ns:x}"'}

    def ls(self, path: str, detail: bool = True, **unused: Any) -> list[Any]:
        path = self._strip_protocol(path)
        self.ask("list", path)
        found = [self.info(f"{path}/{name}".lstrip("/")) for name in sorted(os.listdir(self.root / path))]
        return found if detail else [entry["name"] for entry in found]

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **keys: Any) -> "StoreFile":
        return StoreFile(self, path, mode, block_size or "default", **{"cache_options": None} | keys)


class StoreFile(AbstractBufferedFile):
    """A file that is read by ranges."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        how = self.fs.ask("read", self.path)
        with (self.fs.root / self.path).open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        return data[: len(data) // 2] if how == "truncate" else data


fsspec.register_implementation("teststore", Store, clobber=True)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder; gives its URL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "root", folder.parent, raising=False)
        patch.setattr(Store, "fails", {})
        patch.setattr(Store, "requests", [])
        yield f"teststore://{folder.name}"
