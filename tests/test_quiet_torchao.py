"""Nothing is said of kernels that nobody asked for."""

import subprocess
import sys

import pytest

STEP = """
import torch
from swamla_titan.config.sections import Optimizer
from swamla_titan.optim import build_optimizer

model = torch.nn.Linear(64, 128)
optimizer = build_optimizer(model, Optimizer(name="adamw_fp8"))
model(torch.ones(1, 64)).sum().backward()
optimizer.step(3e-4)
"""
FLOAT8 = "import swamla_titan.quantization.float8"


@pytest.mark.parametrize("code", [STEP, pytest.param(FLOAT8, marks=pytest.mark.slow)])
def test_torchao_is_imported_without_a_word(code: str):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
