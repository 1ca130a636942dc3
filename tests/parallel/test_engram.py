"""What optimizers, float8, the compiler, activation checkpointing and the cut of pipelines make of Engram."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from swamla_titan.config import Config
from swamla_titan.config.sections import ActivationCheckpoint, Compile, Float8, Optimizer, Parallel, Training
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.distributed.mesh import fake_world
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.branch import Regions
from swamla_titan.model.counts import training_flops
from swamla_titan.optim import group_table
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.compile import compile_model
from swamla_titan.parallel.data_parallel import _AllGatherOfBytes, layer_units
from swamla_titan.parallel.model_parts import build_parts
from swamla_titan.parallel.stages import piece_costs
from swamla_titan.quantization.coverage import survey
from tests.model.tiny import TINY

ENGRAM = {"layers": [0, 2], "orders": [2, 3], "heads": 2, "d_mem": 16, "table_size": 31}
MODEL = replace(TINY, engram=ENGRAM)  # type: ignore[arg-type]


def test_muon_moves_its_projections_and_nothing_else_of_it():
    rules = {name: row.kind for row in group_table(MODEL, Optimizer(name="muon")) for name in row.names}
    own = {name.removeprefix("engram."): kind for name, kind in rules.items() if name.startswith("engram.")}
    assert {name: kind.rule for name, kind in own.items()} == {
        **{"key": "muon", "value": "muon", "table": "rows"},
        **dict.fromkeys(["query_norm", "key_norm", "convolution", "convolution.norm"], "adamw"),
    }
    assert {name for name, kind in own.items() if kind.weight_decay} == {"key", "value"}
    assert {name for name, kind in own.items() if kind.lr_multiplier == 5} == {"table"}


def test_float8_takes_all_but_what_reads_a_memory():
    with torch.device("meta"):
        model = SWAMLAModel(ModelConfig(num_layers=3, engram={"layers": [1]}))  # type: ignore[arg-type]
    for recipe in ("native", "rowwise"):
        coverage = survey(model, Float8(recipe=recipe, linear_layers="all"))  # type: ignore[arg-type]
        assert {each.kind for each in coverage if each.why_not == "reads a memory"} == {"engram.key", "engram.value"}
        assert {each.kind for each in coverage if each.why_not} == {"engram.key", "engram.value", "head"}


@pytest.mark.parametrize(
    "mode", ["none", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("full", "selective"))]
)
def test_it_is_one_more_compiled_graph(mode: str, tmp_path):
    graphs = []
    for config in (TINY, MODEL):
        torch._dynamo.reset()
        counters.clear()
        model = SWAMLAModel(config)
        apply_activation_checkpointing(model, ActivationCheckpoint(mode=mode))  # type: ignore[arg-type]
        compile_model(model, Compile(cache_folder=str(tmp_path)), backend="aot_eager")
        tokens = torch.randint(0, 50, (2, 16))
        for _ in range(2):
            model(tokens, tokens).backward()
        graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    assert graphs == [3, 4]


class _OtherRegions(Regions):
    pass


def test_recompilations_are_allowed_for_each_way_that_annexes_run_and_for_all_stages_of_a_rank(tmp_path):
    model = SWAMLAModel(replace(MODEL, mla_layers_per_cycle=0))
    model.annexes["2"]["engram"].regions = _OtherRegions()  # type: ignore[index, union-attr]
    with torch._dynamo.config.patch(recompile_limit=1):
        for stage in (model, SWAMLAModel(replace(TINY, mla_layers_per_cycle=0))):
            compile_model(stage, Compile(cache_folder=str(tmp_path)), backend="eager")
            assert torch._dynamo.config.recompile_limit == 2 * 8


def test_its_weights_are_gathered_while_the_block_before_computes():
    class Recorder(_AllGatherOfBytes):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            seen.append(f"gather {self.name}")
            return super().__call__(*arguments, **options)

    seen: list[str] = []
    config = Config(
        model=MODEL,
        training=Training(seq_len=16, compute_dtype="float32"),
        parallel=Parallel(reshard_after_forward="always"),
        compile=Compile(enabled=False),
    )
    with fake_world(Degrees(shard=2), "fsdp", 0) as world:
        (model,) = build_parts(config, world)
        model.to_empty(device="cpu")
        for layer, units in enumerate(layer_units(model)):
            for unit in units:
                name = f"{layer} {type(unit).__name__.removeprefix('FSDP')}"
                unit.set_custom_all_gather(Recorder(name))  # type: ignore[operator]
                unit.register_forward_pre_hook(lambda *_, name=name: seen.append(f"run {name}"))
        tokens = torch.zeros(1, 16, dtype=torch.int64)
        model(tokens, tokens).backward()
    assert seen == [
        *("gather 0 Engram", "gather 0 Block", "run 0 Engram", "gather 1 Block", "run 0 Block"),
        *("gather 2 Engram", "gather 2 Block", "run 1 Block", "run 2 Engram", "run 2 Block"),
        *("gather 2 Block", "gather 2 Engram", "gather 1 Block", "gather 0 Block", "gather 0 Engram"),
    ]


def test_stages_are_cut_by_what_its_layers_cost():
    with_engram, without = piece_costs(MODEL, 16), piece_costs(TINY, 16)
    extra = [one - other for one, other in zip(with_engram, without)]
    assert extra[0] == extra[2] == extra[4] == 0
    assert extra[1] == extra[3] > 0
    assert extra[1] + extra[3] == training_flops(MODEL, 16) - training_flops(TINY, 16)


def test_recomputation_keeps_its_gradients():
    tokens = torch.randint(0, 50, (2, 16))
    gradients = []
    for mode in ("none", "full"):
        model = SWAMLAModel(MODEL)
        apply_activation_checkpointing(model, ActivationCheckpoint(mode=mode))  # type: ignore[arg-type]
        model(tokens, tokens).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if "table" not in name})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
