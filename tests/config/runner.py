"""Short runs of the real command, and what is seen of them from outside: what the model was fed, what was written."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from swamla_titan.data import IGNORED
from swamla_titan.model import SWAMLAModel
from tests.config.rank_runs import RankSeen, train_on_a_rank
from tests.conftest import WandbStub
from tests.distributed.ranks import on_ranks
from tests.train.faults import Fault, run_with_faults
from tests.train.harness_stub import stub
from tests.train.runs import checkpoint, metrics, tensors, train

Result = TypeVar("Result")

STEPS = 3
EOT = 256
SHORT = (
    *("--training.steps", str(STEPS)),
    *("--data.num_workers", "0"),
    *("--validation.interval", "0"),
    *("--lr_schedule.warmup_steps", "0"),
    *("--model.dropout", "0"),
)


class Call(NamedTuple):
    """A call of the model: in training or validation, and with what."""

    training: bool
    tokens: Tensor  # [B, T]
    targets: Tensor
    document_ids: Tensor | None


@contextlib.contextmanager
def before_every_call_of(kind: type[nn.Module], look: Callable[..., None]) -> Iterator[None]:
    handle = register_module_forward_pre_hook(
        lambda module, arguments: look(module, *arguments) if isinstance(module, kind) else None
    )
    try:
        yield
    finally:
        handle.remove()


class Run:
    """A short run that is over: its folder, and how its model was called."""

    def __init__(self, folder: Path, calls: list[Call]) -> None:
        self.folder = folder
        self.calls = [call for call in calls if call.training]
        self.validation_calls = [call for call in calls if not call.training]

    def series(self, name: str = "loss") -> list[float]:
        return list(metrics(self.folder, name).values())

    def text(self) -> str:
        """All training tokens (of the byte tokenizer) in the order of the micro-batches; `|` is end of text."""
        return as_text(self.calls)

    def tensors(self, step: int = STEPS) -> dict[str, Tensor]:
        return tensors(checkpoint(self.folder, step))

    def weights(self, step: int = STEPS) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors(step).items() if name.startswith("model.")}

    def moment(self, name: str, step: int) -> Tensor:
        """Every parameter's `exp_avg` or `exp_avg_sq` as one vector."""
        return torch.cat([t.flatten() for key, t in self.tensors(step).items() if key.endswith(f".{name}")])

    def files(self, pattern: str) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(pattern))


def as_text(calls: list[Call]) -> str:
    rows = [row for call in calls for row in call.tokens[(call.targets != IGNORED).any(dim=1)].tolist()]
    numbers = [number for row in rows for number in row]
    return bytes(ord("|") if number == EOT else number for number in numbers).decode("utf-8", errors="replace")


class Runner:
    """Starts short runs of the real command, each in a folder of its own."""

    def __init__(self, config: Path, folder: Path, capsys: pytest.CaptureFixture[str], wandb: WandbStub) -> None:
        self.config = config
        self.folder = folder
        self.wandb = wandb
        self._capsys = capsys
        self._count = 0

    def __call__(self, *overrides: str) -> Run:
        self._count += 1
        folder = self.folder / f"run-{self._count}"
        calls: list[Call] = []

        def look(module: nn.Module, tokens: Tensor, targets: Tensor, document_ids: Tensor | None) -> None:
            calls.append(Call(module.training, tokens, targets, document_ids))

        with before_every_call_of(SWAMLAModel, look):
            assert train(self.config, "--job.dump_folder", str(folder), *SHORT, *overrides) == 0
        return Run(folder, calls)

    def with_faults(self, faults: tuple[Fault, ...], code: int, *overrides: str) -> Path:
        """A run in which steps go wrong and which ends with `code`; its folder."""
        self._count += 1
        folder = self.folder / f"run-{self._count}"
        ended = run_with_faults(faults, (), str(self.config), "--job.dump_folder", str(folder), *SHORT, *overrides)
        assert ended.code == code, ended.err
        return folder

    def refusal(self, *overrides: str) -> str:
        """The message of a run that is refused before it writes anything."""
        folder = self.folder / "refused"
        self._capsys.readouterr()
        assert train(self.config, "--job.dump_folder", str(folder), *SHORT, *overrides) == 2
        assert not folder.exists()
        return self._capsys.readouterr().err

    def on_ranks(self, size: int, *overrides: str) -> list[RankSeen]:
        """A run of one step on several ranks, each of which trained to the end; what each saw, by rank."""
        seen = self._on_ranks(size, "--training.steps", "1", *overrides)
        assert [rank.code for rank in seen] == [0] * size, seen[0].error
        return seen

    def refusal_on_ranks(self, size: int, *overrides: str) -> str:
        """The message with which every rank of a run ends, before anything is written."""
        seen = self._on_ranks(size, *overrides)
        assert [rank.code for rank in seen] == [2] * size
        assert not any(rank.error for rank in seen[1:])  # one of them says it
        assert not seen[0].folder.exists()
        return seen[0].error

    def _on_ranks(self, size: int, *overrides: str) -> list[RankSeen]:
        self._count += 1
        folder = self.folder / f"run-{self._count}"
        return on_ranks(size, train_on_a_rank, self.config, folder, (*SHORT, *overrides))

    def with_harness(self, start: Callable[..., Result], *overrides: str) -> Result:
        """`start(*overrides)` with a package lm_eval of our own."""
        with stub():
            return start(*overrides)

    def local(self, **texts: str) -> tuple[str, ...]:
        """Overrides that train on a folder of these files, in the order of their names, by one stream."""
        folder = self.folder / f"texts-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        for name, text in texts.items():
            (folder / name.replace("_", ".")).write_text(text)
        return (
            *("--data.source", "local", "--data.path", str(folder), "--data.streams", "1"),
            *("--data.shuffle_documents", "1", "--validation.fraction", "0"),
        )
