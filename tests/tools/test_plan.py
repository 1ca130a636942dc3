"""`plan`: what it says of a rank is what a rank of a real run holds."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from swamla_titan.cli import main
from swamla_titan.config import Override, load_config, shipped_configs, with_vocabulary
from swamla_titan.config.schedule import configs_of_stages
from swamla_titan.config.sections import Optimizer, Parallel
from swamla_titan.data import MicroBatch
from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World
from swamla_titan.kernels.cross_entropy import cross_entropy, tokens_per_chunk
from swamla_titan.kernels.rows import Segments
from swamla_titan.launch.process_group import destroy_distributed, init_distributed
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.row_table import RowGradient
from swamla_titan.optim import AveragedWeights, build_optimizer
from swamla_titan.parallel.data_parallel import reduce_after_this_backward
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.tools.memory import EAGER_LOSS_BYTES, Memory, merge_bytes
from swamla_titan.tools.plan import Plan, plan, ranks_asked_for
from swamla_titan.tools.plan_report import listed, report, size
from tests.config.test_shipped import stated_processes
from tests.distributed.ranks import on_ranks
from tests.parallel.plan import Witness

VOCABULARY = 257


def resolved(path: Path, *overrides: tuple[str, str, str], vocabulary: int = VOCABULARY) -> Any:
    return with_vocabulary(load_config(path, [Override(*override) for override in overrides]), vocabulary)


def parallel(**keys: object) -> list[tuple[str, str, str]]:
    return [("parallel", key, str(value)) for key, value in keys.items()]


# Without a network


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_on_the_gpus_that_it_names(name, capsys):
    gpus = stated_processes(shipped_configs()[name])
    assert main(["plan", name, "--gpus", str(gpus)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{gpus} rank")
    for heading in ("\nmodel: ", "\nbatch\n", "\nparameters\n", "\nmemory of a GPU"):
        assert heading in out
    assert ("\npipeline: " in out) == (name == "pipeline")
    sum_line = re.search(r"^  sum +([\d.]+) (\wiB)", out, flags=re.MULTILINE)
    assert sum_line
    gib = float(sum_line[1]) / (1 if sum_line[2] == "GiB" else 1024)
    assert gib < 70, "of 80, to leave room for what is not counted"
    for stated in re.findall(r"(\d+) GiB by `swamla-titan plan`", shipped_configs()[name].read_text()):
        assert round(gib) == int(stated)
    assert not dist.is_initialized()


FIVE_HUNDRED = {
    "tp_fsdp_xl": (parallel(dp_shard=64, tensor=8), {"wqkv": (24, 4096), "wo": (64, 512)}),
    "hsdp_4_nodes": (parallel(dp_replicate=16, dp_shard=32), {"wqkv": (240, 2560), "wo": (80, 2560)}),
}


@pytest.mark.parametrize("name", FIVE_HUNDRED)
def test_512_gpus_are_planned_from_two_of_their_ranks(name):
    overrides, shapes = FIVE_HUNDRED[name]
    config = resolved(shipped_configs()[name], *overrides, vocabulary=50257)
    found = plan(config, 512)
    assert [holding.rank for holding in found.holdings] == [0, 511]
    for holding in found.holdings:
        for product, shape in shapes.items():
            assert holding.shapes[f"blocks.0.attention.{product}.weight"][1] == shape
    most, least = (holding.shapes["embedding.weight"][1][0] for holding in found.holdings)
    shards = found.degrees.shard
    rows = 50304 // found.degrees.tensor
    assert most == math.ceil(rows / shards)
    assert least == max(0, rows - (shards - 1) * most)
    assert not dist.is_initialized()


def test_the_mesh_names_the_neighbours_of_rank_0(tiny):
    overrides = parallel(pipeline=2, context=2, tensor=2, dp_replicate=2, dp_shard=2, data_parallel="hsdp")
    found = plan(resolved(tiny, *overrides), 32)
    assert {along.dimension: along.ranks for along in found.mesh} == {
        "pipeline": [0, 16],
        "data": [0, 4, 8, 12],
        "context": [0, 2],
        "tensor": [0, 1],
        "replicate": [0, 8],
        "shard": [0, 2, 4, 6],
    }


@pytest.mark.parametrize("tensor, dtype, width", [(1, "float32", 4), (2, "bfloat16", 2)])
def test_what_a_swa_layer_exchanges_is_said_where_rows_are_shared(tiny, capsys, tensor, dtype, width):
    """test_context.py compares the same number with what passes through the collectives."""
    arguments = (f"--parallel.tensor={tensor}", f"--training.compute_dtype={dtype}", "--training.seq_len=128")
    assert main(["plan", str(tiny), *arguments]) == 0
    assert "SWA layer" not in capsys.readouterr().out
    assert main(["plan", str(tiny), *arguments, "--parallel.context=2"]) == 0
    token = 2 * (2 // tensor) * 2 * 32 * width  # rows, heads, key and value, sides of a head
    # Of chunks 0 and 3 | 1 and 2, chunk 1 looks back to rank 0 and chunk 3 to rank 1; chunk 2 to its own rank.
    halos, sinks = 15, 2 * 4
    said = capsys.readouterr().out
    most = size((halos + sinks) * token)
    found = re.search(r"SWA layer: a rank sends up to (\S+ KiB) and receives up to (\S+ KiB) a micro-batch", said)
    assert found
    assert found.groups() == (most, most), said
    model = load_config(tiny).model
    # Latent and rotary key of a rank's 64 tokens, for the other rank; tensor-parallel ranks have them in full.
    latents = size(2 * 64 * (model.kv_lora_rank + model.qk_rope_head_dim) * width)
    assert f"MLA layer: a rank sends up to {latents} and receives up to {latents} a micro-batch" in said
    no_swa = ("--model.swa_layers_per_cycle=0", "--parallel.context=2")
    assert main(["plan", str(tiny), *arguments, *no_swa]) == 0
    assert "SWA layer" not in capsys.readouterr().out


def test_ranks_that_own_no_stream_are_counted(tiny, capsys):
    """Stream s is rank s % ranks's: with fewer streams than ranks, some never read."""
    assert main(["plan", str(tiny), "--gpus=8", "--data.streams=2", "--training.global_batch_size=8"]) == 0
    printed = capsys.readouterr().out
    assert "8 ranks read 0 to 4 of them each" in printed
    assert "a step takes 4 micro-batches where 1 would do" in printed
    assert "set data.streams to a multiple of 8, such as 8" in printed


def test_ranks_in_words():
    assert listed([0, 1]) == "0, 1"
    assert listed(list(range(8))) == "0-7"
    assert listed([0, 8, 16, 24]) == "0, 8, 16, 24"
    assert listed(list(range(0, 512, 8))) == "0, 8, 16 ... 504"


def test_bytes_in_words():
    assert [size(count) for count in (0, 512, 3 << 20, 1 << 31)] == ["0.00 KiB", "0.50 KiB", "3.00 MiB", "2.00 GiB"]


@pytest.mark.parametrize(
    "keys, ranks",
    [
        ({}, 1),
        ({"dp_shard": 4, "tensor": 2}, 8),
        ({"data_parallel": "ddp", "dp_replicate": 4, "context": 2}, 8),
        ({"data_parallel": "ddp"}, 1),
        ({"data_parallel": "hsdp", "dp_replicate": 2, "dp_shard": -1, "pipeline": 3}, 6),
    ],
)
def test_without_gpus_the_degrees_say_how_many(keys, ranks):
    assert ranks_asked_for(Parallel(**keys)) == ranks


def test_the_output_says_where_the_number_comes_from(tiny, capsys):
    assert main(["plan", str(tiny), "--parallel.tensor", "2"]) == 0
    out = capsys.readouterr().out
    assert "no --gpus: the product of the degrees" in out
    assert "2 ranks: tensor 2" in out
    assert main(["plan", str(tiny), "--parallel.tensor", "2", "--gpus", "4"]) == 0
    out = capsys.readouterr().out
    assert "no --gpus" not in out
    assert "4 ranks: dp_shard 2 x tensor 2" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--gpus", "6", "--parallel.dp_shard", "4"), "the degrees dp_shard 4 = 4 do not fit 6 processes"),
        (("--gpus", "0"), "--gpus 0: expected a number from 1"),
        (("--parallel.pipeline", "9"), "more than the 3 layers of the model"),
        (("--parallel.tensor", "3"), "3 ranks cannot share model.num_heads = 2"),
        (("--data.tokenizer", "bite"), 'there is no tokenizer "bite"'),
        (("--float8.recipe", "rowwise", "--model.dim", "60", "--model.ffn_hidden_dim", "72"), "convert none"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, capsys, arguments, message):
    if "rowwise" in arguments:  # every product of a model with one side that is no multiple of 16
        arguments += ("--model.v_head_dim", "20", "--model.kv_lora_rank", "24", "--model.qk_nope_head_dim", "14")
    assert main(["plan", str(tiny), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not dist.is_initialized()


def test_what_needs_gpus_is_planned_without_them(tiny):
    asking = (
        *parallel(cpu_offload="true", tensor=2, async_tensor="true"),
        ("float8", "recipe", "rowwise"),
        ("float8", "linear_layers", "all"),
        ("compile", "enabled", "true"),
    )
    found, plain = plan(resolved(tiny, *asking), 4), plan(resolved(tiny, *asking[1:]), 4)
    for with_offload, without in zip(found.holdings, plain.holdings):
        assert with_offload.shapes.keys() == without.shapes.keys()
        for name, shapes in with_offload.shapes.items():
            # FSDP2 brings norms to the GPU too then, and so cuts them; without offloading each rank keeps them whole.
            whole, held = without.shapes[name]
            assert shapes == (without.shapes[name] if len(whole) > 1 else (whole, (held[0] // 2,)))
    memory = found.worst.memory
    # Accumulated gradients stay on the GPU until they are reduced; all that is sharded lies on the host.
    assert found.batch.most > 1 or memory.gradients == memory.parameters
    assert memory.offloaded >= memory.parameters + memory.optimizer
    assert "on the host" in "\n".join(report(found))


@pytest.mark.parametrize("async_mode, copies", [("async", True), ("disabled", False)])
def test_tables_on_the_host_are_counted_there(tiny, async_mode, copies):
    settings = [("model.engram", "layers", "1"), ("ema", "decay", "0.9"), ("checkpoint", "async_mode", async_mode)]
    usual = plan(resolved(tiny, *settings), 2).worst.memory
    found = plan(resolved(tiny, *settings, *parallel(tables_on_host="true")), 2)
    memory, text = found.worst.memory, "\n".join(report(found))
    [(_, rows)] = [shapes for name, shapes in found.worst.shapes.items() if name.endswith("engram.table.weight")]
    assert memory.offloaded == 4 * math.prod(rows) * 4  # weight, two moments and average, float32
    read_ahead = memory.activations - usual.activations
    assert read_ahead == 4 * found.batch.micro_batch_size * 64 * 512  # tokens, each with rows of 512 elements
    assert usual.total - memory.total == memory.offloaded - read_ahead
    assert f"{size(memory.offloaded)}  of these, tables with moments and average" in text
    assert ("for copies of all that checkpoints hold" in text) == copies


# Against real ranks

UNTIED = [("model", "tie_embeddings", "false")]
PLANS = {
    "alone": (1, []),
    "fsdp-2": (2, []),
    "fsdp-2-always": (2, parallel(reshard_after_forward="always")),
    "fsdp-3-untied": (3, UNTIED + parallel(reshard_after_forward="always")),
    "fsdp-4-never": (4, parallel(reshard_after_forward="never")),
    "hsdp-2x2": (4, parallel(data_parallel="hsdp", dp_replicate=2)),
    "ddp-2": (2, parallel(data_parallel="ddp")),
    "tp-2": (2, parallel(tensor=2)),
    "fsdp-2-tp-2": (4, parallel(tensor=2)),
    "cp-2-fsdp-2-untied": (4, UNTIED + parallel(context=2)),
    "pp-2": (2, parallel(pipeline=2)),
    "fsdp-2-pp-2": (4, parallel(pipeline=2)),
    "zbv-2-untied": (
        2,
        UNTIED + parallel(pipeline=2, pipeline_schedule="ZBVZeroBubble") + [("model", "num_layers", "4")],
    ),
}


def fsdp_groups(part: torch.nn.Module) -> list[Any]:
    """torch's own records of the units of communication."""
    states = [module._get_fsdp_state() for module in part.modules() if isinstance(module, FSDPModule)]
    groups = {id(state._fsdp_param_group): state._fsdp_param_group for state in states}
    return [group for group in groups.values() if group is not None]


def gathered_bytes(part: torch.nn.Module) -> int:
    """Of the weights that are there whole, and of those on their way."""
    total = 0
    for group in fsdp_groups(part):
        for parameter in group.fsdp_params:
            total += sum(output.untyped_storage().nbytes() for output in parameter.all_gather_outputs)
        if group._all_gather_result is not None:
            total += group._all_gather_result.all_gather_output.nbytes
    return total


def accumulated_bytes(parts: list[Any]) -> int:
    gradients = []
    for part in parts:
        gradients += [parameter.grad for parameter in part.parameters()]
        for parameter in (parameter for group in fsdp_groups(part) for parameter in group.fsdp_params):
            unsharded = getattr(parameter, "_unsharded_param", None)
            gradients += [parameter.unsharded_accumulated_grad, None if unsharded is None else unsharded.grad]
    # By address: a block's reduced gradients lie in one storage, and an unsharded one may be found twice.
    found = {local(g).data_ptr(): local(g).nbytes for g in gradients if g is not None}
    return sum(found.values())


OTHER_OPTIMIZERS = (
    *(("adamw", "bfloat16"), ("adamw8bit", "float32"), ("adamw4bit", "float32"), ("adamw_fp8", "float32")),
    *(("lion", "float32"), ("lion", "bfloat16"), ("muon", "float32"), ("muon", "bfloat16")),
)


def state_held(part: torch.nn.Module, config: Optimizer, world: World) -> int:
    """Bytes of the state of a real optimizer that keeps it from the start."""
    states = build_optimizer(part, config, world.stage_group).state.values()
    return sum(local(value).nbytes for state in states for value in state.values())


def held_by_a_rank(path: Path, overrides: list[tuple[str, str, str]]) -> dict[str, Any]:
    """What this rank of a real run holds, after a step; `gathered` and `accumulated` where there is no pipeline."""
    config = resolved(path, *overrides)
    world = init_distributed(config.parallel)
    model = ParallelModel(config, world)
    model.init_weights(0)
    found: dict[str, Any] = {"rank": world.rank}
    if model.pipeline is None:
        seen = [0]
        for block in model.parts[0].blocks.values():
            # Within FSDP's own hooks, which are older.
            block.attention.register_forward_hook(lambda *_: seen.append(gathered_bytes(model.parts[0])))
            block.attention.register_full_backward_hook(lambda *_: seen.append(gathered_bytes(model.parts[0])))
        model.parts[0].head.register_forward_hook(lambda *_: seen.append(gathered_bytes(model.parts[0])))
        tokens = torch.randint(0, VOCABULARY, (2, config.training.seq_len))
        batch = MicroBatch(tokens, tokens, None, 2)
        reduce_after_this_backward(model.parts[0], last=False, every_micro_batch=False)
        model._loss(batch, 100.0, None).backward()
        found["accumulated"] = accumulated_bytes(model.parts)
        reduce_after_this_backward(model.parts[0], last=True, every_micro_batch=False)
        model._loss(batch, 100.0, None).backward()
        found["gathered"] = max(seen)
        found["reduced"] = accumulated_bytes(model.parts)
    found["of optimizers"] = {}
    for name, moments in OTHER_OPTIMIZERS:
        other = dataclasses.replace(config.optimizer, name=name, moments=moments)
        found["of optimizers"][name, moments] = sum(state_held(part, other, world) for part in model.parts)
    optimizers = [build_optimizer(part, config.optimizer) for part in model.parts]
    for part in model.parts:
        for parameter in part.parameters():
            parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step(config.optimizer.lr)
    parameters = {name: parameter for part in model.parts for name, parameter in part.named_parameters()}
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    found["shapes"] = {name: (tuple(p.shape), tuple(local(p).shape)) for name, p in parameters.items()}
    found["parameters"] = sum(local(parameter).nbytes for parameter in parameters.values())
    found["optimizer"] = sum(local(value).nbytes for value in states)
    ema = AveragedWeights(model.parts, 0.9)
    found["average"] = sum(local(mean).nbytes for part in model.parts for mean in ema.of_part(part).values())
    destroy_distributed()
    return found


PLANS_OF_OPTIMIZERS = ("alone", "fsdp-3-untied", "fsdp-2-tp-2")

# In CI only as a part of another: of fsdp-2-tp-2, of fsdp-2-pp-2.
COVERED = {"tp-2", "pp-2"}
assert PLANS.keys() > COVERED


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in COVERED else []) for name in PLANS]
)
def test_a_real_run_holds_what_the_plan_says(tiny, name):
    ranks, overrides = PLANS[name]
    overrides = [*overrides, ("training", "local_batch_size", "1"), ("training", "global_batch_size", "12")]
    found: Plan = plan(resolved(tiny, *overrides), ranks)
    real = on_ranks(ranks, held_by_a_rank, tiny, overrides)
    for holding in found.holdings:
        there = real[holding.rank]
        assert list(holding.shapes.items()) == list(there["shapes"].items())
        assert (holding.memory.parameters, holding.memory.optimizer) == (there["parameters"], there["optimizer"])
    # Nobody holds more than those that were planned.
    for kind in ("parameters", "optimizer"):
        assert max(getattr(holding.memory, kind) for holding in found.holdings) == max(there[kind] for there in real)
    if name in PLANS_OF_OPTIMIZERS:
        for optimizer, moments in OTHER_OPTIMIZERS:
            keys = [("optimizer", "name", optimizer), ("optimizer", "moments", moments), ("ema", "decay", "0.9")]
            of_other = plan(resolved(tiny, *overrides, *keys), ranks)
            for holding in of_other.holdings:
                there = real[holding.rank]
                assert holding.memory.optimizer == there["of optimizers"][optimizer, moments]
                assert holding.memory.average == there["average"] == there["parameters"]
    if "accumulated" in real[0]:
        memory = found.holdings[0].memory
        assert found.batch.most > 1
        assert memory.gradients == real[0]["accumulated"]
        assert real[0]["reduced"] == memory.parameters
        # Shards are gathered in equal pieces: what does not divide is filled up.
        padding = 1.0 if name != "fsdp-3-untied" else 1.03
        assert memory.weights_in_use <= real[0]["gathered"] <= memory.weights_in_use * padding
        once = [("training", "global_batch_size", str(found.degrees.data)), ("data", "streams", "12")]
        assert plan(resolved(tiny, *overrides, *once), ranks).worst.memory.gradients == real[0]["reduced"]


# Against measurements


class Peak(Witness):
    """Also knows the most that was held at a time."""

    most = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(operator, types, args, kwargs)
        self.most = max(self.most, self.held())
        return out


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_merging_the_gradients_of_tables(dtype, micro_batches, monkeypatch):
    def sums(segments: Segments, values: Tensor) -> Tensor:
        """As a GPU's kernel, which reads the values in order, and needs no sorted copy of them."""
        return values.new_zeros(len(segments.offsets) - 1, values.shape[1], dtype=torch.float32)

    monkeypatch.setattr(Segments, "sums", sums)
    shapes = [(3000, 16), (2000, 64)]
    gradients = [RowGradient() for _ in shapes]
    with Peak() as peak:
        for _ in range(micro_batches):
            for gradient, (rows, width) in zip(gradients, shapes):
                gradient.add(torch.randint(0, 99, (rows,)), torch.ones(rows, width, dtype=dtype))
        for gradient in gradients:
            gradient.merge()
    of_sums = micro_batches * sum(4 * rows * width for rows, width in shapes)
    assert peak.most - of_sums == pytest.approx(merge_bytes(shapes, micro_batches, dtype.itemsize), rel=0.02)


def test_merging_counts_where_it_needs_more_than_the_passes_did(tiny):
    few = [("training", "local_batch_size", "1"), ("training", "global_batch_size", "12")]
    few += [("model.engram", "layers", "0"), ("activation_checkpoint", "mode", "full")]
    memory = {
        width: plan(resolved(tiny, *few, ("model.engram", "d_mem", str(width))), 1).worst.memory for width in (16, 4096)
    }
    assert memory[16].merging == 0
    wide = memory[4096]
    rows = 64 * 8  # of two orders and four heads
    passes = wide.logits + wide.activations - wide.in_turn
    assert wide.merging == merge_bytes([(rows, 4096 // 8)], 12, 4) - passes > 0
    beside = wide.parameters + wide.optimizer + wide.average + wide.gradients + wide.weights_in_use
    assert wide.total == beside + merge_bytes([(rows, 4096 // 8)], 12, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_an_eager_loss(dtype):
    logits = torch.randn(256, 1024, dtype=getattr(torch, dtype), requires_grad=True)
    targets = torch.randint(0, 1000, (256,))

    with Peak() as peak:
        cross_entropy(logits * 1, targets, 1000).backward()
    assert peak.most / logits.numel() == pytest.approx(EAGER_LOSS_BYTES, rel=0.05)


@pytest.mark.parametrize("rows", [8, 16])
def test_the_fused_loss_holds_one_stretch_of_logits_and_both_gradients(rows):
    batch = [("training", key, str(rows)) for key in ("local_batch_size", "global_batch_size")]
    config = resolved(shipped_configs()["base"], *batch, ("kernels", "loss", "fused"), vocabulary=50257)
    dim, padded, tokens = config.model.dim, config.model.padded_vocab_size, rows * config.model.max_seq_len
    chunk = tokens_per_chunk(tokens, padded, 2)
    assert chunk < tokens
    assert plan(config, 1).worst.memory.logits == 2 * chunk * padded + 2 * tokens * dim + 2 * 4 * padded * dim


@pytest.mark.parametrize(
    "flavor, rows, loss, recipe, gib",
    [
        ("small", 32, "plain", "off", 46.3),
        ("base", 16, "plain", "off", 58.7),
        ("medium", 16, "plain", "off", 32.2),
        ("debug", 64, "plain", "off", 29.0),
        ("base", 16, "auto", "off", 54.0),
        ("base", 16, "auto", "native", 49.4),
        ("medium", 16, "auto", "off", 27.5),
        ("medium", 16, "auto", "native", 25.2),
        ("medium", 32, "auto", "off", 48.4),
        ("large", 8, "auto", "off", 53.55),
        ("large", 12, "auto", "off", 69.8),
        ("large", 8, "auto", "native", 49.0),
        ("large", 12, "auto", "native", 63.6),
    ],
)
def test_the_sum_is_near_what_an_h100_needed(flavor, rows, loss, recipe, gib):
    """LOG.md, 2026-11-22 and 23: the most memory that torch gave out, compiled, bfloat16, T = 2048, GPT-2's tokens."""
    batch = [("training", key, str(rows)) for key in ("local_batch_size", "global_batch_size")]
    model = [("model", "flavor", flavor), ("model", "max_seq_len", "2048"), ("kernels", "loss", loss)]
    config = resolved(shipped_configs()["base"], *batch, *model, ("float8", "recipe", recipe), vocabulary=50257)
    assert plan(config, 1).worst.memory.total / 2**30 == pytest.approx(gib, rel=0.02)


def test_large_48gb_fits_a_gpu_of_48_gb_by_its_checkpointing():
    def gib(*overrides: tuple[str, str, str]) -> float:
        shipped = shipped_configs()["large_48gb"]
        return plan(resolved(shipped, *overrides, vocabulary=50257), 1).worst.memory.total / 2**30

    assert gib() < 0.8 * 44.4, "of an L40S with ECC, to leave room for what is not counted"
    assert gib(("activation_checkpoint", "mode", "none")) > 48


def test_gradients_take_the_place_of_activations_but_those_of_several_micro_batches_wait_beside_them():
    def memory(sequences: int, *overrides: tuple[str, str, str]) -> Memory:
        batch = [("training", "local_batch_size", "2"), ("training", "global_batch_size", str(sequences))]
        return plan(resolved(shipped_configs()["base"], *batch, *overrides, vocabulary=50257), 1).worst.memory

    one, two = memory(2), memory(4)
    assert one.in_turn == min(one.gradients, one.activations) > 0
    assert two.in_turn == 0
    assert two.total - one.total == one.in_turn
    assert memory(2, ("parallel", "cpu_offload", "true")).in_turn == 0  # the host takes gradients as they come
    # What a block computes again is there beside the gradients of all blocks behind it.
    recomputed = memory(2, ("activation_checkpoint", "mode", "full"))
    assert recomputed.activations < recomputed.gradients
    assert 0 < recomputed.in_turn < 0.8 * recomputed.activations


def test_recomputing_branches_apart_is_in_the_estimate_and_in_the_report(capsys):
    shipped = shipped_configs()["base"]

    def memory(*settings: tuple[str, str]) -> Memory:
        overrides = [("activation_checkpoint", key, value) for key, value in settings]
        return plan(resolved(shipped, *overrides, vocabulary=50257), 1).worst.memory

    none, full = memory(), memory(("mode", "full"))
    branches = {name: memory(("mode", "full"), ("modules", name)) for name in ("attention", "feed_forward", "both")}
    assert full.activations < branches["both"].activations < branches["feed_forward"].activations < none.activations
    assert branches["both"].activations < branches["attention"].activations < none.activations
    # A linear layer that is computed again casts its weight again: of both branches together, that is all of them.
    freed = {name: none.weights_in_use - each.weights_in_use for name, each in branches.items()}
    assert 0 < freed["attention"] < freed["feed_forward"] < freed["both"]
    assert full.weights_in_use < none.weights_in_use / 4
    said = {}
    for name in ("block", "attention", "feed_forward"):
        keys = ("--activation_checkpoint.mode", "full", "--activation_checkpoint.modules", name)
        assert main(["plan", str(shipped), *keys]) == 0
        (said[name],) = re.findall(
            r"mode = full(?:, modules = (?:\w+))?: ([\d.]+)% more operations", capsys.readouterr().out
        )
    # A whole block's backward pass repeats what both branches' do, and wo.
    assert 20 < float(said["attention"]) + float(said["feed_forward"]) < float(said["block"]) < 100 / 3


def test_float8_is_told_with_what_it_leaves_and_a_warning_where_it_will_not_pay(tiny, capsys):
    assert main(["plan", str(tiny), "--float8.recipe", "native", "--float8.linear_layers", "all"]) == 0
    said = capsys.readouterr().out
    assert "float8 (native): 14 of 15 linear layers" in said
    assert "attention.wqkv           2 x 64 -> 192       float8\n" in said
    assert "head                     1 x 64 -> 384       as it was: float8.output_head = false\n" in said
    assert "warning: attention.wqkv 64 -> 192" in said
    assert "128 tokens on a rank at a time: casting the weights takes longer" in said
    assert main(["plan", str(tiny)]) == 0
    assert "float8" not in capsys.readouterr().out


@pytest.mark.parametrize("gpus", [1, 2])
def test_native_float8_takes_less_memory(gpus):
    def memory(recipe):
        batch = [("training", key, "16") for key in ("local_batch_size", "global_batch_size")]
        config = resolved(shipped_configs()["base"], ("float8", "recipe", recipe), *batch, vocabulary=50257)
        return plan(config, gpus).worst.memory

    plain, native = memory("off"), memory("native")
    assert 0.85 * plain.activations < native.activations < 0.95 * plain.activations
    assert (native.weights_in_use < plain.weights_in_use) == (gpus == 1)  # FSDP2 gathers bfloat16 all the same


def test_native_weights_that_are_cast_for_all_micro_batches_take_two_bytes_a_number(tiny):
    def in_use(plan_of: str, batch: int) -> int:
        float8 = [("float8", "recipe", "native"), ("float8", "linear_layers", "all"), ("compile", "enabled", "false")]
        sizes = [("training", "local_batch_size", "2"), ("training", "global_batch_size", str(batch))]
        config = resolved(tiny, *float8, *sizes, ("parallel", "data_parallel", plan_of))
        return plan(config, 2).worst.memory.weights_in_use

    with torch.device("meta"):
        model = SWAMLAModel(resolved(tiny).model)
    converted = sum(each.weight.numel() for each in model.blocks.modules() if isinstance(each, torch.nn.Linear))
    assert in_use("ddp", 8) - in_use("ddp", 4) == converted
    assert in_use("fsdp", 8) == in_use("fsdp", 4) == in_use("ddp", 4)


STAGES = """
[[training.stages]]
tokens = 1000
seq_len = 128
global_batch_size = 8
[[training.stages]]
tokens = 5000
seq_len = 96
local_batch_size = 1
swa_window = 32
"""


@pytest.mark.parametrize("overrides", [[], parallel(pipeline=2), parallel(context=2)], ids=["", "pp-2", "cp-2"])
def test_stages_are_planned_one_by_one_and_the_one_that_needs_the_most_memory_in_full(tiny, overrides):
    alone = resolved(tiny, *overrides)
    tiny.write_text(tiny.read_text() + STAGES)
    config = resolved(tiny, *overrides)
    ranks = ranks_asked_for(config.parallel)
    found = plan(config, ranks)
    assert [each.stage.begin.step for each in found.stages] == [0, 4, 8]
    assert found.config == configs_of_stages(config)[1]
    assert found.worst.memory == found.stages[1].worst.memory == plan(found.config, ranks).worst.memory
    assert found.stages[0].worst.memory.total == plan(alone, ranks).worst.memory.total < found.worst.memory.total
    lines = "\n".join(report(found)).partition("stages: by training.stages")[2].splitlines()[1:5]
    assert [line.split()[:5] for line in lines[1:]] == [
        ["0", "1", "0", "5", "x"],
        ["1*", "5", "1,280", "8", "x"],
        ["2", "9", "5,376", "8", "x"],
    ]
    assert [line.split()[-3] for line in lines[1:]] == ["16", "16", "32"]
