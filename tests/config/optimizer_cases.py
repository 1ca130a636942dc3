"""The cases of [optimizer] beside AdamW's own numbers, and of [ema]."""

import math
from collections.abc import Callable

import pytest
import torch

from tests.config.runner import Runner
from tests.train.runs import metrics

_STATES = {
    "adamw": {"exp_avg", "exp_avg_sq", "step"},
    "lion": {"exp_avg"},
    "adamw8bit": {"exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale", "step"},
    "adamw4bit": {"exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale", "step"},
    "adamw_fp8": {"exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale", "step"},
    "muon": {"momentum_buffer"},
}
ONE_STEP = ("--training.steps", "1", "--lr_schedule.min_lr_ratio", "1", "--optimizer.lr")
MUON = ("--optimizer.name", "muon")
WEIGHT = "blocks.0.feed_forward.down.weight"  # [64, 256]


def name(run: Runner) -> None:
    """What a run keeps of a matrix, and of a norm."""
    loss, ends = {}, set()
    for each, states in _STATES.items():
        result = run("--optimizer.name", each, "--optimizer.lr", "1e-4")
        loss[each] = result.series()
        found = result.tensors()
        ends.add(found[f"model.{WEIGHT}"].double().sum().item())
        assert {key.rpartition(".")[2] for key in found if key.startswith(f"optimizer.state.{WEIGHT}.")} == states
        norm = "lion" if each == "lion" else "adamw"
        assert {key.rpartition(".")[2] for key in found if key.startswith("optimizer.state.norm.")} == _STATES[norm]
    assert len(ends) == len(loss)
    # 4 and 8 bits lose a little of AdamW's moments.
    for each in ("adamw8bit", "adamw4bit", "adamw_fp8"):
        assert loss[each] == pytest.approx(loss["adamw"], rel=1e-3)
    assert "expected one of" in run.refusal("--optimizer.name", "AdamW")


def moments(run: Runner) -> None:
    for each in ("adamw", "lion", "muon"):
        for kind in (torch.float32, torch.bfloat16):
            overrides = ("--optimizer.name", each, "--optimizer.moments", str(kind).removeprefix("torch."))
            found = run(*overrides, "--training.steps", "1").tensors(1)
            kept = {t.dtype for key, t in found.items() if key.startswith(f"optimizer.state.{WEIGHT}.") and t.ndim}
            assert kept == {kind}
            assert {t.dtype for key, t in found.items() if key.startswith("optimizer.state.norm.")} == {torch.float32}
    error = run.refusal("--optimizer.moments", "bfloat16", "--optimizer.beta2", "0.999")
    assert "too few bits for the changes of a moment with beta2 = 0.999" in error
    error = run.refusal("--optimizer.moments", "bfloat16", "--optimizer.name", "adamw8bit")
    assert '"bfloat16" has no effect with optimizer.name = "adamw8bit"' in error


def decay_embeddings(run: Runner) -> None:
    """Of an untied embedding and head alone; that nothing else changes is in tests/optim."""
    for tied in ("true", "false"):
        settings = (*ONE_STEP, "0.01", "--optimizer.weight_decay", "10", "--model.tie_embeddings", tied)
        without, with_decay = (run(*settings, "--optimizer.decay_embeddings", each) for each in ("false", "true"))
        start = run(*ONE_STEP, "0", "--model.tie_embeddings", tied).weights(1)
        names = {"model.embedding.weight"} | ({"model.head.weight"} if tied == "false" else set())
        for key, weight in without.weights(1).items():
            expected = -0.01 * 10 * start[key] if key in names else torch.zeros_like(weight)
            torch.testing.assert_close(with_decay.weights(1)[key] - weight, expected, rtol=1e-3, atol=1e-7)
        log = (without.folder / "logs/rank-0.log").read_text()
        assert "optimizer: adamw, no decay: " in log
        assert f"parameters ({', '.join(['embedding', 'head'][: len(names)])}" in log
    assert "has no effect" in run.refusal("--optimizer.decay_embeddings", "true", "--optimizer.weight_decay", "0")


def lazy_tables(run: Runner) -> None:
    """Rows that the last step did not look up stay as they were before it, or move by their moments."""
    table = "annexes.1.engram.table.weight"
    engram = ("--model.engram.layers", "1", "--model.engram.d_mem", "64", "--model.engram.table_size", "500")
    settings = (*engram, "--checkpoint.interval", "1", "--checkpoint.keep_latest", "0", "--optimizer.lazy_tables")
    for lazy in (True, False):
        result = run(*settings, str(lazy).lower())
        before, after = result.tensors(2), result.tensors(3)
        touched = after[f"optimizer.state.{table}.touched"][:, 0]
        earlier = (touched > 0) & (touched < 3)
        assert earlier.any()
        same = before[f"model.{table}"] == after[f"model.{table}"]
        assert same[touched == 0].all()
        assert same[earlier].all() == lazy
        moved = "the rows looked up" if lazy else "all rows"
        assert f"adam of {moved}, no decay, lr x 5" in (result.folder / "logs/rank-0.log").read_text()
    assert "has no effect" in run.refusal("--optimizer.lazy_tables", "false")


def lr_multipliers(run: Runner) -> None:
    start = run(*ONE_STEP, "0").weights(1)
    usual = run(*ONE_STEP, "0.01").weights(1)
    table = '{"blocks.*" = 0.5, "*.wo.weight" = 0}'
    result = run(*ONE_STEP, "0.01", "--optimizer.lr_multipliers", table)
    assert result.series("lr") == [0.01]
    for key, weight in result.weights(1).items():
        factor = 0.0 if key.endswith("wo.weight") else 0.5 if "blocks." in key else 1.0
        torch.testing.assert_close(weight - start[key], factor * (usual[key] - start[key]), rtol=1e-3, atol=1e-6)
    error = run.refusal("--optimizer.lr_multipliers", '{"*.wo.wait" = 0.5}')
    assert '"*.wo.wait" matches no parameter; among them are ' in error
    assert "blocks.*.attention.wo.weight" in error
    assert "expected a table of numbers >= 0" in run.refusal("--optimizer.lr_multipliers", '{"*" = -1}')


def muon_momentum(run: Runner) -> None:
    """After one step it is 1 - momentum of the gradient."""
    found = [run(*MUON, *ONE_STEP, "1e-3", "--optimizer.muon_momentum", value) for value in ("0.9", "0.8")]
    one, other = (result.moment("momentum_buffer", 1) for result in found)
    torch.testing.assert_close(2 * one, other)
    assert "has no effect" in run.refusal("--optimizer.muon_momentum", "0.8")


def muon_nesterov(run: Runner) -> None:
    """The first step has nothing to look ahead by; the next one's direction differs."""
    settings = (*MUON, "--optimizer.lr", "0.01", "--optimizer.muon_nesterov")
    one, other = (run(*settings, value).series() for value in ("true", "false"))
    assert one[:2] == pytest.approx(other[:2], rel=1e-5)
    assert one[2] != pytest.approx(other[2], rel=1e-4)


def muon_ns_steps(run: Runner) -> None:
    """The more there are, the nearer all singular values of an update come to one another."""
    start = run(*MUON, *ONE_STEP, "0").weights(1)[f"model.{WEIGHT}"]
    spread = []
    for steps in ("1", "5"):
        overrides = ("--optimizer.weight_decay", "0", "--optimizer.muon_ns_steps", steps)
        update = run(*MUON, *ONE_STEP, "0.02", *overrides).weights(1)[f"model.{WEIGHT}"] - start
        values = torch.linalg.svdvals(update)
        spread.append((values.max() / values.min()).item())
    assert 10 * spread[1] < spread[0]


def muon_adjust_lr_fn(run: Runner) -> None:
    """match_rms_adamw: 0.2 sqrt(256) = 3.2 for 64 x 256; original: 1. The root mean square of the first is 0.2 lr."""
    start = run(*MUON, *ONE_STEP, "0").weights(1)[f"model.{WEIGHT}"]
    updates = {}
    for rule in ("match_rms_adamw", "original"):
        overrides = ("--optimizer.weight_decay", "0", "--optimizer.muon_adjust_lr_fn", rule)
        updates[rule] = run(*MUON, *ONE_STEP, "0.02", *overrides).weights(1)[f"model.{WEIGHT}"] - start
    torch.testing.assert_close(updates["match_rms_adamw"], 3.2 * updates["original"], rtol=1e-3, atol=1e-6)
    assert updates["match_rms_adamw"].square().mean().sqrt().item() == pytest.approx(0.2 * 0.02, rel=0.2)


def decay(run: Runner) -> None:
    """After the first step min(decay, 2 / 11) of the initial weights is left in the average."""
    start, end = (run(*ONE_STEP, value).weights(1) for value in ("0", "0.01"))
    for value, left in (("0.1", 0.1), ("0.999", 2 / 11)):
        found = run(*ONE_STEP, "0.01", "--ema.decay", value).tensors(1)
        for key, weight in end.items():
            average = found[key.replace("model.", "ema.", 1)]
            torch.testing.assert_close(average, left * start[key] + (1 - left) * weight, rtol=1e-4, atol=1e-6)
    assert not any(key.startswith("ema.") for key in run(*ONE_STEP, "0.01").tensors(1))


def use_ema(run: Runner) -> None:
    """The last of three averages of decay 0 is the weights; of another decay it is not, and training sees nothing."""
    every = ("--validation.interval", "1", "--optimizer.lr", "1e-2")
    losses, of_weights = (run(*every).series(key) for key in ("loss", "val_loss"))
    result = run(*every, "--ema.decay", "1e-9", "--validation.use_ema", "true")
    assert result.series("val_loss") == pytest.approx(of_weights, rel=1e-6)
    result = run(*every, "--ema.decay", "0.9", "--validation.use_ema", "true")
    assert result.series() == losses
    assert all(abs(one - other) > 1e-4 for one, other in zip(result.series("val_loss"), of_weights))
    assert metrics(result.folder, "val_loss").keys() == {1, 2, 3}
    assert not math.isnan(result.series("val_loss")[0])
    assert "true has no effect with ema.decay = 0.0" in run.refusal("--validation.use_ema", "true")


OPTIMIZER_CASES: dict[str, Callable[[Runner], None]] = {
    "optimizer.name": name,
    "optimizer.moments": moments,
    "optimizer.decay_embeddings": decay_embeddings,
    "optimizer.lazy_tables": lazy_tables,
    "optimizer.lr_multipliers": lr_multipliers,
    "optimizer.muon_momentum": muon_momentum,
    "optimizer.muon_nesterov": muon_nesterov,
    "optimizer.muon_ns_steps": muon_ns_steps,
    "optimizer.muon_adjust_lr_fn": muon_adjust_lr_fn,
    "ema.decay": decay,
    "validation.use_ema": use_ema,
}
