"""Which products are left in full precision, and what is said of it."""

from dataclasses import replace

import pytest
import torch

from swamla_titan.config import Config
from swamla_titan.config.sections import Compile, Float8, Parallel, Training
from swamla_titan.model import FLAVORS, SWAMLAModel
from swamla_titan.parallel.degrees import Degrees
from swamla_titan.parallel.parallel_model import build_parts
from swamla_titan.parallel.parallelize import float8_products
from swamla_titan.parallel.pretend import pretended_world
from swamla_titan.quantization.native import NativeLinear
from swamla_titan.quantization.products import THRESHOLDS, table, warnings


def products_of(flavor: str, **float8):
    config = Config(model=FLAVORS[flavor], float8=Float8(**float8))
    return config, float8_products(config)


def converted(flavor: str, **float8) -> set[str]:
    return {each.kind for each in products_of(flavor, **float8)[1] if each.why_not is None}


@pytest.mark.parametrize(
    "recipe, expected",
    [
        ("tensorwise", {"wqkv", "wq", "wkv_b", "wo", "gate_up", "down"}),
        ("rowwise", {"wqkv", "gate_up"}),
        ("rowwise_with_gw_hp", {"wqkv", "gate_up"}),
        ("native", {"wqkv", "wq", "wkv_a", "wo", "gate_up", "down"}),
    ],
)
def test_what_pays_in_base(recipe, expected):
    assert {name.rpartition(".")[2] for name in converted("base", recipe=recipe)} == expected


@pytest.mark.parametrize(
    "recipe, function", [("tensorwise", "_auto_filter_for_tensorwise"), ("rowwise", "_auto_filter_for_rowwise")]
)
def test_torchaos_recipes_leave_what_torchao_leaves(recipe, function):
    from torchao.float8 import float8_linear_utils

    theirs = getattr(float8_linear_utils, function)
    for out in (16, 320, 1024, 1536, 2048, 4096, 8192):
        for inner in (256, 1024, 1536, 2048, 4096, 8192):
            with torch.device("meta"):
                linear = torch.nn.Linear(inner, out, bias=False)
            assert THRESHOLDS[recipe].leaves(out, inner, False) != theirs(linear, "", [])


def test_native_float8_leaves_what_its_casts_would_outweigh():
    leaves = THRESHOLDS["native"].leaves
    assert leaves(4096, 256, False)  # wkv_b of `base`
    assert not leaves(8192, 1536, False)
    assert leaves(320, 1536, False)
    assert not leaves(320, 1536, True)  # wkv_a: its input is cast for wq
    # Wider never pays less.
    assert all(
        leaves(2**n, 2**k, False) >= leaves(2 ** (n + 1), 2**k, False) for n in range(4, 14) for k in range(4, 14)
    )


@pytest.mark.parametrize("query_rank, together", [(0, {"wq", "wkv_a"}), (512, set()), (1536, {"wq_a", "wkv_a"})])
def test_readers_of_one_norm_share_its_cast_or_none_counts_on_it(query_rank, together):
    model = replace(FLAVORS["base"], q_lora_rank=query_rank)
    kinds = {
        each.kind.rpartition(".")[2]: each
        for each in float8_products(Config(model=model, float8=Float8(recipe="native")))
    }
    assert {name for name in ("wq", "wq_a", "wkv_a") if name in kinds and kinds[name].why_not is None} == together


def test_a_small_reader_of_a_norm_is_left_with_the_other():
    assert converted("150m", recipe="native") == {"feed_forward.gate_up"}  # wq is too small, so wkv_a would cast alone


@pytest.mark.parametrize("tensor", [1, 2])
def test_what_is_listed_is_what_is_converted(tensor):
    model, parallel = replace(FLAVORS["base"], num_layers=4, vocab_size=256), Parallel(tensor=tensor)
    config = Config(model=model, float8=Float8(recipe="native"), parallel=parallel, compile=Compile(enabled=False))
    with pretended_world(Degrees(tensor=tensor), "fsdp", rank=0) as world:
        [part] = build_parts(config, world)
        found = {name for name, module in part.named_modules() if isinstance(module, NativeLinear)}
    listed = {each.name for each in float8_products(config) if each.why_not is None}
    assert found == listed
    assert any(name.endswith("wkv_a") for name in found) == (tensor == 1)


def test_a_small_reader_is_left_where_tensor_parallelism_keeps_norms_from_casting():
    config, _ = products_of("base", recipe="native")
    shared = float8_products(replace(config, parallel=replace(config.parallel, tensor=2)))
    found = {each.kind for each in shared if each.why_not is None}
    assert "attention.wq" in found
    assert "attention.wkv_a" not in found


def test_the_head_is_converted_where_it_is_asked_for():
    assert "head" not in converted("base", recipe="native", products="all")
    assert "head" in converted("base", recipe="native", output_head=True)
    assert products_of("base", recipe="off")[1] == []


def test_sides_on_a_tensor_parallel_rank_count():
    config, whole = products_of("base", recipe="tensorwise")
    shared = float8_products(replace(config, parallel=replace(config.parallel, tensor=2)))
    assert next(each.out for each in whole if each.kind == "feed_forward.gate_up") == 8192
    assert next(each.out for each in shared if each.kind == "feed_forward.gate_up") == 4096


def test_the_table_counts_kinds_and_operations():
    _, products = products_of("base", recipe="native")
    lines = list(table(products, "native"))
    assert lines[0] == "float8 (native): 104 of 113 products, 89% of their operations"
    assert "  feed_forward.down       24 x 4096 -> 1536    float8" in lines
    assert "  attention.wkv_b          8 x 256 -> 4096     as it was: too small to pay" in lines
    assert len(lines) == 10


def test_warnings_come_where_little_is_gained():
    for recipe, flavor, expected in (
        ("native", "base", []),
        ("tensorwise", "large", []),
        ("rowwise", "base", ["takes 55% of the operations"]),
        ("tensorwise", "small", ["takes 52% of the operations"]),
    ):
        config, products = products_of(flavor, recipe=recipe)
        found = list(warnings(products, config, rows=8))
        assert len(found) == len(expected), found
        assert all(part in text for part, text in zip(expected, found))
    config, products = products_of("base", recipe="native", products="all")
    assert "attention.wkv_b 256 -> 4096 in float8 will cost more" in next(warnings(products, config, rows=8))
    config = replace(config, training=Training(seq_len=512), float8=Float8(recipe="native"))
    assert "512 tokens on a rank at a time" in next(warnings(float8_products(config), config, rows=1))
    config, products = products_of("150m", recipe="native", products="all")
    assert any("attention.wkv_a 768 -> 320" in text for text in warnings(products, config, rows=32))


def test_no_product_of_a_model_is_forgotten():
    with torch.device("meta"):
        model = SWAMLAModel(FLAVORS["base"])
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert [each.name for each in products_of("base", recipe="native")[1]] == linears
