"""The estimate of activations against what torch keeps."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from swamla_titan.config import Config
from swamla_titan.config.sections import ActivationCheckpoint, Compile, Float8, Training
from swamla_titan.distributed.degrees import Degrees
from swamla_titan.kernels.float8.linear import Settings
from swamla_titan.model import Block, ModelConfig, SWAMLAModel
from swamla_titan.model.annex_config import EngramConfig
from swamla_titan.model.context import FullSequences
from swamla_titan.model.swa import SlidingWindowAttention
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.sequence_layout import SequenceLayout
from swamla_titan.quantization.float8 import convert_to_float8
from swamla_titan.quantization.native import convert_natively, save_transposed_weights
from swamla_titan.tools.activations import (
    EAGER_FACTOR,
    block_bytes,
    has_operators,
    kept_by_branch,
    native_savings,
    recomputed_bytes,
)
from tests.parallel.plan import Witness, small_model

ROWS, LENGTH = 2, 96
SHAPE = ModelConfig(
    num_layers=3,
    dim=128,
    num_heads=4,
    vocab_size=50,
    max_seq_len=LENGTH,
    swa_window=32,
    kv_lora_rank=48,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=48,
)
KINDS = list(dict.fromkeys(SHAPE.block_kinds))
SHAPES = {
    "plain": SHAPE,
    "grouped": dataclasses.replace(SHAPE, num_kv_heads=2),
    "query rank": dataclasses.replace(SHAPE, q_lora_rank=64),
}
_ATTENTION = ("attention.wqkv", "attention.wq", "attention.wkv_a", "attention.wo")
NATIVE = (*_ATTENTION, "feed_forward.gate_up", "feed_forward.down")


def kept_elements(shape: ModelConfig, kind: str, **shards: int) -> float:
    """Elements a token that a whole block keeps."""
    return sum(kept_by_branch(shape, kind, branch, **shards) for branch in Block.branches)


def kept(shape: ModelConfig, kind: str, dtype: torch.dtype, backend: str | None, native: bool = False) -> float:
    """Numbers a token that a block keeps for its backward pass, without weights, masks and rotations."""
    context = FullSequences().context(shape, LENGTH, None, torch.device("cpu"), dtype)
    block = Block(shape, kind)
    # Weights have the dtype already, as under FSDP: a cast that is kept is counted among the weights in use.
    block.to(dtype)
    if native:
        model = SWAMLAModel(dataclasses.replace(shape, num_layers=1))
        model.blocks["0"] = block
        convert_natively(model, [f"blocks.0.{name}" for name in NATIVE if _has(block, name)], Settings())
        save_transposed_weights(model, False)
    assert isinstance(context["swa"].mask, torch.Tensor)
    rotations = *context["swa"].rotation, *context["mla"].rotation
    shared = (*rotations, context["swa"].mask, *block.parameters())
    found = {tensor.untyped_storage().data_ptr(): 0 for tensor in shared}
    if backend:
        torch._dynamo.reset()  # else what other tests have compiled of Block counts against the recompile limit
        block.compile(fullgraph=True, dynamic=False, backend=backend)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape[-2:]) != (LENGTH, LENGTH):  # a mask
            storage = tensor.untyped_storage()
            found.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    x = torch.randn(ROWS, LENGTH, shape.dim, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, context)
    return sum(found.values()) / (ROWS * LENGTH * dtype.itemsize)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_compiled_block_keeps(shape, kind):
    measured = kept(SHAPES[shape], kind, torch.bfloat16, "aot_eager_decomp_partition")
    assert kept_elements(SHAPES[shape], kind) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_compiled_block_keeps_in_native_float8(kind):
    measured = kept(SHAPE, kind, torch.bfloat16, "aot_eager_decomp_partition", native=True)
    expected = kept_elements(SHAPE, kind) - native_savings(SHAPE, kind, NATIVE, 2)
    assert expected == pytest.approx(measured, rel=0.05)


def test_what_reads_a_norms_result_beside_linear_layers_keeps_it_beside_float8(monkeypatch):
    alone = native_savings(SHAPE, "swa", NATIVE, 2)
    monkeypatch.setattr(SlidingWindowAttention, "linear_input", False)
    # In 16 bits, and in 8 for the linear layer, instead of in 8 for all that read it.
    assert alone - native_savings(SHAPE, "swa", NATIVE, 2) == SHAPE.dim
    assert not has_operators(SHAPE, "swa", NATIVE)


def _has(block: torch.nn.Module, name: str) -> bool:
    return any(each == name for each, _ in block.named_modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", EAGER_FACTOR)
def test_what_an_eager_block_keeps(dtype, kind):
    measured = kept(SHAPE, kind, getattr(torch, dtype), None)
    assert kept_elements(SHAPE, kind) * EAGER_FACTOR[dtype] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", EAGER_FACTOR)
def test_what_an_eager_block_keeps_in_native_float8(dtype, kind):
    dtype = getattr(torch, dtype)
    measured = kept(SHAPE, kind, dtype, None, native=True)
    assert has_operators(SHAPE, kind, NATIVE)
    assert not has_operators(dataclasses.replace(SHAPE, norm="dynamic_tanh"), kind, NATIVE)
    expected = kept_elements(SHAPE, kind) - native_savings(SHAPE, kind, NATIVE, dtype.itemsize)
    assert expected == pytest.approx(measured, rel=0.1)


MODES = {
    "none": (ActivationCheckpoint(), 0.2),
    "operators": (ActivationCheckpoint(mode="selective"), 0.1),
    "blocks": (ActivationCheckpoint(mode="selective", selective="blocks", every_n_blocks=3), 0.2),
    "full": (ActivationCheckpoint(mode="full"), 0.02),
    "attention": (ActivationCheckpoint(mode="full", modules="attention"), 0.15),
    "feed_forward": (ActivationCheckpoint(mode="full", modules="feed_forward"), 0.2),
    "both": (ActivationCheckpoint(mode="full", modules="both"), 0.02),
    "operators of both": (ActivationCheckpoint(mode="selective", modules="both"), 0.1),
    "attention of one": (
        ActivationCheckpoint(mode="selective", selective="blocks", every_n_blocks=3, modules="attention"),
        0.2,
    ),
}


@pytest.mark.parametrize("recipe", ["off", "native"])
@pytest.mark.parametrize("mode", MODES)
def test_what_checkpointed_blocks_keep(mode, recipe):
    settings, tolerance = MODES[mode]
    float8 = Float8() if recipe == "off" else Float8(recipe=recipe, linear_layers="all")

    def held(layers: int) -> int:
        model = small_model(torch.float32, num_layers=layers)
        convert_to_float8(model, float8, torch.device("cpu"))
        save_transposed_weights(model, False)
        apply_activation_checkpointing(model, settings)
        tokens = torch.randint(0, 50, (ROWS, 64))
        with Witness() as witness:
            loss = model(tokens, tokens)
        assert loss.requires_grad
        # Views of weights are made, too: their memory is the weights'.
        return witness.held() - sum(weight.nbytes for weight in model.blocks.parameters())

    config = Config(
        model=small_model().config,
        training=Training(seq_len=64, compute_dtype="float32"),
        compile=Compile(enabled=False),
        activation_checkpoint=settings,
        float8=float8,
    )
    cycle = ROWS * block_bytes(config, Degrees(), range(3))
    assert cycle == pytest.approx(held(6) - held(3), rel=tolerance)
    again = recomputed_bytes(config, Degrees(), range(3))
    assert (again > 0) == (mode != "none")


@pytest.mark.parametrize("rows, length, context", [(16, 2048, 1), (1, 32768, 1), (1, 262144, 1), (2, 131072, 2)])
def test_what_selective_attention_keeps_beside_what_any_attention_does(rows, length, context):
    settings = {"none": ActivationCheckpoint(), **{mode: MODES[mode][0] for mode in ("operators", "full")}}

    def planned(count: Callable[..., int], mode: str, selective: bool) -> int:
        config = Config(
            model=dataclasses.replace(SHAPE, max_seq_len=length, mla_selective=selective),
            training=Training(seq_len=length),
            activation_checkpoint=settings[mode],
        )
        assert config.model.block_kinds[2] == "mla"
        return rows * count(config, Degrees(context=context), [2], rows)

    saved: list[int] = []  # bytes, by an operator whose tensors have no memory
    starts = list(SequenceLayout(length, context, 0).starts) if context > 1 else [0]
    query = torch.empty(rows, length // context, 4, 48, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key, value = (torch.empty(rows, length, 4, 48, dtype=torch.bfloat16, device="meta") for _ in range(2))
    bounds = torch.empty(1, length, dtype=torch.int32, device="meta")
    before = torch.empty(rows, len(starts), length, device="meta")

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float32 and tensor.shape != (rows, 4, length // context):  # lse, which any saves
            saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.ops.swamla_titan.selective_attention(
            *(query, key, value, None, None, before, bounds, bounds, starts, 0, 1.0)
        )
    (sums,) = saved
    assert sums <= len(starts) * 256 * rows * length
    for count, mode, expected in (
        (block_bytes, "none", sums),
        (block_bytes, "operators", sums),
        (block_bytes, "full", 0),
        (recomputed_bytes, "full", sums),
    ):
        found = planned(count, mode, selective=True) - planned(count, mode, selective=False)
        assert found == expected, (count, mode)


@pytest.mark.parametrize("d_mem", [128, 512])
def test_what_a_checkpointed_annex_keeps(d_mem):
    settings = ActivationCheckpoint(mode="full")

    def held(engram: EngramConfig) -> tuple[int, int]:
        model = SWAMLAModel(dataclasses.replace(small_model().config, engram=engram))
        apply_activation_checkpointing(model, settings)
        tokens = torch.randint(0, 50, (ROWS, 64))
        with Witness() as witness:
            loss = model(tokens, tokens)
        assert loss.requires_grad
        config = Config(
            model=model.config,
            training=Training(seq_len=64, compute_dtype="float32"),
            compile=Compile(enabled=False),
            activation_checkpoint=settings,
        )
        weights = sum(weight.nbytes for weight in (*model.blocks.parameters(), *model.annexes.parameters()))
        return witness.held() - weights, ROWS * block_bytes(config, Degrees(), range(3))

    (without, planned), (beside, more) = held(EngramConfig()), held(EngramConfig((1,), d_mem=d_mem, table_size=31))
    assert more - planned == pytest.approx(beside - without, rel=0.1)


def test_a_memory_budget_lies_between_all_and_the_inputs():
    def estimate(budget: float) -> int:
        settings = ActivationCheckpoint(memory_budget=budget)
        return block_bytes(Config(model=SHAPE, activation_checkpoint=settings), Degrees(), range(3))

    inputs = 3 * 2048 * SHAPE.dim * 2
    assert estimate(0.0) == inputs
    assert estimate(0.5) == pytest.approx((inputs + estimate(1.0)) / 2)


def test_ranks_share_what_they_share():
    for kind in KINDS:
        whole = kept_elements(SHAPE, kind)
        assert whole / 4 < kept_elements(SHAPE, kind, tensor=4) < whole / 1.5
        assert whole / 4 <= kept_elements(SHAPE, kind, context=4) < whole
    assert kept_elements(SHAPE, "swa", context=4) == kept_elements(SHAPE, "swa") / 4
