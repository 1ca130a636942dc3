"""The report of a process that hangs: where each of its threads is, and NCCL's flight recorder."""

import faulthandler
import logging
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[2]


def write_stacks(path: Path, headline: str) -> bool:
    """Write the Python stacks of all threads to `path`, below a headline; to standard error if that is impossible.

    Returns whether the file was written. No source file is read, because it may be on the disk that hangs.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{headline}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return True
    except OSError as error:
        print(f"{path} could not be written ({error.strerror}); {headline}", file=sys.__stderr__, flush=True)
        if sys.__stderr__:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        return False


def write_nccl_trace(path: Path) -> bool:
    """Write NCCL's last collectives, of which TORCH_FR_BUFFER_SIZE are remembered (torch's default: 2000), to `path`.

    Returns whether there was something to write. `path` should end in the rank, because fr_trace of
    torch.distributed.flight_recorder reads the files of all ranks by their common prefix, and reports which rank missed
    which collective.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None) if dist.is_available() else None
    if dump is None:  # torch without NCCL
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the stacks of the calls: to resolve them torch may wait for Python's lock, which a hang may hold.
        path.write_bytes(dump(includeCollectives=True, includeStackTraces=False, onlyActive=False))
    except (OSError, RuntimeError) as error:
        logger.warning("no flight recorder of NCCL: %s", error)
        return False
    return True


def place_of_main_thread() -> str:
    """Where the main thread is: its innermost function, and the innermost one of this package that led there."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "ending"
    innermost, ours = frame, frame
    while ours.f_back is not None and PACKAGE not in Path(ours.f_code.co_filename).parents:
        ours = ours.f_back
    found = PACKAGE in Path(ours.f_code.co_filename).parents
    return _words(innermost) + (f", called by {_words(ours)}" if found and ours is not innermost else "")


def _words(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def where_all_are(steps: dict[int, int], places: dict[int, str], size: int) -> str:
    """A line for each place in the code, with the ranks that are there; those with the fewest steps come first.

    `steps` and `places` map a rank to the step it took last and to where it is; a rank in neither did not answer. Ranks
    that wait for each other took the same number of steps; the one that is elsewhere delays the others.
    """
    together: dict[tuple[int, str], list[int]] = {}
    for rank in sorted(places):
        together.setdefault((steps[rank], places[rank]), []).append(rank)
    most = max(steps.values(), default=0)
    lines = []
    for (step, place), ranks in sorted(together.items(), key=lambda item: (item[0][0], len(item[1]))):
        lines.append(f"{_ranks(ranks)} after step {step}{' (behind)' if step < most else ''}: {place}")
    if silent := sorted(set(range(size)) - places.keys()):
        lines.append(f"{_ranks(silent)}: no answer; stopped, cut off, or in code that does not let Python run")
    return "\n".join(f"  {line}" for line in lines)


def _ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(str(end) for end in run) for run in runs)
    return f"rank {text}" if len(runs) == 1 and len(runs[0]) == 1 else f"ranks {text}"
