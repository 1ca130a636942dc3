"""Runs whose sequence length, batch and window change by training.stages."""

import json
import re
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import nn

from swamla_titan.model import SWAMLAModel
from swamla_titan.tools.generate import load_model
from tests.config.runner import before_every_call_of
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, train

# 320 tokens a step, then 480 from step 5 on, 672 from step 8 on, 896 from step 12 on
STAGES = """
[[training.stages]]
tokens = 1280
seq_len = 96
[[training.stages]]
tokens = 2500
global_batch_size = 7
local_batch_size = 3
[[training.stages]]
tokens = 5000
seq_len = 128
swa_window = 32
"""
TOKENS = [320] * 4 + [480] * 3 + [672] * 4 + [896] * 3
# The learning rate must not depend on training.steps, which each part of a run raises.
COMMON = (
    *("--lr_schedule.warmup_steps", "0", "--lr_schedule.min_lr_ratio", "1"),
    *("--data.num_workers", "0", "--checkpoint.keep_latest", "0", "--checkpoint.interval", "4"),
)


@pytest.fixture
def ramp(tiny: Path) -> Path:
    tiny.write_text(tiny.read_text() + STAGES)
    return tiny


def trained(config: Path, folder: Path, steps: int, *more: str) -> Path:
    assert train(config, *COMMON, *more, "--job.dump_folder", str(folder), "--training.steps", str(steps)) == 0
    return folder


def test_each_stage_has_its_shapes_its_window_and_its_targets(ramp: Path, tmp_path: Path):
    calls: list[tuple[bool, int, int, int]] = []

    def look(module: nn.Module, tokens: torch.Tensor, *_: object) -> None:
        assert isinstance(module, SWAMLAModel)
        calls.append((module.training, *tokens.shape, module.config.swa_window))

    with before_every_call_of(SWAMLAModel, look):
        run = trained(ramp, tmp_path / "run", 14)
    assert list(metrics(run, "tokens").values()) == list(accumulate(TOKENS))
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    stages = [(each["step"], each["number"]) for each in events if each["event"] == "stage"]
    assert stages == [(5, 1), (8, 2), (12, 3)]
    expected = [(2, 64, 16)] * 12 + [(2, 96, 16)] * 9 + [(3, 96, 16)] * 12 + [(3, 128, 32)] * 9
    assert [shape for training, *shape in calls if training] == [list(each) for each in expected]
    assert {length for training, _, length, _ in calls if not training} == {128}  # the longest, from the beginning
    record = json.loads((checkpoint(run, 14) / "train.json").read_text())
    assert (record["tokens"], record["sequences"]) == (sum(TOKENS), 7 * 5 + 7 * 7)
    # What is generated with has the window that the last step was trained with.
    assert load_model(checkpoint(run, 12), False).model.config.swa_window == 32
    assert load_model(checkpoint(run, 8), False).model.config.swa_window == 16


def test_a_run_resumed_twice_in_mid_ramp_is_the_same_bit_for_bit(ramp: Path, tmp_path: Path):
    """In the second stage, and at the first step of the last one; with spikes, whose window begins anew in a stage."""
    spikes = ("--fault_tolerance.spike_sigma", "0.05", "--fault_tolerance.spike_window", "2")
    whole = trained(ramp, tmp_path / "whole", 14, *spikes)
    for steps in (6, 11, 14):
        run = trained(ramp, tmp_path / "run", steps, *spikes)
    skipped = metrics(whole, "skipped_steps")
    assert 0 < skipped[14] < 10
    # The first two steps of a stage are no spikes, whatever their norms.
    assert [skipped[step] - skipped[step - 1] for step in (5, 6, 8, 9, 12, 13)] == [0] * 6
    assert_same_checkpoint(checkpoint(run, 14), checkpoint(whole, 14))
    assert metrics(run) == metrics(whole)
    assert metrics(run, "tokens") == metrics(whole, "tokens")


def test_other_stages_are_another_run_unless_they_are_allowed(ramp: Path, tmp_path: Path, capsys):
    run = trained(ramp, tmp_path / "run", 6)
    capsys.readouterr()
    other = ("--training.stages", "[{tokens = 1280, seq_len = 80}]", "--training.steps", "7")
    again = (*COMMON, "--job.dump_folder", str(run), *other)
    assert train(ramp, *again) == 2
    assert "training.stages: [{'tokens': 1280, 'seq_len': 96}" in capsys.readouterr().err
    assert train(ramp, *again, "--checkpoint.allow", "batch") == 0
    assert metrics(run, "tokens")[7] == sum(TOKENS[:6]) + 5 * 80


@pytest.mark.slow
def test_weights_of_a_mixture_change_with_a_stage_and_a_resumed_run_has_them(ramp: Path, tmp_path: Path, capsys):
    """Three quarters of one source, then a fifth; 20 sequences before the change, 7 * 5 + ... after it."""
    tables = ""
    for name, weight in (("one", 0.75), ("two", 0.25)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} {number} " * 9}) + "\n" for number in range(200))
        )
        tables += f'[[data.sources]]\nname = "{name}"\nweight = {weight}\npath = "{tmp_path}/{name}.jsonl"\n'
    text = re.sub(r'path = ".*made-up-text"\n', "", ramp.read_text())
    ramp.write_text(text.replace("seq_len = 96\n", "seq_len = 96\nweights = {one = 0.2, two = 0.8}\n") + tables)
    whole = trained(ramp, tmp_path / "whole", 14)
    for steps in (5, 13, 14):
        run = trained(ramp, tmp_path / "run", steps)
    assert_same_checkpoint(checkpoint(run, 14), checkpoint(whole, 14))
    tokens = metrics(run, "tokens/one")
    assert tokens == metrics(whole, "tokens/one")
    assert tokens[4] == 15 * 64
    assert tokens[14] == pytest.approx(15 * 64 + 0.2 * sum(TOKENS[4:]), abs=128)
    capsys.readouterr()
    # Another batch: the streams continue, and the weights are those of the stage.
    other = (*COMMON, "--job.dump_folder", str(run), "--training.local_batch_size", "1", "--training.steps", "15")
    assert train(ramp, *other, "--training.global_batch_size", "4", "--checkpoint.allow", "batch") == 0
    first = 4 * 5 + 3 * 5 + 7 * 7
    assert f"from sequence {first} on the weights are one 0.2, two 0.8" in capsys.readouterr().out
    assert metrics(run, "tokens/one")[15] - tokens[14] == 128
    assert train(ramp, *other, "--training.global_batch_size", "4", "--training.steps", "17") == 0
    assert metrics(run, "tokens/one")[17] - tokens[14] == 4 * 128  # of 3 steps of 7 sequences
    ramp.write_text(ramp.read_text().replace("{one = 0.2, two = 0.8}", "{one = 0.2, three = 0.8}"))
    assert train(ramp, *COMMON) == 2
    assert 'weights: "three" is none of [[data.sources]]' in capsys.readouterr().err
    ramp.write_text(ramp.read_text().replace("three = 0.8", "two = 0.7"))
    assert train(ramp, *COMMON) == 2
    assert "number 1 (tokens = 1280): data.sources: the weights add up to 0.9" in capsys.readouterr().err
