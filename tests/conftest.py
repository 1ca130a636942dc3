import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.host import pin

pin()  # before torch is imported, which reads some of it

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.tiny_config import tiny_config  # noqa: E402


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_config(tmp_path)


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
