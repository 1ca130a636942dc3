"""Which rule moves a parameter, how its moments are kept, what its learning rate is, and which matrices are one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from swamla_titan.config import Config
from swamla_titan.config.sections import Compile, Optimizer, Parallel
from swamla_titan.distributed.degrees import Degrees, fit_degrees
from swamla_titan.distributed.mesh import fake_world
from swamla_titan.model import FLAVORS, ModelConfig, SWAMLAModel
from swamla_titan.optim import build_optimizer, group_table
from swamla_titan.optim.groups import block_size, column_units, groups, multiplier, trained_parameters
from swamla_titan.optim.muon import separate_rows
from swamla_titan.parallel.model_parts import build_parts

GROUPED_QUERIES = ModelConfig(
    **{"num_layers": 3, "dim": 64, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 100, "max_seq_len": 32},
    **{"ffn_hidden_dim": 96, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24},
)


@pytest.mark.parametrize(
    "name, columns, unit, block",
    [
        ("adamw8bit", 1024, 0, 256),
        ("adamw8bit", 96, 0, 96),
        ("adamw8bit", 2816, 32, 32),
        ("adamw8bit", 1536, 96, 96),
        ("adamw4bit", 1024, 0, 128),
        ("adamw4bit", 66, 0, 66),
        ("adamw4bit", 101, 0, 0),  # two in a byte
        ("adamw_fp8", 352, 0, 176),
        ("adamw_fp8", 64, 16, 0),  # scales would take a quarter of it
    ],
)
def test_blocks_divide_rows_and_what_ranks_make_of_them(name, columns, unit, block):
    assert block_size(name, columns, unit) == block


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("name", ["adamw8bit", "adamw4bit", "adamw_fp8"])
def test_every_matrix_of_every_flavor_is_quantized_but_the_smallest(flavor, name):
    for row in group_table(FLAVORS[flavor], Optimizer(name=name, decay_embeddings=True)):
        assert row.kind.moments == (name if row.kind.weight_decay else "float32"), row


def test_the_last_pattern_that_fits_counts():
    patterns = {"blocks.*": 2.0, "*.wo.weight": 0.5, "blocks.1.attention.wo.weight": 3.0}
    assert multiplier("embedding.weight", patterns) == 1.0
    assert multiplier("blocks.0.feed_forward.down.weight", patterns) == 2.0
    assert multiplier("blocks.0.attention.wo.weight", patterns) == 0.5
    assert multiplier("blocks.1.attention.wo.weight", patterns) == 3.0
    assert multiplier("blocks.1.attention.wo.weight", dict(reversed(patterns.items()))) == 2.0


def test_multipliers_go_with_the_schedule():
    model = SWAMLAModel(FLAVORS["debug"])
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model, Optimizer(name=name, lr_multipliers={"embedding.weight": 0.25}))
        for lr in (1.0, 0.5):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step(lr)
            for group in optimizer.param_groups:
                is_embedding = any(parameter is model.embedding.weight for parameter in group["params"])
                assert group["lr"] == lr * (0.25 if is_embedding else 1.0)


@pytest.mark.parametrize("name", ["adamw8bit", "adamw4bit", "adamw_fp8"])
@pytest.mark.parametrize("tied, moments", [(True, None), (False, "float32")])
def test_an_embedding_of_its_own_whose_rows_are_mostly_without_gradient_is_not_quantized(name, tied, moments):
    config = replace(FLAVORS["debug"], vocab_size=512, tie_embeddings=tied)
    with torch.device("meta"):
        model = SWAMLAModel(config)
    of = {parameter: kind for kind, each in groups(model, Optimizer(name=name)).items() for parameter in each}
    assert of[model.embedding.weight].moments == (moments or name)
    assert of[model.head.weight].moments == name


@pytest.mark.parametrize("name", ["muon", "adamw8bit", "lion"])
def test_a_table_in_a_block_is_treated_as_an_embedding(name):
    with torch.device("meta"):
        model = SWAMLAModel(replace(FLAVORS["debug"], vocab_size=512))
        model.blocks["0"].attention.table = nn.Embedding(512, 64)
    of = {parameter: kind for kind, each in groups(model, Optimizer(name=name)).items() for parameter in each}
    found = of[model.blocks["0"].attention.table.weight]
    assert (found.rule, found.moments) == ("lion" if name == "lion" else "adamw", "float32")
    assert found.weight_decay == 0 != of[model.blocks["0"].attention.wo.weight].weight_decay


def test_absent_tokens_make_no_large_steps():
    """A gradient once, then none for a while: the step is never much more than the learning rate."""
    torch.manual_seed(0)
    model = SWAMLAModel(replace(FLAVORS["debug"], num_layers=3, vocab_size=512, tie_embeddings=False))
    optimizer = build_optimizer(model, Optimizer(name="adamw8bit", lr=1e-3, weight_decay=0.0))
    for _ in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        seen = torch.randint(0, 512, (20,))
        model.embedding.weight.grad[seen] = 1e-2 * torch.randn(20, model.config.dim)
        before = model.embedding.weight.detach().clone()
        optimizer.step(1e-3)
        assert (model.embedding.weight - before).abs().max() < 1.5e-3


def test_both_ends_of_a_tied_weight_are_of_one_kind_on_other_stages_of_a_pipeline():
    model = ModelConfig(num_layers=2, dim=64, num_heads=2, vocab_size=100, max_seq_len=32, tie_embeddings=True)
    config = Config(model=model, parallel=Parallel(pipeline=2))
    optimizer = Optimizer(name="muon", lr_multipliers={"embedding.weight": 0.5})
    for decays in (False, True):
        optimizer = replace(optimizer, decay_embeddings=decays)
        kinds = []
        for rank in range(2):
            with fake_world(Degrees(pipeline=2), "fsdp", rank) as world:
                [stage] = build_parts(config, world)
                weight = stage.embedding.weight if rank == 0 else stage.head.weight
                kinds += [kind for kind, each in groups(stage, optimizer).items() if any(m is weight for m in each)]
        assert kinds[0] == kinds[1]
        assert (kinds[0].rule, kinds[0].lr_multiplier) == ("adamw", 0.5)
        assert kinds[0].weight_decay == (0.1 if decays else 0.0)


def test_the_table_tells_every_group():
    rows = group_table(FLAVORS["debug"], Optimizer(name="muon", lr_multipliers={"*.wo.weight": 2.0}))
    assert [str(row.kind) for row in rows] == ["adamw, no decay", "muon, decay 0.1", "muon, decay 0.1, lr x 2"]
    assert rows[0].names[0] == "embedding"
    assert all(name.endswith("norm") for name in rows[0].names[1:])
    assert rows[2].names == ["attention.wo"]
    total = sum(parameter.numel() for parameter in SWAMLAModel(FLAVORS["debug"]).parameters())
    assert sum(row.elements for row in rows) == total


# Weight decay


ALL_RULES = [{"name": name} for name in ("adamw", "lion", "muon", "adamw8bit", "adamw4bit", "adamw_fp8")]


@pytest.mark.parametrize("settings", [*ALL_RULES, {"name": "adamw", "moments": "bfloat16"}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["rmsnorm", "dynamic_tanh"])
def test_the_blocks_matrices_decay_and_by_one_key_embedding_and_head(settings, tied, norm):
    config = replace(FLAVORS["debug"], num_layers=3, vocab_size=512, tie_embeddings=tied, norm=norm, q_lora_rank=32)
    with torch.device("meta"):
        model = SWAMLAModel(config)
    matrices = {p for p in model.blocks.parameters() if p.ndim == 2}
    for decays in (False, True):
        expected = matrices | ({model.embedding.weight, model.head.weight} if decays else set())
        found = groups(model, Optimizer(**settings, weight_decay=0.3, decay_embeddings=decays))
        assert {p for kind, each in found.items() if kind.weight_decay for p in each} == expected
        assert {kind.weight_decay for kind in found} == {0.0, 0.3}
        listed = [p for each in found.values() for p in each]
        assert len(listed) == len({*listed}) == len(list(model.parameters()))


@pytest.mark.parametrize("parallel", [{}, {"dp_shard": 2}, {"tensor": 2}, {"data_parallel": "ddp"}, {"pipeline": 3}])
@pytest.mark.parametrize("tied", [True, False])
def test_every_plan_decays_the_same_parameters(parallel, tied):
    model = ModelConfig(num_layers=3, dim=64, num_heads=2, vocab_size=128, max_seq_len=32, tie_embeddings=tied)
    config = Config(model=model, parallel=Parallel(**parallel), compile=Compile(enabled=False))
    with torch.device("meta"):
        names = {
            name for name, p in SWAMLAModel(model).named_parameters() if name.startswith("blocks.") and p.ndim == 2
        }
    ranks = 3 if parallel.get("pipeline") else 2 if parallel else 1
    decaying = set()
    for rank in range(ranks):
        with fake_world(fit_degrees(config.parallel, ranks), config.parallel.data_parallel, rank) as world:
            for part in build_parts(config, world):
                of = {p: name for name, p in trained_parameters(part)}
                for kind, each in groups(part, config.optimizer).items():
                    decaying |= {of[p] for p in each if kind.weight_decay}
    assert decaying == names


# Fused weights


def test_the_rows_of_fused_weights_are_each_in_one_matrix():
    model = SWAMLAModel(GROUPED_QUERIES)
    found = separate_rows(model)
    kinds = {
        name.split(".", 2)[2]: [len(rows) for rows in found[p]] for name, p in model.named_parameters() if p in found
    }
    assert kinds == {
        "attention.wqkv.weight": [64, 32, 32],
        "feed_forward.gate_up.weight": [96, 96],
        "attention.wkv_a.weight": [24, 8],
        "attention.wkv_b.weight": [64, 96],
    }
    for weight, parts in found.items():
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(weight)))


def test_columns_that_ranks_may_part_come_in_units():
    model = SWAMLAModel(GROUPED_QUERIES)
    units = column_units(model)
    named = {name.split(".", 2)[2]: units[p] for name, p in model.named_parameters() if p in units}
    assert {name.split(".")[1] for name in named} == {"wo", "down"}
    assert set(units.values()) == {16, 24, GROUPED_QUERIES.ffn_group}


def split(module: nn.Module) -> list[nn.Parameter]:
    """The matrices of a block's part by its own words, as parameters of their own with gradients."""
    fused = {"wqkv", "wkv_a", "wkv_b", "gate_up"}
    found = []
    for name, child in module.named_children():
        weight = getattr(child, "weight", None)
        if weight is None or weight.ndim < 2:
            continue
        apart = child.spec.split if name in fused else lambda whole: (whole,)
        for part, gradient in zip(apart(weight.detach()), apart(weight.grad)):
            found.append(nn.Parameter(part.clone()))
            found[-1].grad = gradient.clone()
    return found


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_treats_fused_weights_as_torchs_does_the_matrices_in_them(adjust):
    torch.manual_seed(0)
    model = SWAMLAModel(GROUPED_QUERIES)
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = build_optimizer(model, Optimizer(name="muon", muon_adjust_lr_fn=adjust, **settings))
    modules = [part for block in model.blocks.values() for part in (block.attention, block.feed_forward)]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    expected = [parameter for module in modules for parameter in split(module)]
    torch.optim.Muon(expected, adjust_lr_fn=adjust, **settings).step()
    optimizer.step(settings["lr"])
    found = [parameter for module in modules for parameter in split(module)]
    assert len(found) == len(expected) > len(list(model.blocks.parameters())) // 2
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
