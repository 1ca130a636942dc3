"""Waiting for something without being deaf meanwhile."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Does `work` in a thread of its own, from now on; whoever wants the result can wait for it a little at a time.

    The thread ends with its work, and does not keep the process alive.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self._done = threading.Event()
        self._result: Result
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(work,), daemon=True, name="data").start()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits so long, None: to the end; returns whether the work is done."""
        return self._done.wait(seconds)

    def result(self) -> Result:
        """What the work gave, once it is done, or raises what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self, work: Callable[[], Result]) -> None:
        try:
            self._result = work()
        except BaseException as error:
            self._error = error
        self._done.set()
