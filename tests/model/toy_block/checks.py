"""Checks of a package that has one kind of block more (toy.patch); tests/model/test_toy_block.py runs them on a copy.

Nothing here, and nothing in the package but what the patch touches, knows how the toy computes.
"""

import copy
from dataclasses import replace

import pytest
import torch

from swamla_titan.config import Config, with_vocabulary
from swamla_titan.config.effects import without_effect
from swamla_titan.config.rules import conflicts
from swamla_titan.config.sections import ActivationCheckpoint, Compile, Float8, Optimizer, Parallel, Training
from swamla_titan.data.batches import MicroBatch
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import Block, ModelConfig, SWAMLAModel
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.counts import block_flops, training_flops
from swamla_titan.optim import build_optimizer, group_table
from swamla_titan.optim.groups import column_units
from swamla_titan.optim.muon import separate_rows
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.float8 import float8_coverage
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.parallel.stages import stage_costs
from swamla_titan.quantization.float8 import convert_to_float8
from swamla_titan.quantization.native import NativeRMSNorm
from swamla_titan.tools import check
from swamla_titan.tools.activations import block_bytes, kept_by_branch, recomputed_operations
from swamla_titan.tools.plan import plan
from swamla_titan.tools.plan_report import report
from tests.distributed.ranks import on_ranks

CPU = torch.device("cpu")
HYBRID = ModelConfig(
    num_layers=4,
    dim=64,
    num_heads=2,
    vocab_size=50,
    max_seq_len=64,
    swa_window=6,
    swa_sink_size=3,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    swa_layers_per_cycle=1,
    **{"toy_layers_per_cycle": 1},
)
TOY = next(layer for layer, kind in enumerate(HYBRID.block_kinds) if kind == "toy")
CONFIG = Config(
    model=HYBRID,
    training=Training(seq_len=24, local_batch_size=2, global_batch_size=2, compute_dtype="float32"),
    compile=Compile(enabled=False),
    optimizer=Optimizer(name="muon"),
)


def model(dtype: torch.dtype = torch.float64) -> SWAMLAModel:
    """In evaluation mode, with matrices large enough for each part to matter."""
    made = SWAMLAModel(HYBRID).to(dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return made


def batch() -> MicroBatch:
    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0] * 11 + [1] * 13, [0] * 24])
    return MicroBatch(tokens, tokens.roll(-1, 1), ids, 2)


def test_the_pattern_of_layers_has_the_new_kind():
    assert HYBRID.block_kinds == ["swa", "mla", "toy", "swa"]


def test_documents_do_not_see_each_other():
    made, given = model(), batch()
    other = given.tokens.clone()
    other[0, :11] = 7
    logits = [made(tokens, None, given.document_ids) for tokens in (given.tokens, other)]
    assert not torch.equal(logits[0][0, :11], logits[1][0, :11])
    assert torch.equal(logits[0][0, 11:], logits[1][0, 11:])


def test_decoding_equals_the_full_forward_pass():
    made, lengths, new = model(), [2, 9], 12
    texts = [torch.randint(0, 50, (length + new,)) for length in lengths]
    padded = torch.zeros(2, 9, dtype=torch.int64)
    for row, (length, text) in enumerate(zip(lengths, texts)):
        padded[row, 9 - length :] = text[:length]
    cache = DecodeCache(made, 2, 9 + new)
    logits = made.prefill(padded, cache, torch.tensor(lengths))
    for step in range(new):
        for row, (length, text) in enumerate(zip(lengths, texts)):
            with torch.no_grad():
                full = made(text[None, : length + step])[0, -1]
            torch.testing.assert_close(logits[row], full, rtol=0, atol=1e-11)
        logits = made.decode(torch.stack([text[n + step] for n, text in zip(lengths, texts)])[:, None], cache)


def _steps(
    config: Config, world: World, given: MicroBatch | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the first step's gradients by name, whole."""
    given = given or batch()
    parallel_model = ParallelModel(config, world)
    parallel_model.init_weights(0)
    (part,) = parallel_model.parts
    optimizer = build_optimizer(part, config.optimizer, world.stage_group)
    losses, gradients = [], {}
    for step in range(4):
        losses.append(parallel_model.train_step([given], float(given.targets.numel())).item())
        for name, parameter in part.named_parameters() if step == 0 else ():
            gradients[name] = getattr(parameter.grad, "full_tensor", parameter.grad.clone)()
        optimizer.step(0.01)
        optimizer.zero_grad()
    return losses, gradients


def _train(config: Config) -> list[float]:
    world = init_distributed(config.parallel)
    shared, gradients = _steps(config, world)
    alone, expected = _steps(replace(config, parallel=Parallel()), World.alone(CPU))
    assert shared == pytest.approx(alone, rel=1e-3)  # bfloat16 in Muon turns other roundings into other steps
    assert shared[0] == pytest.approx(alone[0], rel=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * expected[name].abs().max().item())
    return alone


def test_two_tensor_parallel_ranks_train_as_one_process():
    for losses in on_ranks(2, _train, replace(CONFIG, parallel=Parallel(tensor=2))):
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    "settings", [ActivationCheckpoint(mode="full"), ActivationCheckpoint(mode="selective", modules="both")]
)
def test_checkpointing_recomputes_it(settings):
    given, gradients = batch(), []
    plain = model()
    for made in (plain, copy.deepcopy(plain)):
        if made is not plain:
            apply_activation_checkpointing(made, settings)
        made(given.tokens, given.targets).backward()
        gradients.append([parameter.grad for parameter in made.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)
    config = replace(CONFIG, activation_checkpoint=settings)
    assert recomputed_operations(config, TOY) > 0


def test_of_a_region_only_the_layer_that_ends_it_is_not_recomputed():
    config = replace(CONFIG, activation_checkpoint=ActivationCheckpoint(mode="full", modules="attention"))
    gates_and_values, states = 2 * 24 * 128 * 64, 4 * 24 * 64
    assert recomputed_operations(config, TOY) == gates_and_values + states


def test_flops_memory_and_the_cut_of_a_pipeline_count_it():
    of_kind = {kind: block_flops(HYBRID, kind, 24) for kind in HYBRID.kinds()}
    head = 6 * 24 * HYBRID.padded_vocab_size * HYBRID.dim
    assert training_flops(HYBRID, 24) == 2 * of_kind["swa"] + of_kind["mla"] + of_kind["toy"] + head
    costs = stage_costs(HYBRID, 24, 2)
    assert sum(cost.operations for cost in costs) > training_flops(HYBRID, 24)
    planned = plan(replace(CONFIG, parallel=Parallel(tensor=2)), 2)
    compiled = sum(kept_by_branch(HYBRID, "toy", branch, 1, 2) for branch in Block.branches)
    kept = 1.3 * compiled * 24 * 4  # eager blocks keep more
    assert block_bytes(planned.config, planned.degrees, [TOY]) == round(kept)
    shapes = {name: shape for name, shape in planned.worst.shapes.items() if f".{TOY}.attention." in name}
    names = {name.rpartition("attention.")[2] for name in shapes}
    assert {"wgv.weight", "wo.weight"} <= names
    assert shapes[f"blocks.{TOY}.attention.wgv.weight"] == ((128, 64), (64, 64))
    assert shapes[f"blocks.{TOY}.attention.wo.weight"] == ((64, 64), (64, 32))
    assert any("attention.wgv.weight" in line for line in report(planned))


def test_optimizers_and_float8_know_its_weights():
    made = SWAMLAModel(HYBRID)
    attention = made.blocks[str(TOY)].attention
    gates, values = separate_rows(made)[attention.wgv.weight]
    assert torch.equal(torch.stack([gates, values]).view(2, 2, 32), torch.arange(128).view(2, 2, 32).transpose(0, 1))
    assert column_units(made)[attention.wo.weight] == 32
    assert any("attention.wgv" in row.names for row in group_table(HYBRID, CONFIG.optimizer) if row.kind.rule == "muon")
    float8 = Float8(recipe="native", linear_layers="all")
    converted = {each.name for each in float8_coverage(replace(CONFIG, float8=float8)) if each.why_not is None}
    assert {f"blocks.{TOY}.attention.{name}" for name in ("wgv", "wo")} <= converted
    convert_to_float8(made, float8, CPU)
    assert isinstance(made.blocks[str(TOY)].attention_norm, NativeRMSNorm)


def test_it_trains_in_native_float8():
    config = replace(
        CONFIG,
        training=replace(CONFIG.training, seq_len=32),
        float8=Float8(recipe="native", linear_layers="all"),
    )
    tokens = torch.randint(0, 50, (2, 32), generator=torch.Generator().manual_seed(1))
    given = MicroBatch(tokens, tokens.roll(-1, 1), None, 2)
    losses = {}
    for name, each in {"float8": config, "plain": replace(config, float8=Float8())}.items():
        losses[name], gradients = _steps(each, World.alone(CPU), given)
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
    assert losses["float8"] == pytest.approx(losses["plain"], rel=0.02)
    assert losses["float8"] != losses["plain"]
    assert losses["float8"][-1] < losses["float8"][0] - 0.1


def test_what_it_cannot_do_is_refused():
    with pytest.raises(UserError, match="toy blocks cannot share sequences"):
        plan(replace(CONFIG, parallel=Parallel(context=2)), 2)


def test_its_own_keys_are_held_against_others():
    with pytest.raises(ValueError, match=r"^toy_heads: 3 does not divide dim = 64$"):
        replace(HYBRID, toy_heads=3)
    four = replace(CONFIG, model=replace(HYBRID, num_heads=4), parallel=Parallel(tensor=4))
    (found,) = (each for each in conflicts(four) if "model.toy_heads" in each.keys)
    assert found.keys[0] == "parallel.tensor"
    assert "4 ranks cannot share model.toy_heads = 2 equally: use tensor = 2" in found.problem
    with pytest.raises(UserError, match="toy_heads = 2 equally"):
        with_vocabulary(four, 50)
    absent = replace(four, model=replace(HYBRID, num_heads=4, toy_layers_per_cycle=0, toy_heads=4))
    assert [each.keys[0] for each in without_effect(absent)] == ["model.toy_heads"]


def test_check_tries_it():
    assert "toy" in check.SMALL.block_kinds
    findings = check._attention(Config(), CPU)
    assert {finding.state for finding in findings} == {"ok"}, findings
