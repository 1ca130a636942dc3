"""Tensor parallelism against the same model on one process: values and gradients, eager, compiled, under FSDP2."""

import copy
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes import micro_pipeline_tp
from torch.distributed import _symmetric_memory
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from swamla_titan.config.sections import Float8, Parallel
from swamla_titan.distributed.collectives import TensorGroup, all_gather_last_axis
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.kernels.cross_entropy import cross_entropy
from swamla_titan.launch.process_group import init_distributed
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.parallel.data_parallel import all_reduce_replicated_grads
from swamla_titan.parallel.tensor import (
    VocabularyParallelCrossEntropy,
    apply_tensor_parallel,
    enable_async_tensor_parallel,
)
from tests.distributed.ranks import on_ranks

T = 24
EVERYTHING = {"tie_embeddings": False, "q_lora_rank": 14, "qk_norm": True, "z_loss": 0.01, "label_smoothing": 0.1}
CASES = [
    {},
    EVERYTHING | {"mla_selective": True, "selection_head": 3},  # of the second rank
    {"norm": "dynamic_tanh", "q_lora_rank": 10},
]


def config(tensor: int, **changes) -> ModelConfig:
    """Every size distinct; two query heads per rank, one group of each kind per rank."""
    shape = {
        "num_layers": 3,
        "dim": 16 * tensor,
        "num_heads": 2 * tensor,
        "num_kv_heads": tensor if "q_lora_rank" in changes else 0,
        "vocab_size": 300,
        "max_seq_len": 64,
        "ffn_hidden_dim": 128 * tensor,
        "swa_window": 6,
        "swa_sink_size": 3,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 9,
    }
    return ModelConfig(**(shape | changes))


def pair(world: World, dtype: torch.dtype, **changes) -> tuple[SWAMLAModel, SWAMLAModel]:
    """One process's model and this rank's part of the same."""
    torch.manual_seed(0)
    whole = SWAMLAModel(config(world.degrees.tensor, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in whole.parameters():
            # Matrices large enough for each part to matter in the output, and no two norm weights alike.
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.2 * torch.randn_like(parameter))
    part = copy.deepcopy(whole)
    apply_tensor_parallel(part, world.weights["tensor"])
    return whole, part


def batch(seed: int = 1, documents: bool = True):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 300, (2, T), generator=generator)
    targets = torch.randint(0, 300, (2, T), generator=generator)
    targets[0, 3:9] = -100
    ids = torch.tensor([[0] * 11 + [1] * 13, [0] * 24]) if documents else None
    return tokens, targets, ids


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    scale = expected.abs().max().item()
    assert scale > 0, f"{what}: nothing to compare"
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * scale, msg=lambda m: f"{what}: {m}")


def same_gradients(part: nn.Module, whole: nn.Module, tolerance: float) -> None:
    expected = dict(whole.named_parameters())
    ours = {name.replace("_orig_mod.", ""): parameter for name, parameter in part.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, parameter in ours.items():
        close(parameter.grad.full_tensor(), expected[name].grad, tolerance, name)


def reduce(model: nn.Module, world: World) -> None:
    all_reduce_replicated_grads(model.parameters(), world)


def _model(size: int, cases: list[dict]) -> None:
    world = init_distributed(Parallel(tensor=size))
    for changes in cases:
        whole, part = pair(world, torch.float64, **changes)
        for micro_batch in (1, 2):  # gradients accumulate before they are reduced
            tokens, targets, ids = batch(micro_batch, documents=micro_batch == 1)
            losses = [model(tokens, targets, ids, loss_denominator=50.0) for model in (whole, part)]
            close(losses[1], losses[0], 1e-12, "loss")
            for loss in losses:
                loss.backward()
        reduce(part, world)
        same_gradients(part, whole, 1e-12)
        tokens, targets, ids = batch(3)
        with torch.no_grad():
            close(part(tokens, None, ids), whole(tokens, None, ids), 1e-12, "logits")
            whole.eval(), part.eval()
            close(part(tokens, targets, ids), whole(tokens, targets, ids), 1e-12, "loss in evaluation")


@pytest.mark.parametrize(
    "size, cases",
    [
        (2, CASES),
        (3, CASES[1:2]),
        (4, CASES[2:]),
        pytest.param(3, CASES, marks=pytest.mark.slow),
        pytest.param(4, CASES, marks=pytest.mark.slow),
    ],
)
def test_loss_logits_and_gradients_equal_one_process(size, cases):
    on_ranks(size, _model, size, cases)


def _without_reduction() -> list[str]:
    world = init_distributed(Parallel(tensor=2))
    whole, part = pair(world, torch.float64, **EVERYTHING)
    tokens, targets, _ = batch()
    for model in (whole, part):
        model(tokens, targets).backward()
    expected = dict(whole.named_parameters())
    summands = {n for n, p in part.named_parameters() if not torch.allclose(p.grad.full_tensor(), expected[n].grad)}
    replicated = {name for name, p in part.named_parameters() if p.placements == (Replicate(),)}
    assert summands == replicated  # sharded ones are right without it; it is needed for all others

    messages = []
    plain = dist.all_reduce
    dist.all_reduce = lambda *a, **k: (messages.append(1), plain(*a, **k))
    reduce(part, world)
    dist.all_reduce = plain
    same_gradients(part, whole, 1e-12)
    assert len(messages) == 1
    return sorted(replicated)


def test_replicated_gradients_are_summed_in_one_message():
    replicated = on_ranks(2, _without_reduction)[0]
    assert {"norm.weight", "blocks.0.attention.k_norm.weight", "blocks.2.attention.kv_norm.weight"} <= {*replicated}
    assert {"blocks.2.attention.wkv_a.weight", "blocks.2.attention.wq_a.weight"} <= {*replicated}


def _shards() -> None:
    world = init_distributed(Parallel(tensor=4))
    mesh = world.weights["tensor"]
    with torch.device("meta"):
        model = SWAMLAModel(config(4, q_lora_rank=14, qk_norm=True))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    before = dist.distributed_c10d._get_default_group()._get_sequence_number_for_group()
    apply_tensor_parallel(model, mesh)
    assert dist.distributed_c10d._get_default_group()._get_sequence_number_for_group() == before
    assert model.device.type == "meta"
    model.to_empty(device="cpu")
    assert model.head.weight is model.embedding.weight
    assert (model.device, model.activation_dtype) == (torch.device("cpu"), torch.float32)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.shape == shapes[name]
        local = parameter.to_local()
        assert local.is_contiguous()
        matrix, own = parameter.dim() == 2, name.split(".")[-2]
        sharded = matrix and own not in ("wkv_a", "wq_a")
        assert local.numel() * (4 if sharded else 1) == parameter.numel(), name
        if sharded:
            assert parameter.placements == ((Shard(1),) if own in ("wo", "down") else (Shard(0),)), name


def test_a_rank_holds_its_share_of_each_matrix_also_when_built_on_the_meta_device():
    on_ranks(4, _shards)


TWO_LAYERS = {"num_layers": 2, "swa_layers_per_cycle": 1}  # one of each kind: compiling them is what takes time


def _compiled() -> None:
    world = init_distributed(Parallel(tensor=2))
    # Not float64: torch 2.11's compiled attention on the CPU takes its statistics for float32 in the backward pass.
    whole, part = pair(world, torch.float32, **EVERYTHING, **TWO_LAYERS)
    graphs: list[torch.fx.Graph] = []
    with torch._inductor.config.patch(post_grad_custom_post_pass=_Graphs(graphs)):
        for block in part.blocks.values():
            block.compile(fullgraph=True, dynamic=False)
        part.loss_head.cross_entropy.compile(fullgraph=True, dynamic=False)
        tokens, targets, ids = batch()
        losses = [model(tokens, targets, ids) for model in (whole, part)]
        close(losses[1], losses[0], 1e-5, "loss")
        for loss in losses:
            loss.backward()
    reduce(part, world)
    same_gradients(part, whole, 1e-5)
    _overlappable(graphs)


class _Graphs(CustomGraphPass):
    """Keeps what the asynchronous pass would see: it runs just before this one."""

    def __init__(self, graphs: list[torch.fx.Graph]) -> None:
        self.graphs = graphs

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs.append(copy.deepcopy(graph))

    def uuid(self) -> object:
        return os.urandom(8)  # never from the cache: the graphs are what is wanted


def _overlappable(graphs: list[torch.fx.Graph]) -> None:
    """Each gather that feeds a product, and each product that feeds a scatter-sum, is of a form that can be fused."""
    fused = []
    for graph in graphs:
        gathers = micro_pipeline_tp.find_all_gather_patterns(graph)
        scatters = micro_pipeline_tp.find_reduce_scatter_patterns(graph)
        assert len(gathers) == sum("all_gather_into" in str(node.target) for node in graph.nodes)
        assert len(scatters) == sum("reduce_scatter" in str(node.target) for node in graph.nodes)
        fused.append(
            (
                sum(bool(micro_pipeline_tp._find_consumer_matmuls(match.res_node)) for match in gathers),
                sum(micro_pipeline_tp._find_producer_matmul(match.input_node) is not None for match in scatters),
            )
        )
    # Forward, SWA: wqkv and gate_up, wo and down. MLA: gate_up alone (wq_a and wkv_a gather their results).
    # Backward: the gradients of wo and down are gathered for products, those of wqkv and gate_up are products.
    expected = [(0, 0), (0, 0), (2, 2), (2, 2), (1, 2), (2, 1)]
    assert sorted(fused) == sorted(expected), fused
    if dist.is_nccl_available():  # else the pass does nothing; a build of torch for CPUs has none
        with _symmetric_memory._test_mode():
            for graph in graphs:
                micro_pipeline_tp.micro_pipeline_tp_pass(graph)
        names = [[str(node.target) for node in graph.nodes] for graph in graphs]
        made = [
            (sum("fused_all_gather" in n for n in one), sum("fused_matmul_reduce" in n for n in one)) for one in names
        ]
        assert made == fused


@pytest.mark.slow
def test_compiled_blocks_and_loss_equal_one_process_and_can_overlap():
    on_ranks(2, _compiled)


def _fsdp(compiled: bool) -> None:
    world = init_distributed(Parallel(dp_shard=2, tensor=2))
    whole, part = pair(world, torch.float32, **EVERYTHING, **TWO_LAYERS)
    if compiled:
        for block in part.blocks.values():
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")  # inductor itself is tested above, slowly
    for module in (*part.blocks.values(), part):
        fully_shard(module, mesh=world.weights["shard"])
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # a factor is multiplied in on the way, which gloo cannot do
    for seed in (1, 2):
        tokens, targets, ids = batch(seed)
        whole(tokens, targets, ids, loss_denominator=90.0).backward()
    tokens, targets, ids = batch(1 + world.data_rank)
    part(tokens, targets, ids, loss_denominator=90.0).backward()
    reduce(part, world)
    for parameter in part.parameters():
        assert parameter.device_mesh.mesh_dim_names == ("shard", "tensor")
    same_gradients(part, whole, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_fsdp2_over_tensor_parallel_equals_one_process(compiled):
    on_ranks(4, _fsdp, compiled)


def _loss(size: int, vocab_size: int, padded: int, compiled: bool) -> None:
    world = init_distributed(Parallel(tensor=size))
    group = TensorGroup.of(world.weights["tensor"])
    shared = VocabularyParallelCrossEntropy(group)
    if compiled:
        shared = torch.compile(shared, fullgraph=True, dynamic=False)
    torch.manual_seed(0)
    targets = torch.randint(0, vocab_size, (12,))
    targets[[1, 4, 5]] = -100
    targets[0] = vocab_size - 1
    for options in ({"z_loss": 0.1, "label_smoothing": 0.2}, {}, {"label_smoothing": 0.1})[: 1 if compiled else 3]:
        logits = (3 * torch.randn(12, padded, dtype=torch.float64)).requires_grad_()
        with torch.no_grad():
            logits[:, vocab_size:] = 1e4  # padding, which must not matter
            logits[2] += 2000.0  # overflows without the maximum taken away
        mine = logits.detach().chunk(size, dim=1)[group.rank].clone().requires_grad_()
        expected = cross_entropy(logits, targets, vocab_size, **options)
        ours = shared(mine, targets, vocab_size, **options)
        close(ours, expected, 1e-12, "loss")
        (gradient,) = torch.autograd.grad(expected, logits)
        (own,) = torch.autograd.grad(ours * 3.0, mine)
        torch.testing.assert_close(own, 3.0 * gradient.chunk(size, dim=1)[group.rank], rtol=1e-12, atol=1e-12)
        if not compiled:
            narrow = shared(mine.detach().to(torch.bfloat16), targets, vocab_size, **options)
            assert narrow.dtype == torch.float32


@pytest.mark.parametrize("size, vocab_size, padded", [(2, 300, 384), (3, 300, 384), (4, 130, 256), (2, 128, 128)])
def test_vocabulary_parallel_loss_equals_the_plain_one(size, vocab_size, padded):
    on_ranks(size, _loss, size, vocab_size, padded, False)


@pytest.mark.slow
def test_vocabulary_parallel_loss_compiles():
    on_ranks(2, _loss, 2, 100, 256, True)


def _gathered_logits() -> None:
    world = init_distributed(Parallel(tensor=3))
    group = TensorGroup.of(world.weights["tensor"])
    whole = torch.arange(24.0).view(2, 12).requires_grad_()
    mine = whole.detach().chunk(3, dim=1)[group.rank].clone().requires_grad_()
    gathered = all_gather_last_axis(mine, group)
    assert torch.equal(gathered, whole)
    gathered.square().sum().backward()
    assert torch.equal(mine.grad, 2 * mine)


def test_logits_are_gathered_with_their_gradient():
    on_ranks(3, _gathered_logits)


def _float8(recipe: str) -> None:
    from torchao.float8.float8_linear import Float8Linear

    from swamla_titan.quantization.float8 import convert_to_float8
    from swamla_titan.quantization.native import NativeLinear

    world = init_distributed(Parallel(tensor=2))
    torch.manual_seed(0)
    exact = SWAMLAModel(config(2, dim=64, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16))
    whole = copy.deepcopy(exact)
    convert_to_float8(whole, Float8(recipe=recipe, linear_layers="all"), torch.device("cpu"))
    part = copy.deepcopy(whole)
    apply_tensor_parallel(part, world.weights["tensor"])
    for block in part.blocks.values():
        converted = Float8Linear if recipe != "native" else NativeLinear
        assert all(isinstance(m, converted) for m in block.modules() if isinstance(m, nn.Linear))
    tokens, targets, ids = batch()
    logits = [model(tokens, None, ids) for model in (exact, whole, part)]
    noise = (logits[1] - logits[0]).norm()
    assert noise > 1e-3 * logits[0].norm(), "nothing was computed in float8"
    assert (logits[2] - logits[1]).norm() < 2 * noise
    for model in (exact, whole, part):
        model(tokens, targets, ids).backward()
    reduce(part, world)
    for (name, ours), one, true in zip(part.named_parameters(), whole.parameters(), exact.parameters()):
        noise = (one.grad - true.grad).norm()
        assert (ours.grad.full_tensor() - one.grad).norm() < 2 * noise + 1e-6 * true.grad.norm(), name


@pytest.mark.parametrize("recipe", ["tensorwise", "native", pytest.param("rowwise", marks=pytest.mark.slow)])
def test_float8_is_as_close_to_one_process_as_float8_is_to_float32(recipe):
    on_ranks(2, _float8, recipe)


def _async_tensor() -> None:
    with pytest.raises(UserError, match=r"parallel.async_tensor = true needs GPUs"):
        init_distributed(Parallel(tensor=2, async_tensor=True))
    mesh = init_distributed(Parallel(tensor=2)).weights["tensor"]
    assert not torch._inductor.config._micro_pipeline_tp
    group = mesh.get_group()
    gpus = SimpleNamespace(device_type="cuda", get_group=lambda: group)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_async_tensor_parallel(gpus)
    assert torch._inductor.config._micro_pipeline_tp
    assert _symmetric_memory.is_symm_mem_enabled_for_group(group.group_name)


def test_async_tensor_turns_the_compilers_pass_on_for_the_group():
    on_ranks(2, _async_tensor)


def _refusals() -> None:
    world = init_distributed(Parallel(tensor=2))
    _, part = pair(world, torch.float32)
    with pytest.raises(ValueError, match=r"sequences of 23 tokens.*multiple of 2"):
        part(torch.zeros(1, 23, dtype=torch.int64))
    with pytest.raises(ValueError, match="does not decode"):
        part.prefill(torch.zeros(1, 4, dtype=torch.int64), None)
    with pytest.raises(UserError, match=r"^parallel\.tensor: 2 ranks cannot share the 1 heads or groups .*tensor = 1"):
        apply_tensor_parallel(SWAMLAModel(config(2, num_heads=1)), world.weights["tensor"])
    strange = SWAMLAModel(config(2))
    forward = strange.blocks["0"].feed_forward
    spec, forward.down = forward.down.spec, nn.Linear(256, 32, bias=False)
    forward.down.spec = spec
    unknown = SWAMLAModel(config(2))
    unknown.extra = nn.Linear(4, 4)
    with pytest.raises(TypeError, match="no tensor-parallel form of extra"):
        apply_tensor_parallel(unknown, world.weights["tensor"])
    with pytest.raises(TypeError, match=r"torch\.nn\.modules\.linear\.Linear"):
        apply_tensor_parallel(strange, world.weights["tensor"])


def test_what_cannot_be_shared_is_refused():
    on_ranks(2, _refusals)
