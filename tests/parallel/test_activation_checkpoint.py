"""Recomputation changes memory and work, and nothing else."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from swamla_titan.config.sections import ActivationCheckpoint, Compile
from swamla_titan.model.blocks import MLABlock, SWABlock
from swamla_titan.parallel import activation_checkpoint
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.compile import compile_model
from tests.parallel.plan import ATTENTION, MODES, PRODUCT, Seen, batch, small_model, watch, watch_compiled

LAYERS = 3
# of a SWA block: wqkv, wo, gate_up, down; of an MLA block: wq, wkv_a, wkv_b, wo, gate_up, down
PRODUCTS = 4 + 4 + 6
HEAD = 1


@pytest.fixture(scope="module")
def eager() -> dict[str, Seen]:
    return {mode: _seen(mode) for mode in MODES}


def _seen(mode: str, **changes: float) -> Seen:
    model = small_model(**changes)
    apply_activation_checkpointing(model, MODES[mode])
    return watch(model, batch())


@pytest.mark.parametrize("mode", ["blocks", "operators", "full"])
def test_loss_and_gradients_are_those_without(eager: dict[str, Seen], mode: str):
    assert eager[mode].loss == eager["none"].loss
    for name, gradient in eager["none"].gradients.items():
        torch.testing.assert_close(eager[mode].gradients[name], gradient, rtol=1e-12, atol=1e-14)


def test_memory_kept_falls_from_mode_to_mode(eager: dict[str, Seen]):
    kept = [eager[mode].kept for mode in ("none", "operators", "full")]
    assert kept[0] > 2 * kept[1] > 2 * kept[2]
    assert kept[0] > eager["blocks"].kept > kept[2]
    # `full` keeps of a block its input alone. The rest, outside of blocks, is the same in all modes.
    stream = 2 * 64 * 64 * 8
    outside = kept[2] - LAYERS * stream
    # `operators` keeps besides it, a token: of a SWA block wqkv (192), attention's output (64), wo (64); of an MLA
    # block wq (96), wkv_a (32), attention's output (96), wo (64); and of attention two heads' normalisers.
    widths = 2 * (192 + 64 + 64) + (96 + 32 + 96 + 64) + LAYERS * 2
    assert kept[1] - kept[2] == pytest.approx(2 * 64 * widths * 8, rel=0.02)
    assert outside > 0


def test_what_is_computed_again(eager: dict[str, Seen]):
    for seen in eager.values():
        assert seen.forward[ATTENTION] == LAYERS
        assert seen.forward[PRODUCT] == PRODUCTS + HEAD
    none, blocks, operators, full = (eager[mode].backward for mode in ("none", "blocks", "operators", "full"))
    both_factors = 2 * (PRODUCTS + HEAD)
    assert none[ATTENTION] == operators[ATTENTION] == 0
    assert none[PRODUCT] == both_factors
    # gate_up of each block, wkv_b of the MLA block; never down, whose result nothing asks for
    assert operators[PRODUCT] == both_factors + LAYERS + 1
    assert full[ATTENTION] == LAYERS
    assert full[PRODUCT] == both_factors + PRODUCTS - LAYERS
    # each third block: layer 2, the MLA block
    assert blocks[ATTENTION] == 1
    assert blocks[PRODUCT] == both_factors + 6 - 1


@pytest.mark.parametrize("mode", ["operators", "full"])
def test_dropout_drops_the_same_again(mode: str):
    without, recomputed = _seen("none", dropout=0.3), _seen(mode, dropout=0.3)
    assert recomputed.loss == without.loss != _seen("none").loss
    for name, gradient in without.gradients.items():
        torch.testing.assert_close(recomputed.gradients[name], gradient, rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    """What compiled blocks did in a mode: each is compiled once."""
    folder = str(tmp_path_factory.mktemp("compiled"))

    @functools.cache
    def watched(mode: str) -> Seen:
        torch._dynamo.reset()
        model = small_model()
        apply_activation_checkpointing(model, MODES[mode])
        compile_model(model, Compile(cache_folder=folder), backend="aot_eager")
        return watch_compiled(model, batch())

    return watched


@pytest.mark.parametrize("mode", ["blocks", "operators", "full"])
def test_compiled_blocks_keep_and_recompute_the_same(
    mode: str, eager: dict[str, Seen], compiled: Callable[[str], Seen]
):
    seen = {each: compiled(each) for each in ("none", mode)}
    assert seen[mode].loss == pytest.approx(eager["none"].loss, rel=1e-13)
    for name, gradient in eager["none"].gradients.items():
        torch.testing.assert_close(seen[mode].gradients[name], gradient, rtol=1e-11, atol=1e-13)
    assert seen[mode].kept < seen["none"].kept
    assert seen[mode].backward[ATTENTION] == {"blocks": 1, "operators": 0, "full": LAYERS}[mode]
    again = {"blocks": 6 - 1, "operators": LAYERS + 1, "full": PRODUCTS - LAYERS}[mode]
    assert seen[mode].backward[PRODUCT] == seen["none"].backward[PRODUCT] + again


def test_names_kinds_and_checkpoints_are_those_without():
    plain, model = small_model(), small_model()
    apply_activation_checkpointing(model, MODES["operators"])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert get_model_state_dict(model).keys() == get_model_state_dict(plain).keys()
    assert [isinstance(block, SWABlock) for block in model.blocks.values()] == [True, True, False]
    assert isinstance(model.blocks["2"], MLABlock)
    names = []
    for each in (plain, model):
        each(batch(), batch()).backward()
        optimizer = torch.optim.AdamW(each.parameters())
        optimizer.step()
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        names.append(get_optimizer_state_dict(each, optimizer, options=options).keys())
    assert names[0] == names[1]
    assert "state.blocks.0.attention.wqkv.weight.exp_avg" in names[1]


def test_each_nth_layer_is_counted_over_the_whole_model_of_which_a_stage_holds_a_part():
    model = small_model(num_layers=6)
    for name in ("0", "1", "2"):
        del model.blocks[name]
    apply_activation_checkpointing(model, ActivationCheckpoint(mode="selective", selective="blocks", every_n_blocks=2))
    chosen = [name for name, block in model.blocks.items() if type(block) not in (SWABlock, MLABlock)]
    assert chosen == ["3", "5"]


def test_twice_is_refused():
    model = small_model()
    apply_activation_checkpointing(model, MODES["full"])
    with pytest.raises(ValueError, match="CheckpointedSWABlock cannot be checkpointed"):
        apply_activation_checkpointing(model, MODES["full"])


def test_every_attention_operator_of_our_own_is_kept():
    """Under "operators" the forward pass of none is repeated; the one with the rotation in it is not taken there."""
    ours = {
        getattr(torch.ops.swamla_titan, name.removeprefix("swamla_titan::")).default
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("swamla_titan::") and "attention" in name
        if "backward" not in name and "rotary" not in name
    }
    assert len(ours) >= 2
    assert ours <= activation_checkpoint._ATTENTION
