"""Work in a thread that does not keep the process alive."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Result = TypeVar("Result")


def in_background(work: Callable[[], Result]) -> "Future[Result]":
    """Start `work` in a daemon thread; an executor's threads would delay the end of the interpreter."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="data").start()
    return future


def is_done(future: "Future[Result]", seconds: float | None) -> bool:
    """Wait at most `seconds` (None: any time); returns whether the work is done."""
    return future in wait([future], seconds).done
