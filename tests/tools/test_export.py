"""`export` on checkpoints of short runs: the folder that it writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swamla_titan.cli import main
from swamla_titan.tools.generate import load_model
from tests.tiny_config import tiny_config
from tests.train.runs import checkpoint, metrics, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    settings = "--training.steps", "4", "--validation.interval", "2", "--checkpoint.interval", "2"
    assert train(tiny_config(folder), *settings, "--data.num_workers", "0", "--ema.decay", "0.5") == 0
    return folder / "run"


def exported(trained: Path, out: Path, *options: str) -> Path:
    assert main(["export", str(trained), str(out), *options]) == 0
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_tensor_is_the_checkpoint_s_in_the_chosen_dtype(trained, tmp_path, dtype):
    stored = load_file(exported(trained, tmp_path / "out", "--dtype", dtype) / "model.safetensors")
    model = load_model(checkpoint(trained, 4), False, torch.device("cpu")).model
    own = {f"model.{name}": tensor.to(getattr(torch, dtype)) for name, tensor in model.named_parameters()}
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[name], stored[name]) and own[name].dtype == stored[name].dtype for name in own)


def test_the_average_of_the_weights(trained, tmp_path):
    stored = load_file(exported(trained, tmp_path / "out", "--ema") / "model.safetensors")
    model = load_model(checkpoint(trained, 4), True, torch.device("cpu")).model
    assert torch.equal(stored["model.norm.weight"], model.norm.weight)
    other = load_model(checkpoint(trained, 4), False, torch.device("cpu")).model
    assert not torch.equal(model.norm.weight, other.norm.weight)


def test_the_card_says_what_the_run_recorded(trained, tmp_path):
    card = (exported(trained, tmp_path / "out") / "README.md").read_text()
    state = json.loads((checkpoint(trained, 4) / "train.json").read_text())
    loss, val_loss = (metrics(trained, name)[4] for name in ("loss", "val_loss"))
    for line in (
        f"| tokens | {state['tokens']:,} |",
        "| steps | 4 of 4 |",
        f"| loss | {loss:.4f} (step 4) |",
        f"| val_loss | {val_loss:.4f} (step 4) |",
        "library_name: transformers",
        'dump_folder = "run"',
    ):
        assert line in card
    assert str(trained) not in card


def test_a_folder_in_use_is_left_alone(trained, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert main(["export", str(trained), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
