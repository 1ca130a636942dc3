"""The Trainer of transformers on an exported folder, beside our own trainer on the same batches."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from swamla_titan.cli import main
from swamla_titan.model import SWAMLAModel
from tests.tiny_config import tiny_config
from tests.train.runs import metrics, train

pytestmark = pytest.mark.slow

STEPS, LR, SEQUENCES = 100, 1e-3, 4
SETTINGS = (
    *("--training.global_batch_size", str(SEQUENCES), "--training.local_batch_size", str(SEQUENCES)),
    *("--lr_schedule.warmup_steps", "0", "--lr_schedule.min_lr_ratio", "1", "--optimizer.weight_decay", "0"),
    *("--optimizer.name", "adamw", "--optimizer.beta1", "0.9", "--optimizer.beta2", "0.95", "--optimizer.eps", "1e-8"),
    *("--model.dropout", "0", "--validation.interval", "0", "--data.num_workers", "0", "--training.max_grad_norm", "1"),
)


def test_losses_are_those_of_our_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    config = tiny_config(tmp_path)
    drawn = ("--job.dump_folder", str(tmp_path / "drawn"), "--training.steps", "1", "--optimizer.lr", "0")
    assert train(config, *SETTINGS, *drawn) == 0
    assert main(["export", str(tmp_path / "drawn"), str(tmp_path / "out")]) == 0

    batches: list[Tensor] = []
    forward = SWAMLAModel.forward

    def recording(self: SWAMLAModel, tokens: Tensor, targets: Tensor | None = None, *args, **kwargs) -> Tensor:
        if self.training and targets is not None:
            batches.append(torch.cat([tokens, targets[:, -1:]], dim=1))
        return forward(self, tokens, targets, *args, **kwargs)

    monkeypatch.setattr(SWAMLAModel, "forward", recording)
    assert train(config, *SETTINGS, "--training.steps", str(STEPS), "--optimizer.lr", str(LR)) == 0
    assert len(batches) == STEPS
    ours = metrics(tmp_path / "run")

    losses: list[float] = []

    class InOrder(Trainer):
        """Takes the sequences as they come, and keeps the losses, which the log rounds."""

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset or self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            found = super().compute_loss(*args, **kwargs)
            losses.append(float(found.detach()))
            return found

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=SEQUENCES,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    sequences = [{"input_ids": row, "labels": row} for row in torch.cat(batches)]
    InOrder(model=model, args=arguments, train_dataset=sequences).train()
    assert len(losses) == STEPS
    differences = [abs(ours[step] - loss) for step, loss in enumerate(losses, start=1)]
    assert ours[STEPS] < ours[1] - 1
    assert max(differences) < 1e-4
    print(f"largest difference of {STEPS} losses, from {ours[1]:.3f} to {ours[STEPS]:.3f}: {max(differences):.2g}")
