"""Contradictions of [parallel], [compile] and [activation_checkpoint]: refused with the numbers and a way out."""

from pathlib import Path

import pytest

from swamla_titan.cli import main
from swamla_titan.config import load_config, split_overrides
from swamla_titan.errors import UserError

HSDP = "--parallel.data_parallel=hsdp"
DDP = "--parallel.data_parallel=ddp"
AC = "--activation_checkpoint"
ZERO_BUBBLE = "--model.num_layers=4 --parallel.pipeline=2 --parallel.pipeline_schedule=ZBVZeroBubble"

# `tiny`: 3 layers, 2 heads, feed-forward 256 = 8 groups of 32, 64 tokens, compile.enabled = false
REFUSED = [
    ("--parallel.dp_shard=0", "[parallel] dp_shard: 0: expected a number of ranks from 1, or -1"),
    (
        "--parallel.dp_replicate=0",
        "[parallel] dp_replicate: 0: expected a number of ranks from 1, or -1",
    ),
    (
        "--parallel.dp_replicate=2",
        '[parallel] dp_replicate: 2, but data_parallel = "fsdp" keeps one copy',
        'use "hsdp"',
    ),
    ("--parallel.dp_replicate=-1", '[parallel] dp_replicate: -1, but data_parallel = "fsdp"', 'use "hsdp"'),
    (f"{DDP} --parallel.dp_shard=4", '[parallel] dp_shard: 4, but with data_parallel = "ddp"', "among 4 ranks"),
    (f"{HSDP} --parallel.dp_replicate=-1", "dp_replicate and dp_shard are both -1", "give one"),
    (HSDP, '[parallel] dp_replicate: 1 copy of the weights is what data_parallel = "fsdp" has: use that'),
    (
        f"{HSDP} --parallel.dp_replicate=2 --parallel.dp_shard=1",
        '[parallel] dp_shard: a copy of the weights on 1 rank each is what data_parallel = "ddp" has: use that',
    ),
    (
        "--parallel.tensor=4 --model.ffn_hidden_dim=512",
        "[parallel] tensor: 4 ranks cannot share model.num_heads = 2 equally: use tensor = 2",
    ),
    (
        "--parallel.tensor=4 --model.num_heads=8 --model.num_kv_heads=2 --model.ffn_hidden_dim=512",
        "[parallel] tensor: 4 ranks cannot share model.num_kv_heads = 2 equally: use tensor = 2",
    ),
    (
        "--parallel.tensor=2 --model.ffn_hidden_dim=260",
        "2 ranks cannot share the 65 groups of 4 hidden units of the feed-forward network (model.ffn_hidden_dim = 260",
        "use tensor = 1",
    ),
    (
        "--parallel.tensor=3 --model.num_heads=3 --model.dim=66 --model.ffn_hidden_dim=384 --model.vocab_size=200 "
        "--training.seq_len=66",
        "[parallel] tensor: 3 ranks cannot share the 256 rows of the padded vocabulary equally: use tensor = 2",
    ),
    (
        "--parallel.tensor=2 --training.seq_len=63",
        "[training] seq_len: 63 must be a multiple of tensor = 2: use 62 or 64",
    ),
    (
        "--parallel.context=3",
        "[training] seq_len: 64 must be a multiple of 2 x context = 6: use 60 or 66",
    ),
    (
        "--parallel.context=2 --parallel.tensor=2 --training.seq_len=60",
        "[training] seq_len: 60 must be a multiple of 2 x context x tensor = 8: use 56 or 64",
    ),
    ("--parallel.context=64", "64 must be a multiple of 2 x context = 128: use 128"),
    ("--parallel.pipeline=4", "[parallel] pipeline: 4 ranks x 1 stages are 4 stages, more than the 3 layers", "<= 3"),
    (
        "--parallel.pipeline=2 --parallel.pipeline_schedule=ZBVZeroBubble",
        "2 ranks x 2 stages are 4 stages, more than the 3 layers of the model: use pipeline <= 1, or a schedule of one",
    ),
    (
        "--parallel.pipeline=2 --parallel.pipeline_stages_per_rank=2",
        '2, but pipeline_schedule = "1F1B" takes 1: leave it out, or use pipeline_schedule = "Interleaved1F1B"',
    ),
    (
        "--parallel.pipeline=2 --parallel.pipeline_schedule=Interleaved1F1B --parallel.pipeline_stages_per_rank=1",
        '1, but pipeline_schedule = "Interleaved1F1B" takes 2 or more: leave it out, or use pipeline_schedule = "1F1B"',
    ),
    (
        "--parallel.pipeline=2 --parallel.pipeline_schedule=ZBVZeroBubble --parallel.pipeline_stages_per_rank=3",
        '3, but pipeline_schedule = "ZBVZeroBubble" takes 2: leave it out',
    ),
    (f"{ZERO_BUBBLE} --compile.enabled=true", "compiled blocks cannot: set compile.enabled = false", "Interleaved1F1B"),
    (f"{ZERO_BUBBLE} {AC}.mode=full", 'activation_checkpoint.mode = "full": set that to "none"', "Interleaved1F1B"),
    (f"{ZERO_BUBBLE} --parallel.reshard_after_forward=always", 'set reshard_after_forward = "auto"', "Interleaved1F1B"),
]

ACCEPTED = [
    f"{DDP} --parallel.dp_shard=1 --parallel.dp_replicate=4",
    f"{DDP} --parallel.dp_replicate=-1",
    f"{HSDP} --parallel.dp_replicate=2",
    f"{HSDP} --parallel.dp_replicate=-1 --parallel.dp_shard=2",
    f"{HSDP} --parallel.dp_replicate=2 --parallel.dp_shard=1 --parallel.context=2",
    "--parallel.cpu_offload=true --parallel.reshard_after_forward=never",
    "--parallel.tensor=2 --parallel.async_tensor=true --compile.enabled=true --compile.cache_folder=x",
    "--parallel.tensor=2 --parallel.context=2 --parallel.pipeline=3",
    "--parallel.pipeline=2 --parallel.pipeline_schedule=Interleaved1F1B --model.num_layers=4",
    "--parallel.pipeline=2 --parallel.pipeline_schedule=InterleavedZeroBubble --parallel.pipeline_stages_per_rank=3 "
    "--model.num_layers=6",
    ZERO_BUBBLE,
    "--parallel.pipeline=3 --parallel.pipeline_schedule=GPipe --parallel.pipeline_stages_per_rank=1",
    f"{AC}.memory_budget=0.5 --compile.enabled=true",
    f"{AC}.mode=selective {AC}.selective=blocks {AC}.every_n_blocks=3",
    f"{AC}.mode=full",
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_refused_with_the_numbers_and_a_way_out(case: tuple[str, ...], tiny: Path, tmp_path: Path, capsys) -> None:
    overrides, *parts = case
    assert main(["train", str(tiny), *overrides.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {tiny}: 1 error in the configuration\n"), captured.err
    for part in parts:
        assert part in captured.err
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_what_goes_together_is_accepted(overrides: str, tiny: Path) -> None:
    load_config(tiny, split_overrides(overrides.split())[0])


def test_the_suggested_degree_is_accepted(tiny: Path) -> None:
    """Of several limits the message has the largest degree for each."""
    given = "--parallel.tensor=4 --model.num_heads=6 --model.dim=96 --model.ffn_hidden_dim=774 --training.seq_len=72"
    with pytest.raises(UserError, match="2 errors") as refused:
        load_config(tiny, split_overrides(given.split())[0])
    assert "model.num_heads = 6 equally: use tensor = 3" in str(refused.value)
    assert "the 387 groups of 2" in str(refused.value)
    load_config(tiny, split_overrides([*given.split(), "--parallel.tensor=3"])[0])
