"""Helpers that start the real command line and read what it left."""

import contextlib
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed.checkpoint as dcp

from swamla_titan.checkpoint.manifest import commit
from swamla_titan.cli import main
from tests.waiting import wait_until


def train(config: Path, *overrides: str) -> int:
    """Train in this process; returns the exit code."""
    return main(["train", str(config), *overrides])


def start(config: Path, *overrides: str) -> "subprocess.Popen[str]":
    """Train in a process of its own."""
    command = [sys.executable, "-m", "swamla_titan", "train", str(config), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_groups(processes: "Iterable[subprocess.Popen[str]]") -> None:
    """End what is left of processes that lead groups of their own, with all that they have started."""
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.communicate()


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until `path` exists; fail if the process ends first."""

    def exists() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return path.exists()

    wait_until(exists, lambda: f"{path} did not appear", pause=0.002)


def metrics(folder: Path, name: str = "loss") -> dict[int, float]:
    """step -> value, of the last line that has it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    loaded = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    return loaded


def put_weights(into: Path, source: Path) -> None:
    """Give a checkpoint the weights, optimizer states and spikes' window of another, and no row of bad steps."""
    found, older = tensors(into), tensors(source)
    for name in found:
        if name.startswith(("model.", "optimizer.")) or name == "bad_steps.norms":
            found[name] = older[name]
    found["bad_steps.counts"][1] = 0
    parts = into.rename(into.with_name("parts"))
    for path in (parts / ".metadata", parts / "manifest.json", *parts.glob("*.distcp")):
        path.unlink()
    dcp.save(found, checkpoint_id=parts, no_dist=True)
    commit(parts, into, {})


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Tensors bit for bit, counters and cursors."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert any(name.startswith("optimizer.") for name in a)
    assert any(name.startswith("random.") for name in a)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    record, expected = (json.loads((path / "train.json").read_text()) for path in (one, other))
    assert record == expected


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file under a folder, but for the lock, which names the process that held it last."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextlib.contextmanager
def terminal(columns: int = 100) -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A terminal: a file to put in place of sys.stderr, and a function that gives what was written there."""
    near, far = os.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    os.set_blocking(near, False)

    def read() -> str:
        try:
            return os.read(near, 1 << 16).decode()
        except BlockingIOError:
            return ""

    with os.fdopen(far, "w") as file:
        yield file, read
    os.close(near)
