"""Between two log lines nothing waits for the GPU: a run whose steps torch forbids to.

Of heads as wide as `base` has them, so that our own kernels compute them, and of as many tokens in a micro-batch that
torch chooses the kernels of large ones. What torch does not forbid is waiting for events: once in max_bad_steps steps
train/bad_steps.py waits for one of the step before, while the GPU has a whole step to compute.
"""

import pytest
import torch

from swamla_titan.train.step import TrainStep
from swamla_titan.train.trainer import Trainer
from tests.train.runs import train

SHAPE = [
    *("--model.dim", "192", "--model.num_heads", "2", "--model.qk_nope_head_dim", "128"),
    *("--model.qk_rope_head_dim", "64", "--model.v_head_dim", "128", "--model.swa_window", "128"),
    *("--model.max_seq_len", "1024", "--model.dropout", "0", "--training.seq_len", "1024"),
    *("--training.local_batch_size", "4", "--training.global_batch_size", "8"),
    *("--training.compute_dtype", "bfloat16", "--job.deterministic", "false"),
]
FEW = ["--training.steps", "12", "--metrics.log_interval", "100", "--validation.interval", "0"]
ENGRAM = ("--model.engram.layers", "0,2", "--model.engram.d_mem", "64")
COMPILED = ("--compile.enabled", "true")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        COMPILED,
        (*COMPILED, "--data.document_mask", "true"),
        (*COMPILED, "--training.global_batch_size", "5"),  # the last micro-batch is of one sequence
        ("--ema.decay", "0.99", "--fault_tolerance.max_bad_steps", "3"),
        (*COMPILED, "--float8.recipe", "native", "--float8.linear_layers", "all", "--float8.loss_scaling", "true"),
        ("--optimizer.name", "muon"),
        ("--optimizer.name", "adamw8bit"),
        (*COMPILED, *ENGRAM, "--ema.decay", "0.99"),
        (*COMPILED, *ENGRAM, "--ema.decay", "0.99", "--parallel.tables_on_host", "true"),
    ],
    ids=str,
)
def test_steps_do_not_wait_for_the_gpu(tiny, monkeypatch, options):
    real_step, real_log = TrainStep.__call__, Trainer._log_step
    forbidden = []

    def step(self, batch, number):
        if number == 4:  # the first ones compile
            torch.cuda.set_sync_debug_mode("error")
        forbidden.append(torch.cuda.get_sync_debug_mode())
        return real_step(self, batch, number)

    def log(self):
        torch.cuda.set_sync_debug_mode("default")
        real_log(self)

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(Trainer, "_log_step", log)
    try:
        assert train(tiny, *SHAPE, *FEW, *options) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert forbidden == [0] * 3 + [2] * 9
