"""What `train` refuses, `check` and the dry run refuse as well, and preflight as far as it looks."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from swamla_titan.cli import main
from swamla_titan.launch.preflight import main as preflight
from swamla_titan.tools import check

ALL = frozenset({"train", "dry run", "check", "preflight"})
OF_A_RUN = ALL - {"preflight"}
OF_THIS_MACHINE = OF_A_RUN - {"dry run"}  # which takes the GPUs to be elsewhere where there is none
OF_PROCESSES = OF_A_RUN - {"check"} | {"preflight"}  # check takes as many as the degrees multiply to
FLOAT8 = "--float8.recipe=tensorwise --float8.linear_layers=all "


class Case(NamedTuple):
    overrides: str  # {folder} is of the test, and holds a file named "file"
    message: str
    refused_by: frozenset[str]


CASES = [
    Case("--training.seq_len=0", "[training] seq_len = 0", ALL),
    Case("--data.num_workers=6", "may open no more files", ALL),
    Case("--model.num_heads=5", "num_heads", ALL),
    Case("--parallel.dp_shard=3", "do not fit 1 process", OF_PROCESSES),
    Case("--parallel.cpu_offload=true", "parallel.cpu_offload = true needs GPUs", ALL - {"dry run"}),
    Case("--kernels.elementwise=triton", 'kernels.elementwise = "triton" needs a GPU', OF_THIS_MACHINE),
    Case("--kernels.attention=triton --model.dim=128", 'kernels.attention = "triton" needs a GPU', OF_THIS_MACHINE),
    Case("--kernels.attention=flex", 'kernels.attention = "flex" needs a GPU', OF_THIS_MACHINE),
    Case("--float8.recipe=native", "would convert none of", OF_A_RUN),
    Case(FLOAT8 + "--float8.fsdp_all_gather=always", "every rank has full weights", OF_A_RUN),
    Case("--compile.enabled=true --compile.cache_folder={folder}/file/x", "compile.cache_folder", OF_A_RUN),
    Case("--metrics.wandb=true", "metrics.wandb = true needs the package", OF_A_RUN),
    Case("--job.dump_folder={folder}/file/run", "file/run: cannot be written", OF_A_RUN),
    Case("--job.dump_folder={folder}/unfit", "cannot be written", OF_A_RUN),
    Case("--data.path={folder}/nowhere", "nowhere does not exist", OF_A_RUN),
    Case("--data.tokenizer=bite", 'there is no tokenizer "bite"', OF_A_RUN),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.overrides)
def test_what_training_refuses_others_refuse_too(
    tiny: Path, tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("NGPU", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    limits = resource.getrlimit
    few = (100, 100)
    monkeypatch.setattr(resource, "getrlimit", lambda of: few if of == resource.RLIMIT_NOFILE else limits(of))
    monkeypatch.setattr(resource, "setrlimit", lambda of, limit: None)
    for probe in ("_attention", "_float8"):  # of the machine alone
        monkeypatch.setattr(check, probe, lambda config, device: [])
    (tmp_path / "file").write_text("precious")
    (tmp_path / "unfit").mkdir()
    (tmp_path / "unfit" / "checkpoints").write_text("a file where a folder belongs")
    overrides = case.overrides.format(folder=tmp_path).split()
    commands: dict[str, Callable[[], int]] = {
        "train": lambda: main(["train", str(tiny), *overrides]),
        "dry run": lambda: main(["train", str(tiny), "--dry-run", *overrides]),
        "check": lambda: main(["check", str(tiny), *overrides]),
        "preflight": lambda: preflight(["1", "0", str(tiny), *overrides]),
    }
    refused_by = set()
    for name, command in commands.items():
        if command() == 2:
            refused_by.add(name)
            captured = capsys.readouterr()
            assert case.message in captured.out + captured.err
    assert refused_by == case.refused_by
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("--compile.enabled=true --activation_checkpoint.mode=full", "attention cannot be recomputed"),
        ("--compile.enabled=true --parallel.async_tensor=true", "parallel.async_tensor = true needs GPUs"),
    ],
)
def test_check_refuses_what_ranks_of_this_machine_would(tiny, monkeypatch, capsys, overrides, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(check, "_attention", lambda config, device: [])
    assert main(["check", str(tiny), "--parallel.tensor=2", *overrides.split()]) == 2
    assert message in capsys.readouterr().out


def test_check_misses_gpus_that_are_asked_for(tiny, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(check, "_attention", lambda config, device: [])
    monkeypatch.setenv("NGPU", "8")
    assert main(["check", str(tiny)]) == 2
    assert "NGPU=8: torch sees no GPU here; set NGPU=0 to train on the CPU" in capsys.readouterr().out
