"""Recomputation changes memory and work, and nothing else."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.utils.flop_counter import FlopCounterMode

import swamla_titan.parallel.kernels  # noqa: F401  registers all operators of our own
from swamla_titan.config import Config
from swamla_titan.config.sections import ActivationCheckpoint, Compile, Kernels, Parallel, Training
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.kernels.attention.masks import causal_pairs, window_pairs
from swamla_titan.model import ModelConfig
from swamla_titan.model.blocks import BLOCKS, Block
from swamla_titan.model.branch import Regions
from swamla_titan.parallel import activation_checkpoint
from swamla_titan.parallel.activation_checkpoint import (
    apply_activation_checkpointing,
    checkpointed_regions,
    validate_recomputation,
)
from swamla_titan.parallel.compile import compile_model
from swamla_titan.tools.activations import recomputed_operations
from swamla_titan.tools.memory import weights_in_use
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


@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients_are_those_without_to_the_last_bit(eager: dict[str, Seen], mode: str):
    assert eager[mode].loss == eager["none"].loss
    for name, gradient in eager["none"].gradients.items():
        assert torch.equal(eager[mode].gradients[name], gradient), name


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


# How often a step calls attention and feed-forward, in each of three blocks: once more where they are recomputed.
CALLS = {
    "none": ([1, 1, 1], [1, 1, 1]),
    "blocks": ([1, 1, 2], [1, 1, 2]),
    "operators": ([2, 2, 2], [2, 2, 2]),
    "full": ([2, 2, 2], [2, 2, 2]),
    "attention": ([2, 2, 2], [1, 1, 1]),
    "feed_forward": ([1, 1, 1], [2, 2, 2]),
    "both": ([2, 2, 2], [2, 2, 2]),
    "attention of one": ([1, 2, 1], [1, 1, 1]),
    "operators of both": ([2, 2, 2], [2, 2, 2]),
}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_asked_for_is_called_again_and_nothing_else(mode: str):
    model, calls = small_model(), Counter[str]()
    apply_activation_checkpointing(model, MODES[mode])
    for name, block in model.blocks.items():
        for branch in ("attention", "feed_forward"):

            def count(*_: object, at: str = f"{name} {branch}") -> None:
                calls[at] += 1

            block.get_submodule(branch).register_forward_pre_hook(count)
    loss = model(batch(), batch())
    assert set(calls.values()) == {1}
    loss.backward()
    found = tuple([calls[f"{layer} {branch}"] for layer in range(LAYERS)] for branch in ("attention", "feed_forward"))
    assert found == CALLS[mode]


def test_a_branch_that_is_recomputed_keeps_its_input_alone(eager: dict[str, Seen]):
    """Measured by torch's own hooks, without the operators' witness: the memory of what autograd saves."""
    saved = {mode: _saved(mode) for mode in ("none", "attention", "feed_forward", "both", "full")}
    stream = 2 * 64 * 64 * 8
    freed = {mode: saved["none"] - saved[mode] for mode in saved}
    assert freed["attention"] > 5 * LAYERS * stream < freed["feed_forward"]
    assert freed["both"] == freed["attention"] + freed["feed_forward"]
    assert freed["full"] == freed["both"] + LAYERS * stream  # the residual between the two
    kept = {mode: eager[mode].kept for mode in saved}
    assert kept["full"] < kept["both"] < min(kept["attention"], kept["feed_forward"])


def _saved(mode: str) -> int:
    """Bytes that the blocks' graph holds, each tensor's memory once, but for the weights'."""
    model = small_model()
    apply_activation_checkpointing(model, MODES[mode])
    context = model.context(64)
    shared = [*model.parameters(), *context["swa"].rotation, *context["mla"].rotation, context["swa"].mask]
    saved = {tensor.untyped_storage().data_ptr(): 0 for tensor in shared if isinstance(tensor, torch.Tensor)}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage.data_ptr(), storage.nbytes())
        alive.append(tensor)
        return tensor

    x = model.embed(batch()).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in model.blocks.values():
            x = block(x, context)
    return sum(saved.values())


@pytest.mark.parametrize("mode", MODES)
def test_plan_counts_the_cast_weights_that_are_kept(mode: str):
    """A linear layer that is recomputed casts its weight again, and keeps no copy in bfloat16 meanwhile."""
    model = small_model(torch.float32)
    model.compute_dtype = torch.bfloat16
    apply_activation_checkpointing(model, MODES[mode])
    shapes = {tuple(weight.shape) for weight in model.blocks.parameters() if weight.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes:
            found[tensor.data_ptr()] = tensor.nbytes
        alive.append(tensor)
        return tensor

    x, context = model.embed(batch(5)), model.context(64)  # no tensor of 320 tokens is as large as a weight
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in model.blocks.values():
            x = block(x, context)

    def copies(part: torch.nn.Module) -> int:
        return 2 * sum(weight.numel() for weight in part.parameters() if weight.dim() == 2)

    config = Config(model=model.config, activation_checkpoint=MODES[mode])
    counted = weights_in_use(model, config, World.alone(torch.device("cpu"))) - copies(model.head)
    again = [
        sum(copies(block.get_submodule(branch)) for branch in region)
        for name, block in model.blocks.items()
        for region in checkpointed_regions(MODES[mode], int(name)).values()
    ]
    assert sum(found.values()) == counted - max(again, default=0)
    assert (sum(found.values()) == 0) == (mode in ("operators", "full", "both", "operators of both"))


@pytest.mark.parametrize("mode", MODES)
def test_plan_counts_the_operations_that_are_repeated(mode: str):
    """Against torch's counter, by linear layers alone: of attention it counts whole squares."""
    model = small_model()
    apply_activation_checkpointing(model, MODES[mode])
    config = Config(
        model=model.config, training=Training(seq_len=64), activation_checkpoint=MODES[mode], compile=Compile(False)
    )
    loss = model(batch(), batch())
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    linear = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    both_factors = 2 * 2 * 2 * 64 * sum(each.weight.numel() for each in linears)
    again = sum(recomputed_operations(config, layer) for layer in range(LAYERS))
    attention = {"full": 3, "attention": 3, "both": 3, "blocks": "mla", "attention of one": "swa"}.get(mode, 0)
    swa, mla = 2 * 2 * window_pairs(64, 16, 4) * 2 * 32, 2 * 2 * causal_pairs(64) * (48 + 48)
    scores = {0: 0, 3: 2 * swa + mla, "swa": swa, "mla": mla}[attention]
    assert linear - both_factors == 2 * (again - scores)  # two sequences


@pytest.mark.parametrize("mode", ["operators", "full", "attention", "both"])
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


@pytest.mark.parametrize(
    "mode",
    [
        *("operators", "both"),
        *(
            pytest.param(mode, marks=pytest.mark.slow)
            for mode in ("blocks", "full", "attention", "feed_forward", "operators of both")
        ),
    ],
)
def test_compiled_blocks_keep_and_recompute_the_same(
    mode: str, eager: dict[str, Seen], compiled: Callable[[str], Seen]
):
    seen = {each: compiled(each) for each in ("none", mode)}
    assert seen[mode].loss == pytest.approx(eager["none"].loss, rel=1e-13)
    for name, gradient in eager["none"].gradients.items():
        torch.testing.assert_close(seen[mode].gradients[name], gradient, rtol=1e-11, atol=1e-13)
    assert seen[mode].kept < seen["none"].kept
    again = {
        "blocks": (1, 6 - 1),
        "operators": (0, LAYERS + 1),
        "full": (LAYERS, PRODUCTS - LAYERS),
        "both": (LAYERS, PRODUCTS - 2 * LAYERS),
        "attention": (LAYERS, 1 + 1 + 3),  # all but wo
        "feed_forward": (0, LAYERS),  # gate_up
        "operators of both": (0, LAYERS + 1),
    }[mode]
    assert seen[mode].backward[ATTENTION] == again[0]
    assert seen[mode].backward[PRODUCT] == seen["none"].backward[PRODUCT] + again[1]
    if mode == "both":  # the compiler would rather make the residual between the branches again
        stream = 2 * 64 * 64 * 8
        assert seen[mode].kept - compiled("full").kept == pytest.approx(LAYERS * stream, rel=0.05)


def test_names_kinds_and_checkpoints_are_those_without():
    plain, model = small_model(), small_model()
    apply_activation_checkpointing(model, MODES["operators"])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert get_model_state_dict(model).keys() == get_model_state_dict(plain).keys()
    assert all(type(block) is Block for block in model.blocks.values())
    kinds = [type(block.attention) for block in model.blocks.values()]
    assert kinds == [BLOCKS[kind] for kind in ("swa", "swa", "mla")]
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
    chosen = [name for name, block in model.blocks.items() if type(block.regions) is not Regions]
    assert chosen == ["3", "5"]


@pytest.mark.parametrize(
    "mode, changes, culprit",
    [
        ("full", {}, "attention"),
        ("attention", {}, "attention"),
        ("both", {}, "attention"),
        ("blocks", {}, "attention"),
        ("operators", {}, None),
        ("operators of both", {}, None),
        ("feed_forward", {}, None),
        ("none", {}, None),
        ("operators", {"model": ModelConfig(dropout=0.1)}, "dropout"),
        ("operators of both", {"model": ModelConfig(dropout=0.1)}, None),
        ("full", {"kernels": Kernels(attention="reference")}, None),
        ("full", {"compile": Compile(enabled=False)}, None),
        ("full", {"parallel": Parallel()}, None),
    ],
)
def test_what_a_compiler_cannot_repeat_on_a_cpu_is_refused(mode, changes, culprit):
    config = Config(activation_checkpoint=MODES[mode], parallel=Parallel(tensor=2))
    config = dataclasses.replace(config, **changes)
    validate_recomputation(config, torch.device("cuda"))
    if culprit is None:
        validate_recomputation(config, torch.device("cpu"))
    else:
        with pytest.raises(UserError, match=f"{culprit} cannot be recomputed .* parallel.tensor = 2: set compile.ena"):
            validate_recomputation(config, torch.device("cpu"))


def test_twice_is_refused():
    model = small_model()
    apply_activation_checkpointing(model, MODES["full"])
    with pytest.raises(ValueError, match=r"blocks\.0 cannot be checkpointed"):
        apply_activation_checkpointing(model, MODES["full"])


def test_every_attention_operator_of_our_own_is_kept():
    """Under "operators" the forward pass of none of them is repeated, but for three that are not taken then."""
    not_taken = {
        torch.ops.swamla_titan.rotary_window_attention.default,
        torch.ops.swamla_titan.latent_attention.default,
        torch.ops.swamla_titan.latent_hopper_attention.default,
    }
    ours = {
        getattr(torch.ops.swamla_titan, name.removeprefix("swamla_titan::")).default
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("swamla_titan::") and "attention" in name and "backward" not in name
    }
    assert ours > not_taken
    assert len(ours - not_taken) >= 2
    assert ours - not_taken <= activation_checkpoint._ATTENTION
