"""Real process groups on gloo: a function run by several processes, its results or its first error brought back."""

import faulthandler
import multiprocessing.forkserver
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.waiting import HANG

_server: int | None = None  # the process that ranks are forked from


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any, **environment: str) -> list[Any]:
    """`function(*arguments)` in `size` processes that see torchrun's variables; returns what each gave, by rank.

    The function must be importable. It may call `init_gloo`, or the program's own `init_distributed`. The first
    failure ends all processes and is raised here with the rank's own traceback.
    """
    # Where there is a GPU, what the server imports asks for it, and CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if context.get_start_method() == "forkserver":
        _start_server()
    # As torchrun does: a store of ours to meet at, on a port that is bound already, so that nobody else can take it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    folder = tempfile.TemporaryDirectory()
    stacks = [Path(folder.name) / f"rank-{rank}" for rank in range(size)]
    for rank in range(size):
        near, far = context.Pipe(duplex=False)
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        process = context.Process(target=_rank, args=(far, stacks[rank], variables | environment, function, arguments))
        process.start()
        far.close()
        processes.append(process)
        pipes.append(near)
    try:
        return _collect(pipes, stacks)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        folder.cleanup()


def _start_server() -> None:
    """It imports once; each rank is a fork of it and starts in a tenth of a second instead of four.

    Not that of a loader which a test has used in this process, as it has imported little.
    """
    global _server
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    if _server is None or server._forkserver_pid != _server:
        if server._forkserver_pid is not None:
            os.close(server._forkserver_alive_fd)  # it ends with the last process that it made
        server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
        server.set_forkserver_preload(["tests.distributed.preload"])
        server.ensure_running()
        _server = server._forkserver_pid


def _collect(pipes: list[Connection], stacks: list[Path]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, HANG)
        assert ready, f"ranks {sorted(set(range(len(pipes))) - results.keys())} gave nothing in {HANG:.0f} s"
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                result, error = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died\n{stacks[rank].read_text()}") from None
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, stacks: Path, variables: dict[str, str], function: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    server = multiprocessing.forkserver
    if server._forkserver._forkserver_address is not None:  # type: ignore[attr-defined]
        # Its loader's workers come from the server it comes from itself; one of its own would import for seconds.
        server.ensure_running = server._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    try:
        with stacks.open("w") as file:
            faulthandler.enable(file)  # what a crash of C code leaves
            try:
                pipe.send((function(*arguments), None))
            finally:
                faulthandler.disable()
    except BaseException:
        pipe.send((None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def init_gloo() -> tuple[int, int]:
    """Join the process group; returns rank and size."""
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()
