"""What a step does: accumulation, clipping, learning rate, precision."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from swamla_titan.config import load_config, split_overrides
from swamla_titan.config.sections import LRSchedule
from swamla_titan.data import BatchLoader, Shape, open_corpus
from swamla_titan.distributed.mesh import World
from swamla_titan.model import SWAMLAModel
from swamla_titan.optim import lr_factor
from swamla_titan.train.setup import set_up
from swamla_titan.train.step import TrainStep
from tests.train.runs import checkpoint, metrics, tensors, train

SHORT = ("--data.num_workers", "0", "--validation.interval", "0", "--model.dropout", "0", "--training.steps", "4")


def moment(path: Path) -> torch.Tensor:
    """Every parameter's first moment as one vector."""
    return torch.cat([value.flatten() for name, value in tensors(path).items() if name.endswith(".exp_avg")])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors(path).items() if name.startswith("model.")}


def gradient(folder: Path) -> torch.Tensor:
    """That of the first step of a run, from one backward pass over the whole global batch."""
    config = load_config(folder / "config.toml")
    model = SWAMLAModel(config.model)
    model.init_weights(config.job.seed)
    corpus = open_corpus(config.data, config.validation, config.job.seed)
    with BatchLoader(corpus, [Shape(0, 5, 64)]) as loader:
        batch = next(loader)
    torch.nn.functional.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_a_global_batch_gives_the_same_losses_however_it_is_cut(tiny, tmp_path):
    """Five sequences by 1, by 2 and by 3 (the last micro-batch is filled up), and by 5."""
    settings = (*SHORT, "--optimizer.lr", "0.01", "--lr_schedule.warmup_steps", "0")
    for size in ("1", "2", "3", "5"):
        folder = str(tmp_path / size)
        assert train(tiny, *settings, "--training.local_batch_size", size, "--job.dump_folder", folder) == 0
    expected = metrics(tmp_path / "5")
    assert expected[4] < expected[1] - 0.1
    for size in ("1", "2", "3"):
        assert metrics(tmp_path / size) == pytest.approx(expected, rel=1e-6)
        assert metrics(tmp_path / size, "grad_norm") == pytest.approx(metrics(tmp_path / "5", "grad_norm"), rel=1e-5)


def test_the_norm_is_that_before_clipping_and_the_optimizer_gets_the_clipped_gradient(tiny, tmp_path):
    """After one step the first moment is 1 - beta1 = 0.1 of what the optimizer got."""
    for clip in (0.25, 0.0, 1e6):
        folder = tmp_path / str(clip)
        settings = (*SHORT, "--training.steps", "1", "--training.max_grad_norm", str(clip))
        assert train(tiny, *settings, "--job.dump_folder", str(folder)) == 0
        norm = gradient(folder).double().norm().item()
        assert norm > 1
        assert metrics(folder, "grad_norm")[1] == pytest.approx(norm, rel=1e-5)
        expected = clip if 0 < clip < norm else norm
        assert moment(checkpoint(folder, 1)).double().norm().item() == pytest.approx(0.1 * expected, rel=1e-5)


def test_clipping_keeps_the_gradient_s_direction(tiny, tmp_path):
    assert train(tiny, *SHORT, "--training.steps", "1", "--training.max_grad_norm", "0.25") == 0
    got = moment(checkpoint(tmp_path / "run", 1)).sort().values
    whole = gradient(tmp_path / "run").sort().values
    torch.testing.assert_close(got / got.norm(), whole / whole.norm(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_learning_rate_applied_at_each_step_is_the_schedule_s(tiny, tmp_path, name):
    """With a huge eps a step is weight decay alone: it multiplies matrices by 1 - lr. Half of it after a resume."""
    run = tmp_path / "run"
    schedule = LRSchedule(name=name, warmup_steps=3, decay_steps=2 if name == "wsd" else 0, min_lr_ratio=0.1)
    settings = (
        *SHORT,
        *("--optimizer.lr", "0.5", "--optimizer.eps", "1e12", "--optimizer.weight_decay", "1"),
        *("--lr_schedule.name", name, "--lr_schedule.decay_steps", str(schedule.decay_steps)),
        *("--lr_schedule.warmup_steps", "3", "--training.steps", "8"),
        *("--checkpoint.interval", "1", "--checkpoint.keep_latest", "0"),
    )
    assert train(tiny, *settings) == 0
    for step in range(5, 9):
        (checkpoint(run, step) / "manifest.json").unlink()  # as a kill would leave them
    assert train(tiny, *settings) == 0
    expected = {step: 0.5 * lr_factor(schedule, step - 1, 8) for step in range(1, 9)}
    assert metrics(run, "lr") == pytest.approx(expected)
    norms = [
        weights(checkpoint(run, step))["model.blocks.0.attention.wo.weight"].double().norm().item()
        for step in range(1, 9)
    ]
    for step, (before, after) in enumerate(pairwise(norms), start=2):
        assert 1 - after / before == pytest.approx(expected[step], rel=1e-4), step


def test_bfloat16_computes_with_float32_weights_and_loses_no_small_update(tiny, tmp_path):
    """Updates of 1e-6 to weights of 0.02 are far below bfloat16's resolution there, 1e-4."""
    constant = ("--lr_schedule.warmup_steps", "0", "--lr_schedule.min_lr_ratio", "1", "--optimizer.weight_decay", "0")
    settings = (*SHORT, *constant, "--training.compute_dtype", "bfloat16")
    for lr in ("0", "1e-6"):
        assert train(tiny, *settings, "--optimizer.lr", lr, "--job.dump_folder", str(tmp_path / lr)) == 0
    still, moved = (weights(checkpoint(tmp_path / lr, 4)) for lr in ("0", "1e-6"))
    assert {weight.dtype for weight in moved.values()} == {torch.float32}
    name = next(key for key, weight in moved.items() if weight.ndim == 2 and "blocks" in key)
    change = (moved[name] - still[name]).abs()
    assert (change > 0).float().mean() > 0.99
    assert 1e-6 < change.mean() < 4.1e-6
    stored = tensors(checkpoint(tmp_path / "1e-6", 4))
    states = [value for key, value in stored.items() if key.endswith((".exp_avg", ".exp_avg_sq"))]
    assert {state.dtype for state in states} == {torch.float32}


def test_bfloat16_stays_close_to_float32(tiny, tmp_path):
    for dtype in ("bfloat16", "float32"):
        folder = str(tmp_path / dtype)
        assert train(tiny, *SHORT, "--training.compute_dtype", dtype, "--job.dump_folder", folder) == 0
    half, full = metrics(tmp_path / "bfloat16"), metrics(tmp_path / "float32")
    assert half != full
    assert half == pytest.approx(full, rel=5e-3)


def test_a_step_starts_from_gradients_of_its_own(tiny, tmp_path):
    """A gradient left over from the step before would double the second step's norm at a learning rate of 0."""
    assert train(tiny, *SHORT, "--optimizer.lr", "0", "--training.max_grad_norm", "0") == 0
    norms = list(metrics(tmp_path / "run", "grad_norm").values())
    assert max(norms) < 1.5 * min(norms)
    assert math.isfinite(max(norms))


def test_setup_and_step_take_the_trainers_steps_without_it(tiny, tmp_path):
    """As benchmarks do, with dropout, and nothing is written meanwhile."""
    settings = ("--data.num_workers", "0", "--validation.interval", "0", "--training.steps", "4")
    config = load_config(tiny, split_overrides(settings)[0])
    before = {path.name for path in tmp_path.iterdir()}
    setup = set_up(config, World.alone())
    with setup.open_loader() as loader:
        take_step = TrainStep(setup.stage, setup.world, setup.build_state())
        outcomes = [take_step(next(loader), step) for step in range(1, 5)]
    assert {path.name for path in tmp_path.iterdir()} == before

    assert train(tiny, *settings) == 0
    for name in ("loss", "grad_norm", "lr"):
        taken = {step: float(getattr(outcome, name)) for step, outcome in enumerate(outcomes, 1)}
        assert metrics(tmp_path / "run", name) == taken
