import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# Models this small are fastest on one thread, and threads that wait for a busy core make them ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

TINY = """
[job]
dump_folder = "{folder}/run"
deterministic = true
[model]
flavor = "debug"
num_layers = 3
dim = 64
num_heads = 2
swa_window = 16
dropout = 0.1
[data]
source = "builtin"
tokenizer = "byte"
streams = 6
shuffle_documents = 8
num_workers = 1
[training]
seq_len = 64
local_batch_size = 2
global_batch_size = 5
steps = 30
compute_dtype = "float32"
[lr_schedule]
warmup_steps = 4
[compile]
enabled = false
[checkpoint]
interval = 15
[validation]
interval = 10
fraction = 0.1
max_tokens = 2048
[metrics]
log_interval = 1
tensorboard = false
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A configuration that trains 30 steps in two seconds, with dropout and a batch that its streams do not divide."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(folder=tmp_path))
    return path


@pytest.fixture(autouse=True)
def _a_process_as_new():
    """Training sets determinism, log handlers and seeds for the whole process, and tests share it."""
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    package = logging.getLogger("swamla_titan")
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    package.propagate = True


class WandbStub(ModuleType):
    """What of the package `wandb` is called: `init`, and `log` and `finish` of the run it gives."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> "WandbStub":
        self.inits.append(arguments)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> WandbStub:
    """A package `wandb` that needs no network and no account."""
    stub = WandbStub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub
