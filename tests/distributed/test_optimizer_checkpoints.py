"""Checkpoints of every optimizer: other numbers of ranks go on from them, the same number bit for bit."""

import re
from pathlib import Path

import pytest
import torch

from swamla_titan.config import Config, Override, load_config, with_vocabulary
from swamla_titan.config.sections import LRSchedule, Optimizer
from swamla_titan.launch.process_group import destroy_distributed, init_distributed
from swamla_titan.train.startup_summary import changed_settings
from swamla_titan.train.step import RunState
from tests.distributed.job import run, run_and_listen, run_killed
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, tensors

COMMON = (
    *("--data.num_workers", "0", "--validation.interval", "0", "--model.dropout", "0", "--ema.decay", "0.8"),
    *("--lr_schedule.warmup_steps", "0", "--lr_schedule.min_lr_ratio", "1", "--checkpoint.interval", "2"),
    # Sizes that neither 2 nor 3 divide, of rows that can be quantized.
    *("--model.dim", "68", "--model.num_heads", "2", "--model.ffn_hidden_dim", "140", "--model.kv_lora_rank", "36"),
)
OPTIMIZERS = {
    "adamw8bit": ("--optimizer.name", "adamw8bit"),
    "adamw4bit": ("--optimizer.name", "adamw4bit"),
    "adamw_fp8": ("--optimizer.name", "adamw_fp8"),
    "lion": ("--optimizer.name", "lion", "--optimizer.lr", "1e-4"),
    "muon": ("--optimizer.name", "muon", "--optimizer.moments", "bfloat16"),
    "adamw-bfloat16": ("--optimizer.moments", "bfloat16"),
}


def each(*in_ci: str) -> pytest.MarkDecorator:
    """Every optimizer, but in CI only these."""
    marked = [pytest.param(name, marks=[] if name in in_ci else [pytest.mark.slow]) for name in OPTIMIZERS]
    return pytest.mark.parametrize("name", marked)


def written(folder: Path) -> str:
    return str(tiny_config(folder))


def loaded_and_saved(config: str, source: str, target: str, overrides: list[str]) -> None:
    """As a rank of a job: fill weights, average and optimizer from the checkpoint `source`, and save them again."""
    pairs = zip(overrides[::2], overrides[1::2])
    settings = [Override(*key.removeprefix("--").split("."), value) for key, value in pairs]
    resolved = with_vocabulary(load_config(config, settings), 257)
    world = init_distributed(resolved.parallel)
    state = RunState(resolved, world, Path(source), 2)
    import torch.distributed.checkpoint as dcp

    tensors = state.tensors()
    learned = {name: tensors[name] for name in ("model", "optimizer", "ema")}
    dcp.save(learned, checkpoint_id=target, no_dist=world.size == 1)
    destroy_distributed()


@each("adamw4bit")
def test_what_2_ranks_wrote_3_and_1_read_bit_for_bit(tmp_path, name):
    config, settings = written(tmp_path), [*COMMON, *OPTIMIZERS[name], "--training.steps", "2"]
    assert on_ranks(2, run, config, *settings) == [0, 0]
    first = checkpoint(tmp_path / "run", 2)
    before = first
    for ranks in (3, 1):
        after = tmp_path / f"by-{ranks}"
        on_ranks(ranks, loaded_and_saved, config, str(before), str(after), settings)
        before = after
    expected, found = tensors(first), tensors(before)
    assert any(tensor.startswith("ema.") for tensor in found)
    for tensor, value in found.items():
        assert torch.equal(value, expected[tensor]), tensor


@each("muon")
def test_a_run_on_2_then_3_then_1_ranks_learns_what_one_process_does(tmp_path, name):
    config, whole = written(tmp_path), tmp_path / "whole"
    settings = (*COMMON, *OPTIMIZERS[name])
    for ranks, steps in ((2, 2), (3, 4), (1, 6)):
        assert on_ranks(ranks, run, config, *settings, "--training.steps", str(steps)) == [0] * ranks
    assert run(config, *settings, "--training.steps", "6", "--job.dump_folder", str(whole)) == 0
    # Gradients are summed in another order, and what differs in its last bits may be quantized to another code.
    assert metrics(tmp_path / "run") == pytest.approx(metrics(whole), rel=1e-3)


@pytest.mark.slow  # AdamW is killed in test_kills.py
@each("adamw4bit")
def test_a_killed_job_goes_on_bit_for_bit(tmp_path, name):
    config, whole = written(tmp_path), tmp_path / "whole"
    settings = (*COMMON, *OPTIMIZERS[name], "--training.steps", "4")
    assert on_ranks(2, run, config, *settings, "--job.dump_folder", str(whole)) == [0, 0]
    with pytest.raises(AssertionError, match="died"):
        on_ranks(2, run_killed, 4, config, *settings, "--checkpoint.async_mode", "disabled")
    assert on_ranks(2, run, config, *settings) == [0, 0]
    assert "resumed from" in (tmp_path / "run/logs/rank-0.log").read_text()
    assert_same_checkpoint(checkpoint(tmp_path / "run", 4), checkpoint(whole, 4))


@each("adamw8bit", "muon")
def test_a_checkpoint_of_other_groups_is_read_bit_for_bit_and_the_new_rule_is_said(tmp_path, name):
    """As those are that were written when every matrix decayed."""
    config, settings = written(tmp_path), [*COMMON, *OPTIMIZERS[name], "--training.steps", "2"]
    assert run(config, *settings, "--optimizer.decay_embeddings", "true") == 0
    before, after = checkpoint(tmp_path / "run", 2), tmp_path / "again"
    loaded_and_saved(config, str(before), str(after), settings)
    expected, found = tensors(before), tensors(after)
    assert {key for key in expected if key.startswith("optimizer.")} == {k for k in found if k.startswith("optimizer.")}
    for tensor, value in found.items():
        assert torch.equal(value, expected[tensor]), tensor
    assert run(config, *settings, "--training.steps", "4") == 0
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert log.count("resumed with another setting: optimizer.decay_embeddings was true and is false") == 1
    assert log.count("resumed with another setting") == 1


def test_what_a_checkpoint_of_before_the_key_was_trained_by_is_known(tmp_path):
    def changes(text: str, **optimizer: object) -> list[str]:
        (tmp_path / "config.toml").write_text(text)
        return changed_settings(tmp_path / "config.toml", Config(optimizer=Optimizer(**optimizer)))

    old = "[optimizer]\nlr = 0.1\n"
    said = ["optimizer.lr was 0.1 and is 0.0003", "optimizer.decay_embeddings was true and is false"]
    assert changes(old) == said
    assert changes(old, lr=0.1, decay_embeddings=True) == []
    assert changes(old, lr=0.1, weight_decay=0.0) == []  # there is none to take
    assert changes("[optimizer]\ndecay_embeddings = false\n") == []
    assert changes('[optimizer]\ndecay_embeddings = false\nlr_multipliers = {"*" = 2.0}\n') == [
        'optimizer.lr_multipliers was {"*": 2.0} and is {}'
    ]
    assert changes("optimizer = 3\n") == changes("no TOML") == []
    assert changes("[lr_schedule]\nwarmup_steps = 7\n") == [
        f"lr_schedule.warmup_steps was 7 and is {LRSchedule().warmup_steps}"
    ]


def test_moments_of_another_type_are_converted(tmp_path):
    config, settings = written(tmp_path), (*COMMON, "--training.steps", "2")
    assert run(config, *settings) == 0
    further = ("--training.steps", "4", "--optimizer.moments", "bfloat16", "--optimizer.lr", "0")
    assert run(config, *settings, *further, "--optimizer.beta1", "0.99", "--training.max_grad_norm", "1e-12") == 0
    one, other = (tensors(checkpoint(tmp_path / "run", step)) for step in (2, 4))
    name = "optimizer.state.blocks.0.attention.wo.weight.exp_avg"
    assert other[name].dtype == torch.bfloat16
    torch.testing.assert_close(other[name].float(), 0.99**2 * one[name], rtol=0.015, atol=1e-12)


def test_a_checkpoint_of_another_optimizer_is_refused_with_the_difference(tmp_path):
    config, settings = written(tmp_path), (*COMMON, "--training.steps", "2")
    assert run(config, *settings) == 0
    ended = run_and_listen(config, *settings, "--training.steps", "4", "--optimizer.name", "muon")
    assert ended.code == 2
    assert f"{checkpoint(tmp_path / 'run', 2)} belongs to another run:" in ended.err
    assert re.search(r"optimizer\.name.*adamw.*muon|optimizer\.name.*muon.*adamw", ended.err)
