"""The soak of benchmarks/chaos.py: what it compares, and a short one for real."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.chaos_compare import _of_tensors, differences
from tests.train.runs import checkpoint, metrics, train
from tests.waiting import HANG

ROOT = Path(__file__).resolve().parent.parent
FAST = ("--data.num_workers", "0", "--validation.interval", "2", "--checkpoint.interval", "2", "--training.steps", "4")


def test_any_difference_between_two_runs_is_found(tiny, tmp_path):
    one, other = tmp_path / "run", tmp_path / "other"
    assert train(tiny, *FAST) == 0
    assert train(tiny, *FAST, "--job.dump_folder", str(other)) == 0
    assert differences(one, other, 4) == []
    assert differences(one, other, 5) == ["no metrics of step 5"]

    metrics = (one / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]

    def with_changed(name: str, factor: float, tolerance: float = 0.0) -> list[str]:
        changed = [line | ({name: line[name] * factor} if name in line else {}) for line in lines]
        (one / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        found = differences(one, other, 4, tolerance)
        (one / "metrics.jsonl").write_text(metrics)
        return found

    assert len(with_changed("loss", 1 + 1e-12)) == 4
    assert len(with_changed("val_loss", 1 + 1e-12)) == 2
    assert with_changed("loss", 1 + 1e-7, tolerance=1e-6) == []
    assert len(with_changed("loss", 1 + 1e-5, tolerance=1e-6)) == 4
    assert len(with_changed("tokens", 2, tolerance=1e-6)) == 4

    # A line that a crash cut short, and the step again: the last one counts.
    (one / "metrics.jsonl").write_text('{"step": 1, "los\n' + json.dumps(lines[0] | {"loss": 7.0}) + "\n" + metrics)
    assert differences(one, other, 4) == []

    record = checkpoint(one, 4) / "train.json"
    text = record.read_text()
    record.write_text(text.replace('"sequences": 20', '"sequences": 21', 1))
    assert (
        "checkpoint of step 4: train.json has changed since it was written"
        in differences(one, other, 4, damaged={4})[0]
    )
    record.write_text(text)
    (checkpoint(one, 2) / "train.json").unlink()
    assert differences(one, other, 4) == ["checkpoint of step 2: train.json: No such file or directory"]
    assert differences(one, other, 4, damaged={2}) == []
    shutil.copy(checkpoint(other, 2) / "train.json", checkpoint(one, 2))

    # Other weights, saved whole.
    shutil.rmtree(other)
    assert train(tiny, *FAST, "--job.dump_folder", str(other), "--optimizer.lr", "1e-9") == 0
    shutil.copy(one / "metrics.jsonl", other)
    found = differences(one, other, 4)
    assert "tensor model.norm.weight differs" in found
    assert "tensor model.norm.weight differs" in differences(one, other, 4, 1e-6)
    assert not any("random." in each for each in found)


def test_tensors_are_compared_bit_for_bit_with_nans_in_them_or_within_a_tolerance():
    nan, inf = math.nan, math.inf
    one = {"a": torch.tensor([1.0, nan, inf]), "random.rank-0.cpu": torch.tensor([1], dtype=torch.uint8)}
    assert _of_tensors(one, {name: tensor.clone() for name, tensor in one.items()}, 0.0) == []
    near, far, finite = (one | {"a": torch.tensor(a)} for a in ([1 + 1e-6, nan, inf], [1.1, nan, inf], [1.0, 0.0, inf]))
    assert _of_tensors(near, one, 0.0) == _of_tensors(far, one, 1e-5) == ["tensor a differs"]
    assert _of_tensors(finite, one, 1e-5) == ["tensor a differs"]
    assert _of_tensors(near, one, 1e-5) == []
    assert _of_tensors({"a": one["a"]}, one, 1e-5) == []  # other ranks, other random states
    assert _of_tensors({"a": one["a"]}, one, 0.0) == ["tensor random.rank-0.cpu is there only once"]


def test_the_gradients_of_the_steps_that_a_soak_names_are_no_numbers(tiny, tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks/chaos_site'}:{ROOT}", "CHAOS_NAN_STEPS": "2,3"}
    command = [sys.executable, "-m", "swamla_titan", "train", str(tiny), *FAST]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=HANG)
    norms = metrics(tmp_path / "run", "grad_norm")
    assert [step for step, norm in norms.items() if norm is None] == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["2", "2,1,3"])
def test_two_minutes_of_random_faults_lose_nothing(tmp_path, processes):
    figures = tmp_path / "chaos.json"
    command = ["--minutes", "2", "--seed", "5", "--faults", "2", "--steps", "60", "--processes", processes]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/chaos.py"), *command, "--json", str(figures)],
        capture_output=True,
        text=True,
        timeout=3 * HANG,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was lost, and nothing differs" in done.stdout
    found = json.loads(figures.read_text())
    assert sum(len(effect["seconds"]) for effect in found["faults"].values()) >= 2
    assert found["wrong"] == []
