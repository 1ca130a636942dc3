"""An exported folder in the hands of a user: user.py, in a process that cannot import this package."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swamla_titan.checkpoint.store import find_checkpoint
from swamla_titan.cli import main
from swamla_titan.tools.generate import load_model
from swamla_titan.train.step import GROUPS
from tests.tiny_config import tiny_config
from tests.train.runs import train

pytestmark = pytest.mark.slow

USER = Path(__file__).with_name("user.py")
SHORT = ("--training.steps", "6", "--validation.interval", "0", "--optimizer.lr", "0.01", "--data.num_workers", "0")
SHAPES = {
    "as-it-is": (),
    "with-everything": (
        *("--model.mla_selective", "true", "--model.tie_embeddings", "false", "--model.rope_scaling", "2.0"),
        *("--model.engram.layers", "[1]", "--model.engram.d_mem", "64", "--model.engram.table_size", "500"),
        *("--model.qk_norm", "true", "--model.num_kv_heads", "1", "--model.q_lora_rank", "24"),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_user_does(tmp_path, shape):
    assert train(tiny_config(tmp_path), *SHORT, *SHAPES[shape]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/annexes.json.gz").exists() == (shape == "with-everything")
    model = load_model(find_checkpoint(str(tmp_path / "run"), GROUPS), False, torch.device("cpu")).model
    tokens = torch.randint(0, 257, (2, 60))
    with torch.no_grad():
        torch.save((tokens, model(tokens)), tmp_path / "expected.pt")
    found = [spec for spec in map(importlib.util.find_spec, ("accelerate", "peft")) if spec and spec.origin]
    paths = sorted({str(Path(spec.origin).parents[1]) for spec in found})  # which -I would leave out
    command = [sys.executable, "-I", str(USER), str(tmp_path / "out"), *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 10


@pytest.mark.parametrize("shape, outcome", [("as-it-is", "equal"), ("with-everything", "refused: selective attention")])
def test_tensor_parallelism_of_transformers(tmp_path, shape, outcome):
    pytest.importorskip("accelerate")
    assert train(tiny_config(tmp_path), *SHORT, *SHAPES[shape], "--model.num_kv_heads", "2") == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(USER.with_name("tensor_parallel.py")), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(outcome) == 2
