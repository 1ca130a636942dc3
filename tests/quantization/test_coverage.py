"""Which linear layers stay in full precision, and what is reported about it."""

from dataclasses import replace

import pytest
import torch
from torchao.float8.float8_linear import Float8Linear

from swamla_titan.config import Config
from swamla_titan.config.sections import Compile, Float8, Parallel, Training
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.distributed.mesh import fake_world
from swamla_titan.model import FLAVORS, ModelConfig, SWAMLAModel
from swamla_titan.parallel.float8 import float8_coverage, validate_float8
from swamla_titan.parallel.model_parts import build_parts
from swamla_titan.quantization.coverage import gain, table, warnings
from swamla_titan.quantization.native import NativeLinear


def coverage_of(flavor: str, **float8):
    config = Config(model=FLAVORS[flavor], float8=Float8(**float8))
    return config, float8_coverage(config)


def converted(flavor: str, **float8) -> set[str]:
    return {each.kind for each in coverage_of(flavor, **float8)[1] if each.why_not is None}


@pytest.mark.parametrize(
    "recipe, expected",
    [
        ("tensorwise", {"wqkv", "wq", "wo", "gate_up", "down"}),
        ("rowwise", {"gate_up"}),
        ("rowwise_with_gw_hp", {"wqkv", "gate_up"}),
        ("native", {"wqkv", "wq", "wkv_a", "wo", "gate_up", "down"}),
    ],
)
def test_what_pays_in_base(recipe, expected):
    assert {name.rpartition(".")[2] for name in converted("base", recipe=recipe)} == expected


# benchmarks/float8_products.py on an H100, 32,768 tokens, 16,384 of the last four (LOG.md, 2026-11-23): (in, out) ->
# how many times as fast as bfloat16.
MEASURED = {
    (1024, 1024): {"native": 0.84, "native, given": 1.08, "tensorwise": 0.79, "rowwise": 0.47},
    (1024, 3072): {"native": 1.04, "native, given": 1.16, "tensorwise": 0.99, "rowwise": 0.70},
    (1536, 320): {"native": 0.63, "native, given": 1.05, "tensorwise": 0.58, "rowwise": 0.28},
    (1536, 1536): {"native": 1.08, "native, given": 1.34, "tensorwise": 0.98, "rowwise": 0.62},
    (1536, 4608): {"native": 1.39, "native, given": 1.48, "tensorwise": 1.27, "rowwise": 0.96},
    (1536, 8192): {"native": 1.38, "native, given": 1.43, "tensorwise": 1.27, "rowwise": 1.03},
    (256, 4096): {"native": 0.64, "native, given": 0.67, "tensorwise": 0.52, "rowwise": 0.41},
    (2048, 2048): {"native": 1.09, "native, given": 1.31, "tensorwise": 1.03, "rowwise": 0.67, "gw_hp": 0.87},
    (2048, 6144): {"native": 1.39, "native, given": 1.48, "tensorwise": 1.31, "rowwise": 0.99, "gw_hp": 1.16},
    (2048, 11264): {"native": 1.50, "native, given": 1.52, "tensorwise": 1.39, "rowwise": 1.12, "gw_hp": 1.16},
    (5632, 2048): {"native": 1.41, "native, given": 1.70, "tensorwise": 1.34, "rowwise": 0.85, "gw_hp": 1.05},
}

TAKEN_ALL_THE_SAME = [("rowwise", (2048, 6144))]  # at a loss of 1%, which no formula so simple foresees


@pytest.mark.parametrize("recipe", ["native", "native, given", "tensorwise", "rowwise", "gw_hp"])
def test_what_was_measured_to_pay_is_what_is_expected_to(recipe):
    name, _, given = recipe.replace("gw_hp", "rowwise_with_gw_hp").partition(", ")
    measured = {sides: ratios[recipe] for sides, ratios in MEASURED.items() if recipe in ratios}
    for (inner, out), ratio in measured.items():
        is_taken = ratio > 1 or (recipe, (inner, out)) in TAKEN_ALL_THE_SAME
        assert (gain(name, out, inner, bool(given)) > 0) == is_taken


@pytest.mark.parametrize("recipe", ["native", "tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_wider_layers_never_pay_less(recipe):
    for out in range(4, 14):
        for inner in range(4, 14):
            assert (gain(recipe, 2**out, 2**inner) > 0) <= (gain(recipe, 2 ** (out + 1), 2**inner) > 0)


@pytest.mark.parametrize("query_rank, together", [(0, {"wq", "wkv_a"}), (512, set()), (1536, {"wq_a", "wkv_a"})])
def test_readers_of_one_norm_share_its_cast_or_none_counts_on_it(query_rank, together):
    model = replace(FLAVORS["base"], q_lora_rank=query_rank)
    kinds = {
        each.kind.rpartition(".")[2]: each
        for each in float8_coverage(Config(model=model, float8=Float8(recipe="native")))
    }
    assert {name for name in ("wq", "wq_a", "wkv_a") if name in kinds and kinds[name].why_not is None} == together


def test_a_small_reader_of_a_norm_is_left_with_the_other():
    assert converted("150m", recipe="native") == {"feed_forward.gate_up"}  # wq is too small, so wkv_a would cast alone


@pytest.mark.parametrize("tensor", [1, 2])
def test_what_is_listed_is_what_is_converted(tensor):
    model, parallel = replace(FLAVORS["base"], num_layers=4, vocab_size=256), Parallel(tensor=tensor)
    config = Config(model=model, float8=Float8(recipe="native"), parallel=parallel, compile=Compile(enabled=False))
    with fake_world(Degrees(tensor=tensor), "fsdp", rank=0) as world:
        [part] = build_parts(config, world)
        found = {name for name, module in part.named_modules() if isinstance(module, NativeLinear)}
    listed = {each.name for each in float8_coverage(config) if each.why_not is None}
    assert found == listed
    assert any(name.endswith("wkv_a") for name in found) == (tensor == 1)


def test_a_small_reader_is_left_where_tensor_parallelism_keeps_norms_from_casting():
    config, _ = coverage_of("base", recipe="native")
    shared = float8_coverage(replace(config, parallel=replace(config.parallel, tensor=2)))
    found = {each.kind for each in shared if each.why_not is None}
    assert "attention.wq" in found
    assert "attention.wkv_a" not in found


def test_the_head_is_converted_where_it_is_asked_for():
    assert "head" not in converted("base", recipe="native", linear_layers="all")
    assert "head" in converted("base", recipe="native", output_head=True)
    assert coverage_of("base", recipe="off")[1] == []


def test_sides_on_a_tensor_parallel_rank_count():
    config, whole = coverage_of("base", recipe="tensorwise")
    shared = float8_coverage(replace(config, parallel=replace(config.parallel, tensor=2)))
    assert next(each.out for each in whole if each.kind == "feed_forward.gate_up") == 8192
    assert next(each.out for each in shared if each.kind == "feed_forward.gate_up") == 4096


def test_the_table_counts_kinds_and_operations():
    _, coverage = coverage_of("base", recipe="native")
    lines = list(table(coverage, "native"))
    assert lines[0] == "float8 (native): 104 of 113 linear layers, 89% of their operations"
    assert "  feed_forward.down       24 x 4096 -> 1536    float8" in lines
    assert "  attention.wkv_b          8 x 256 -> 4096     as it was: too small to pay" in lines
    assert len(lines) == 10


def test_warnings_come_where_little_is_gained():
    for recipe, flavor, expected in (
        ("native", "base", []),
        ("tensorwise", "large", []),
        ("rowwise", "base", ["takes 40% of the operations"]),
        ("tensorwise", "small", ["takes 32% of the operations"]),
        ("rowwise_with_gw_hp", "base", ["takes 37% of the operations"]),
        ("rowwise_with_gw_hp", "large", []),
        ("rowwise_with_gw_hp", "small", ["takes 0% of the operations"]),
    ):
        config, coverage = coverage_of(flavor, recipe=recipe)
        found = list(warnings(coverage, config, micro_batch_size=8))
        assert len(found) == len(expected), found
        assert all(part in text for part, text in zip(expected, found))
    config, coverage = coverage_of("base", recipe="native", linear_layers="all")
    assert "attention.wkv_b 256 -> 4096 in float8 will cost more" in next(
        warnings(coverage, config, micro_batch_size=8)
    )
    config = replace(config, training=Training(seq_len=512), float8=Float8(recipe="native"))
    assert "512 tokens on a rank at a time" in next(warnings(float8_coverage(config), config, micro_batch_size=1))
    config, coverage = coverage_of("base", recipe="native")
    (eager,) = warnings(coverage, replace(config, compile=Compile(enabled=False)), micro_batch_size=8)
    assert eager.startswith("compile.enabled = false")
    config, coverage = coverage_of("base", recipe="native", output_head=True)
    (head,) = warnings(coverage, config, micro_batch_size=8)
    assert head.startswith("float8.output_head = true")
    assert not list(warnings(coverage, replace(config, training=Training(compute_dtype="float32")), micro_batch_size=8))
    config, coverage = coverage_of("150m", recipe="native", linear_layers="all")
    assert any("attention.wkv_a 768 -> 320" in text for text in warnings(coverage, config, micro_batch_size=32))


def test_table_and_warning_tell_the_same_share(monkeypatch):
    monkeypatch.setattr("swamla_titan.quantization.coverage._LITTLE", 1.0)
    config, coverage = coverage_of("base", recipe="rowwise_with_gw_hp")
    assert next(table(coverage, "rowwise_with_gw_hp")).endswith(" 37% of their operations")  # two thirds of 56%
    assert "takes 37% of the operations" in next(warnings(coverage, config, micro_batch_size=8))


def test_no_linear_layer_of_a_model_is_forgotten():
    with torch.device("meta"):
        model = SWAMLAModel(FLAVORS["base"])
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert [each.name for each in coverage_of("base", recipe="native")[1]] == linears


def test_a_stage_without_any_is_no_error():
    """The last of three, a block of MLA of widths that are no multiples of 16; the others have some."""
    odd = {"kv_lora_rank": 34, "qk_nope_head_dim": 22, "qk_rope_head_dim": 8, "v_head_dim": 33, "ffn_hidden_dim": 68}
    model = ModelConfig(num_layers=3, dim=64, num_heads=2, vocab_size=50, max_seq_len=64, **odd)
    config = Config(model=model, float8=Float8(recipe="rowwise", linear_layers="all"), parallel=Parallel(pipeline=3))
    validate_float8(config, torch.device("cpu"))
    found = []
    for rank in range(3):
        with fake_world(Degrees(pipeline=3), "fsdp", rank) as world:
            [part] = build_parts(replace(config, compile=Compile(enabled=False)), world)
            found.append(any(isinstance(module, Float8Linear) for module in part.modules()))
    assert found == [True, True, False]
