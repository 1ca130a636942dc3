"""What a new parallel dimension touches: a patch that adds one to a copy of the package, where it then trains.

Along the toy dimension `replica_check` ranks compute the same sequences redundantly and compare their gradients.
"""

import importlib
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import on_ranks
from tests.patches import apply_patch
from tests.tiny_config import tiny_config
from tests.train.runs import checkpoint, metrics, tensors

PACKAGE = Path(__file__).parents[2] / "swamla_titan"
PATCH = Path(__file__).with_name("toy_dimension") / "replica_check.patch"
MOST_FILES = 6
# Ranks draw dropout masks of their own, and replicas would rightly differ.
SHORT = ("--training.steps", "4", "--data.num_workers", "0", "--validation.interval", "2", "--model.dropout", "0")


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    """A folder with the package as the patch makes it."""
    shutil.copytree(PACKAGE, tmp_path / "copy" / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    touched = apply_patch(PATCH, tmp_path / "copy")
    assert 1 < len(touched) <= MOST_FILES, touched
    return tmp_path / "copy"


def _run(root: Path, faulty: int | None, config: str, *overrides: str) -> tuple[int, str, str]:
    """The command `train` of the package in `root`; rank `faulty` computes wrong gradients."""
    for name in [name for name in sys.modules if re.match(r"(swamla_titan|tests\.distributed\.job)\b", name)]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    model_parts = importlib.import_module("swamla_titan.parallel.model_parts")
    assert Path(model_parts.__file__ or "").is_relative_to(root)
    if os.environ["RANK"] == str(faulty):
        original = model_parts.ParallelModel._loss
        model_parts.ParallelModel._loss = lambda *arguments: 1.5 * original(*arguments)
    return tuple(importlib.import_module("tests.distributed.job").run_and_listen(config, *overrides))


def test_a_patch_of_few_files_adds_it_and_two_ranks_train_as_one(tmp_path, patched):
    config = str(tiny_config(tmp_path))
    folders = [tmp_path / "one", tmp_path / "two"]
    at = [(*SHORT, "--job.dump_folder", str(folder)) for folder in folders]
    assert on_ranks(1, _run, PACKAGE.parent, None, config, *at[0])[0][0] == 0
    ended = on_ranks(2, _run, patched, None, config, *at[1], "--parallel.replica_check", "2")
    assert [code for code, *_ in ended] == [0, 0], ended
    for name in ("loss", "grad_norm", "val_loss"):
        assert metrics(folders[1], name) == metrics(folders[0], name) != {}, name
    one, two = (tensors(checkpoint(folder, 4)) for folder in folders)
    assert one.keys() <= two.keys()
    for name, value in one.items():  # the other also has the random state of its second rank
        assert torch.equal(value, two[name]), name

    log = next((folders[1] / "logs").iterdir()).read_text()
    assert "(fsdp: replica_check 2)" in log
    misfit = on_ranks(2, _run, patched, None, config, *at[1], "--parallel.replica_check", "3")
    assert "the degrees replica_check 3 = 3 do not fit 2 processes: start 3, or lower pipeline, context" in misfit[0][2]


def test_it_notices_a_rank_whose_gradients_differ(tmp_path, patched):
    config = str(tiny_config(tmp_path))
    ended = on_ranks(2, _run, patched, 1, config, *SHORT, "--parallel.replica_check", "2")
    assert [code for code, *_ in ended] == [1, 1], ended
    assert "ranks computed different gradients of the same sequences" in ended[0][2]
