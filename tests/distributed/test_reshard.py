"""A checkpoint of any plan goes on under any other as if nothing had happened, and under its own bit for bit."""

import functools
import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.distributed.job import run, run_killed
from tests.distributed.ranks import on_ranks
from tests.distributed.test_plans import PLANS
from tests.tiny_config import tiny_config
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, tensors

LEG = 3  # steps a plan takes before the next one goes on
# The learning rate must not depend on training.steps, which each leg raises: constant after a warm-up.
COMMON = (
    *("--lr_schedule.warmup_steps", "2", "--lr_schedule.min_lr_ratio", "1", "--optimizer.lr", "1e-3"),
    *("--model.dropout", "0", "--model.num_layers", "4", "--data.streams", "7", "--data.num_workers", "0"),
    *("--training.global_batch_size", "5", "--training.local_batch_size", "1", "--checkpoint.interval", "100"),
    *("--validation.interval", "3", "--validation.max_tokens", "1000"),
)
# Odd numbers of rows, which no number of ranks divides; 257 ids are padded to 384.
_NARROW_MLA = (
    *("--model.kv_lora_rank", "33", "--model.qk_nope_head_dim", "11", "--model.qk_rope_head_dim", "8"),
    *("--model.v_head_dim", "9"),
)
ODD = (*_NARROW_MLA, "--model.dim", "66", "--model.num_heads", "3", "--model.ffn_hidden_dim", "101")
# What tensor parallelism shares must divide by its degree; the rest need not, nor what FSDP makes of it.
TENSOR_2 = (*_NARROW_MLA, "--model.dim", "76", "--model.num_heads", "2", "--model.ffn_hidden_dim", "104")
HEADS = {
    "tied": (),
    "untied": ("--model.tie_embeddings", "false", "--model.norm", "dynamic_tanh", "--model.q_lora_rank", "21"),
}

ALONE = (1, ())
FSDP_2, FSDP_3, FSDP_4 = (2, ()), (3, ()), (4, ())
DDP_3 = (3, ("--parallel.data_parallel", "ddp"))
HSDP_2X2 = (4, ("--parallel.data_parallel", "hsdp", "--parallel.dp_replicate", "2"))
TP_2, TP_2_FSDP_2 = (2, ("--parallel.tensor", "2")), (4, ("--parallel.tensor", "2"))
PP_2, PP_2_FSDP_2 = (2, ("--parallel.pipeline", "2")), (4, ("--parallel.pipeline", "2"))
CP_2, CP_3 = (2, ("--parallel.context", "2")), (3, ("--parallel.context", "3"))
ZBV_2 = (2, ("--parallel.pipeline", "2", "--parallel.pipeline_schedule", "ZBVZeroBubble"))
CHAINS = {
    "tp-2-fsdp-2, ddp-3, 1": (TENSOR_2, (TP_2_FSDP_2, DDP_3, ALONE)),
    "fsdp-3, pp-2-fsdp-2, cp-2, 1": (ODD, (FSDP_3, PP_2_FSDP_2, CP_2, ALONE)),
    "hsdp-2x2, zbv-2, fsdp-2": (ODD, (HSDP_2X2, ZBV_2, FSDP_2)),
    "1, tp-2, fsdp-4": (TENSOR_2, (ALONE, TP_2, FSDP_4)),
}


def written(folder: Path) -> str:
    """The path of a configuration that trains in folder/run."""
    return str(tiny_config(folder))


def finished(folder: Path, steps: int) -> tuple[dict[str, dict[int, float]], dict, dict]:
    """Curves, tensors and record of a run of so many steps."""
    path = checkpoint(folder / "run", steps)
    curves = {name: metrics(folder / "run", name) for name in ("loss", "grad_norm", "lr", "tokens", "val_loss")}
    return curves, tensors(path), json.loads((path / "train.json").read_text())


@functools.cache
def undisturbed(steps: int, *model: str) -> tuple[dict[str, dict[int, float]], dict, dict]:
    """The same of one process that took all steps at once."""
    with tempfile.TemporaryDirectory() as folder:
        assert run(written(Path(folder)), *COMMON, *model, "--training.steps", str(steps)) == 0
        return finished(Path(folder), steps)


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    """Tensors of two checkpoints, model and optimizer: the same names and shapes, values within a share of the largest.

    Random states belong to ranks, so those differ.
    """
    found, expected = ({n: t for n, t in each.items() if not n.startswith("random.")} for each in (found, expected))
    assert found.keys() == expected.keys()
    for kind in ("model.", "optimizer.state."):
        assert any(name.startswith(kind) for name in expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == tensor.dtype, name
        difference = (found[name].double() - tensor.double()).abs().max()
        assert difference <= tolerance * tensor.double().abs().max(), name


IN_CI = set(list(zip(CHAINS, ("untied", "tied", "tied", "tied")))[:1])


@pytest.mark.parametrize(
    "chain, head",
    [
        pytest.param(chain, head, marks=[] if (chain, head) in IN_CI else [pytest.mark.slow])
        for chain in CHAINS
        for head in HEADS
    ],
)
def test_a_run_that_changes_its_plan_again_and_again_equals_one_process(tmp_path, chain, head):
    sizes, plans = CHAINS[chain]
    model = (*sizes, *HEADS[head])
    for leg, (ranks, plan) in enumerate(plans, 1):
        settings = (*COMMON, *model, *plan, "--training.steps", str(leg * LEG))
        assert on_ranks(ranks, run, written(tmp_path), *settings) == [0] * ranks
    steps = len(plans) * LEG
    curves, state, record = finished(tmp_path, steps)
    expected_curves, expected_state, expected_record = undisturbed(steps, *model)
    for name, values in expected_curves.items():
        assert curves[name] == pytest.approx(values, rel=1e-5), name
    assert sorted(curves["loss"]) == list(range(1, steps + 1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert set(Counter((line["step"], "loss" in line) for line in lines).values()) == {1}
    assert record == expected_record
    assert_close(state, expected_state, 1e-4)


SAME_PLAN = {
    "fsdp-2": FSDP_2,
    "tp-2": TP_2,
    "pp-2": PP_2,
    "ddp-3": DDP_3,
    "hsdp-2x2": HSDP_2X2,
    "zbv-2": ZBV_2,
    "cp-2": CP_2,
}
SELECTIVE = ("--model.mla_selective", "true", "--model.selection_head", "1", "--data.document_mask", "true")
ENGRAM = (
    *("--model.engram.layers", "0,2", "--model.engram.orders", "2,4", "--model.engram.heads", "2"),
    *("--model.engram.d_mem", "16", "--model.engram.table_size", "501"),
)


@pytest.mark.parametrize(
    "plan, model",
    [
        ("fsdp-2", ()),
        *(pytest.param(name, (), marks=pytest.mark.slow) for name in SAME_PLAN if name not in ("fsdp-2", "cp-2")),
        *(
            pytest.param(name, (*SELECTIVE, *ENGRAM), marks=pytest.mark.slow, id=f"{name}-selective and Engram")
            for name in ("fsdp-2", "tp-2", "cp-2", "pp-2")
        ),
    ],
)
def test_killed_and_started_again_under_the_same_plan_it_is_the_same_bit_for_bit(tmp_path, plan, model):
    """With dropout, whose random states each rank has of its own."""
    ranks, parallel = SAME_PLAN[plan]
    settings = (*COMMON, *parallel, "--model.dropout", "0.1", "--training.steps", "9", "--checkpoint.interval", "4")
    settings += ("--data.num_workers", "1" if plan == "fsdp-2" else "0", *model)
    whole = tmp_path / "whole"
    assert on_ranks(ranks, run, written(tmp_path), *settings, "--job.dump_folder", str(whole)) == [0] * ranks
    with pytest.raises(AssertionError, match="died"):
        # In the background the checkpoint of step 4 may be written later than step 7 begins.
        on_ranks(ranks, run_killed, 7, written(tmp_path), *settings, "--checkpoint.async_mode", "disabled")
    assert not checkpoint(tmp_path / "run", 9).exists()
    assert max(metrics(tmp_path / "run")) == 6
    assert on_ranks(ranks, run, written(tmp_path), *settings) == [0] * ranks
    assert f"resumed from {checkpoint(tmp_path / 'run', 4)}" in (tmp_path / "run/logs/rank-0.log").read_text()
    assert_same_checkpoint(checkpoint(tmp_path / "run", 9), checkpoint(whole, 9))
    for name in ("loss", "grad_norm", "val_loss"):
        assert metrics(tmp_path / "run", name) == metrics(whole, name)
    random = {name: state for name, state in tensors(checkpoint(whole, 9)).items() if name.startswith("random.")}
    assert len(random) == ranks
    assert len({state.numpy().tobytes() for state in random.values()}) == ranks


@pytest.mark.slow
@pytest.mark.parametrize("model", [SELECTIVE, (*SELECTIVE, *ENGRAM)], ids=["selective", "selective and Engram"])
@pytest.mark.parametrize("plan", [*PLANS, "cp-3", "zbv-2"])
def test_after_20_steps_of_any_plan_weights_tables_and_moments_are_those_of_one_process(tmp_path, plan, model):
    ranks, parallel = (PLANS | {"cp-3": CP_3, "zbv-2": ZBV_2})[plan]
    model = (*model, "--training.seq_len", "60") if plan == "cp-3" else model  # which 3 ranks divide
    settings = (*COMMON, *model, *parallel, "--training.steps", "20")
    assert on_ranks(ranks, run, written(tmp_path), *settings) == [0] * ranks
    curves, state, _ = finished(tmp_path, 20)
    expected_curves, expected_state, _ = undisturbed(20, *model)
    for name, values in expected_curves.items():
        assert curves[name] == pytest.approx(values, rel=1e-5), name
    assert_close(state, expected_state, 1e-4)
