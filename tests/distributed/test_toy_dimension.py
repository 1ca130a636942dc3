"""What a new parallel dimension touches: a patch that adds one to a copy of the package, where it then trains.

Along `replica_check` ranks compute the same sequences redundantly and compare their gradients. Along `shared_backward`
they compute the same sequences, and each the gradients of a share of the targets, which are then to be summed.
"""

import importlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.config import runner
from tests.distributed.ranks import on_ranks
from tests.patches import apply_patch
from tests.tiny_config import tiny_config
from tests.train.runs import checkpoint, metrics, tensors

PACKAGE = Path(__file__).parents[2] / "swamla_titan"
CASES = Path(__file__).parents[1] / "config" / "parallel_cases.py"
PATCHES = Path(__file__).with_name("toy_dimension")
MOST_FILES = 6
# Ranks draw dropout masks of their own, and replicas would rightly differ.
SHORT = ("--training.steps", "4", "--data.num_workers", "0", "--validation.interval", "2", "--model.dropout", "0")


def _patched(folder: Path, name: str) -> Path:
    """A folder with the package, and the cases of its keys, as the patch makes them."""
    shutil.copytree(PACKAGE, folder / "copy" / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    cases = folder / "copy" / CASES.relative_to(PACKAGE.parent)
    cases.parent.mkdir(parents=True)
    shutil.copy(CASES, cases)
    touched = apply_patch(PATCHES / f"{name}.patch", folder / "copy")
    assert 1 < len(touched) <= MOST_FILES, touched
    return folder / "copy"


def _import(root: Path, module: str) -> Any:
    """A module anew, with the package in `root`."""
    stale = re.compile(r"(swamla_titan|tests\.(distributed\.job|config|train))\b")
    for name in filter(stale.match, list(sys.modules)):
        del sys.modules[name]
    sys.path.insert(0, str(root))
    model_parts = importlib.import_module("swamla_titan.parallel.model_parts")
    assert Path(model_parts.__file__ or "").is_relative_to(root)
    return importlib.import_module(module)


def _run(root: Path, faulty: int | None, config: str, *overrides: str) -> tuple[int, str, str]:
    """The command `train` of the package in `root`; rank `faulty` computes wrong gradients."""
    job = _import(root, "tests.distributed.job")
    if os.environ["RANK"] == str(faulty):
        model = sys.modules["swamla_titan.parallel.model_parts"].ParallelModel
        original = model._loss
        model._loss = lambda *arguments: 1.5 * original(*arguments)
    return tuple(job.run_and_listen(config, *overrides))


def _see(root: Path, *arguments: Any) -> Any:
    """`train_on_a_rank` (tests/config/rank_runs.py) of the package in `root`."""
    return _import(root, "tests.config.rank_runs").train_on_a_rank(*arguments)


class RunnerOfACopy(runner.Runner):
    """Runs on several ranks are of the package in `root`, and so know its keys."""

    root: Path

    def _on_ranks(self, size: int, *overrides: str) -> list[Any]:
        overrides = (*runner.SHORT, *overrides)
        return on_ranks(size, _see, self.root, self.config, self.folder / f"case-{size}", overrides)


def _case(root: Path, name: str) -> Callable[[runner.Runner], None]:
    """The case of the key in tests/config/parallel_cases.py of `root`."""
    spec = importlib.util.spec_from_file_location("patched_cases", root / CASES.relative_to(PACKAGE.parent))
    assert spec is not None
    assert spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    case: Callable[[runner.Runner], None] = cases.PARALLEL_CASES[f"parallel.{name}"]
    return case


@pytest.mark.parametrize("name", ["replica_check", "shared_backward"])
def test_its_key_has_a_case(name, tmp_path, capsys, wandb):
    run = RunnerOfACopy(tiny_config(tmp_path), tmp_path, capsys, wandb)
    run.root = _patched(tmp_path, name)
    _case(run.root, name)(run)


def test_a_patch_of_few_files_adds_it_and_two_ranks_train_as_one(tmp_path):
    config, patched = str(tiny_config(tmp_path)), _patched(tmp_path, "replica_check")
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


def test_it_notices_a_rank_whose_gradients_differ(tmp_path):
    config, patched = str(tiny_config(tmp_path)), _patched(tmp_path, "replica_check")
    ended = on_ranks(2, _run, patched, 1, config, *SHORT, "--parallel.replica_check", "2")
    assert [code for code, *_ in ended] == [1, 1], ended
    assert "ranks computed different gradients of the same sequences" in ended[0][2]


def _with_weights(root: Path, weights: str) -> Path:
    """`root`, where the ranks of `shared_backward` are part of this dimension of World.weights."""
    degrees = root / "swamla_titan" / "distributed" / "degrees.py"
    text, line = degrees.read_text(), '"shared_backward", "{}", "shared_backward"'
    assert text.count(line.format("shared_backward")) == 1
    degrees.write_text(text.replace(line.format("shared_backward"), line.format(weights)))
    return root


@pytest.mark.parametrize(
    "plans",
    [
        # Every rank has all weights, and this dimension's own sum is the only one.
        [(2, "shared_backward")],
        # FSDP2 shards the weights over these ranks too, and sums the gradients of matrices; or it shards over pairs,
        # and the sum is beside it.
        pytest.param([(2, "shard"), (4, "shared_backward")], marks=pytest.mark.slow),
    ],
)
def test_gradients_of_ranks_that_share_the_same_tokens_are_summed(plans, tmp_path):
    config, alone = str(tiny_config(tmp_path)), tmp_path / "one"
    assert on_ranks(1, _run, PACKAGE.parent, None, config, *SHORT, "--job.dump_folder", str(alone))[0][0] == 0
    for ranks, weights in plans:
        folder = tmp_path / weights
        patched = _with_weights(_patched(folder, "shared_backward"), weights)
        plan = ("--parallel.shared_backward", "2", "--job.dump_folder", str(folder / "run"))
        ended = on_ranks(ranks, _run, patched, None, config, *SHORT, *plan)
        assert [code for code, *_ in ended] == [0] * ranks, ended
        for name in ("loss", "grad_norm", "val_loss"):
            assert metrics(folder / "run", name) == pytest.approx(metrics(alone, name), rel=1e-5), (name, weights)
        one, several = (tensors(checkpoint(each, 4)) for each in (alone, folder / "run"))
        for name, value in one.items():
            if name.startswith("model."):
                torch.testing.assert_close(several[name], value, rtol=1e-4, atol=1e-5, msg=f"{name}, {weights}")
