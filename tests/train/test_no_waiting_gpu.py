"""Between two log lines nothing waits for the GPU: a run whose steps torch forbids to."""

import pytest
import torch

from swamla_titan.train.trainer import Trainer
from tests.train.runs import train

COMPILED = ("--compile.enabled", "true")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        COMPILED,
        ("--data.document_mask", "true", "--training.local_batch_size", "1"),
        ("--ema.decay", "0.99", "--fault_tolerance.max_bad_steps", "3"),
        (*COMPILED, "--float8.recipe", "native", "--float8.products", "all", "--float8.loss_scaling", "true"),
        ("--optimizer.name", "muon"),
        ("--optimizer.name", "adamw8bit"),
    ],
    ids=str,
)
def test_steps_do_not_wait_for_the_gpu(tiny, monkeypatch, options):
    real_step, real_log = Trainer.train_step, Trainer._log_step
    forbidden = []

    def step(self, batch):
        if self.step == 3:  # the first ones compile
            torch.cuda.set_sync_debug_mode("error")
        forbidden.append(torch.cuda.get_sync_debug_mode())
        return real_step(self, batch)

    def log(self):
        torch.cuda.set_sync_debug_mode("default")
        real_log(self)

    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr(Trainer, "_log_step", log)
    few = ("--training.steps", "12", "--metrics.log_interval", "100", "--validation.interval", "0")
    try:
        assert train(tiny, *few, "--training.compute_dtype", "bfloat16", *options) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert forbidden == [0] * 3 + [2] * 9
