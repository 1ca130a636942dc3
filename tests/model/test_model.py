"""SWAMLAModel: what it accepts, its loss, its documents, its first values, its graphs."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swamla_titan.kernels.attention.dispatch import ATTENTION_BACKENDS, FLEX
from swamla_titan.model import FLAVORS, Block, ModelConfig, SWAMLAModel
from swamla_titan.model.blocks import BLOCKS, FeedForward, attention_kinds
from swamla_titan.model.branch import SequenceContext
from swamla_titan.model.init import initial_value
from swamla_titan.model.layers import Linear
from tests.model.tiny import ALL_MLA, ALL_SWA, TINY, build, random_tokens


def test_pattern_of_blocks_and_names():
    model = build(num_layers=5)
    assert list(model.blocks) == ["0", "1", "2", "3", "4"]
    kinds = [type(block.attention) for block in model.blocks.values()]
    assert kinds == [BLOCKS[kind] for kind in ("swa", "swa", "mla", "swa", "swa")]
    assert isinstance(model.head, nn.Linear)
    assert isinstance(model.embedding, nn.Embedding)


def test_state_holds_parameters_only():
    model = build()
    model(random_tokens(1, 20), document_ids=random_tokens(1, 20))
    names = dict(model.named_parameters(remove_duplicate=False))
    assert set(model.state_dict()) == set(names)
    assert not list(model.buffers())


def test_logits_have_the_real_vocabulary_and_are_causal():
    model = build()
    tokens = random_tokens(2, 20)
    logits = model(tokens)
    assert logits.shape == (2, 20, 50)
    changed = tokens.clone()
    changed[:, 11] = (changed[:, 11] + 1) % 50
    moved = (model(changed) - logits).abs().amax(dim=(0, 2))
    assert (moved[:11] == 0).all()
    assert (moved[11:] > 1e-9).all()


@pytest.mark.parametrize("kind", [{}, ALL_SWA, ALL_MLA])
def test_reference_backend_equals_the_fast_one(kind):
    model = build(**kind)
    tokens, ids = random_tokens(2, 30), (torch.rand(2, 30) < 0.1).cumsum(dim=1)
    fast = model(tokens, document_ids=ids)
    for backend in ("sdpa", "reference"):
        model.attention_backend = backend
        torch.testing.assert_close(model(tokens, document_ids=ids), fast, rtol=1e-10, atol=1e-10)
    model.attention_backend = "fast"
    with pytest.raises(ValueError, match="'fast': expected one of " + ", ".join(ATTENTION_BACKENDS)):
        model(tokens)


@pytest.mark.parametrize("kind", [{}, ALL_SWA, ALL_MLA])
def test_packed_documents_equal_each_document_alone(kind):
    model = build(**kind)
    lengths = [9, 1, 15, 5]
    documents = [random_tokens(1, length) for length in lengths]
    ids = torch.repeat_interleave(torch.tensor([7, 3, 7, 0]), torch.tensor(lengths))[None]  # 7 comes twice
    packed = model(torch.cat(documents, dim=1), document_ids=ids)
    alone = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "tokens, options, message",
    [
        (random_tokens(5), {}, "expected .batch, length. of torch.int64"),
        (random_tokens(1, 5).int(), {}, "torch.int32"),
        (random_tokens(1, 65), {}, "max_seq_len = 64: cut them, or build the model"),
        (random_tokens(1, 5), {"targets": random_tokens(1, 4)}, "targets"),
        (random_tokens(1, 5), {"targets": random_tokens(1, 5).int()}, "targets"),
        (random_tokens(1, 5), {"document_ids": random_tokens(5)}, "document_ids"),
    ],
)
def test_wrong_input_is_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        build()(tokens, **options)


def test_unknown_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        SWAMLAModel(ModelConfig(vocab_size=0))


def test_loss_is_the_mean_over_valid_targets():
    model = build(z_loss=0.1, label_smoothing=0.1)
    tokens, targets = random_tokens(2, 10), random_tokens(2, 10)
    targets[0, 3:7] = -100
    logits = model(tokens)
    # Evaluation is the plain cross-entropy.
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets), plain)
    model.train()
    smooth = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    z = logits.logsumexp(dim=-1)[targets != -100].square().mean()
    torch.testing.assert_close(model(tokens, targets), smooth + 0.1 * z)
    assert model(tokens, torch.full_like(targets, -100)).item() == 0.0


def test_replaced_loss_function_is_used():
    class Six(nn.Module):
        def forward(self, logits, targets, vocab_size, *, z_loss, label_smoothing):
            return logits.new_tensor(6.0)

    model = build()
    model.loss_head.cross_entropy = Six()
    assert model(random_tokens(1, 4), random_tokens(1, 4), loss_denominator=2).item() == 3.0


@pytest.mark.parametrize("changes", [{}, {"z_loss": 0.01, "label_smoothing": 0.1, "tie_embeddings": False}])
def test_accumulated_micro_batches_equal_the_global_batch(changes):
    model = build(**changes).train()
    tokens, targets = random_tokens(4, 12), random_tokens(4, 12)
    targets[0, 2:] = -100  # valid counts differ
    targets[2] = -100  # one micro-batch has nothing to learn from
    whole = model(tokens, targets)
    whole.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    count = (targets != -100).sum()
    losses = []
    for row in range(4):
        loss = model(tokens[row : row + 1], targets[row : row + 1], loss_denominator=count)
        loss.backward()
        losses.append(loss.item())
    assert losses[2] == 0.0
    assert sum(losses) == pytest.approx(whole.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_empty_micro_batch_has_zero_gradients():
    model = build().train()
    model(random_tokens(1, 8), torch.full((1, 8), -100), loss_denominator=17).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_bfloat16_activations_over_float32_weights():
    model = build(torch.float32)
    exact = model(random_tokens(1, 20) * 0 + torch.arange(20))
    model.compute_dtype = torch.bfloat16
    seen = []
    for module in model.modules():
        if isinstance(module, (Linear, Block)):
            module.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    logits = model(torch.arange(20)[None])
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert (logits - exact).norm() / exact.norm() < 0.05
    model.train()(torch.arange(20)[None], torch.arange(20)[None]).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_dropout_acts_in_training_only():
    model = build(dropout=0.5)
    tokens = random_tokens(1, 8)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.allclose(model(tokens), model(tokens))


@pytest.mark.parametrize("branch", ["attention", "feed_forward"])
@pytest.mark.parametrize("kind", [ALL_SWA, ALL_MLA])
def test_dropout_acts_on_each_branch_by_itself(kind, branch):
    """With the other branch writing zeros, what a block adds is the branch's output, dropped or doubled."""
    model = build(dropout=0.5, num_layers=1, **kind)
    block = model.blocks["0"]
    with torch.no_grad():
        (block.feed_forward.down if branch == "attention" else block.attention.wo).weight.zero_()
    x, context = torch.randn(1, 60, 32, dtype=torch.float64), model.context(60)
    whole = block.eval()(x, context) - x
    dropped = block.train()(x, context) - x
    zero = dropped == 0
    assert 0.4 < zero.double().mean() < 0.6
    torch.testing.assert_close(dropped, torch.where(zero, 0.0, 2 * whole))


def test_grouped_gate_up_is_swiglu():
    layer = FeedForward(ModelConfig(dim=64, num_heads=4, ffn_hidden_dim=256)).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(3, 64, dtype=torch.float64)
    gate, up = layer.gate_up.spec.split(layer.gate_up.weight)
    torch.testing.assert_close(layer(x), (F.silu(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T)
    # Half of gate_up's rows with half of down's columns is half of the hidden units: what tensor parallelism does.
    halves = []
    for rank in range(2):
        part = copy.deepcopy(layer)
        part.gate_up.weight = nn.Parameter(layer.gate_up.weight.chunk(2, dim=0)[rank])
        part.down.weight = nn.Parameter(layer.down.weight.chunk(2, dim=1)[rank])
        halves.append(part(x))
    torch.testing.assert_close(halves[0] + halves[1], layer(x))


def test_rows_of_the_attention_products_split_by_heads():
    model = build(num_kv_heads=2)
    context = model.context(10)
    x = torch.randn(1, 10, 32, dtype=torch.float64)
    for name, rows in (("0", ["wqkv"]), ("2", ["wq", "wkv_b"])):
        whole, own = model.blocks[name].attention, context[model.blocks[name].kind]
        parts = []
        for rank in range(2):
            part = copy.deepcopy(whole)
            for row in rows:
                weight = getattr(whole, row).weight
                getattr(part, row).weight = nn.Parameter(weight.chunk(2, dim=0)[rank])
            part.wo.weight = nn.Parameter(whole.wo.weight.chunk(2, dim=1)[rank])
            parts.append(part(x, own))
        torch.testing.assert_close(parts[0] + parts[1], whole(x, own))


class TestFirstValues:
    def test_statistics(self):
        model = SWAMLAModel(ModelConfig(num_layers=4, dim=256, num_heads=4, vocab_size=1000, norm="dynamic_tanh"))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                value = 0.5 if "alpha" in name else 0.0 if "bias" in name else 1.0
                assert (parameter == value).all(), name
            else:
                std = 0.02 / 8**0.5 if name.endswith(("wo.weight", "down.weight")) else 0.02
                assert parameter.std().item() == pytest.approx(std, rel=0.03), name
                assert abs(parameter.mean().item()) < 5 * std / parameter.numel() ** 0.5, name

    def test_a_function_of_seed_and_name(self):
        first, second = SWAMLAModel(TINY), SWAMLAModel(TINY)
        torch.manual_seed(99)
        second.init_weights(0)
        for (name, a), b in zip(first.named_parameters(), second.parameters()):
            assert torch.equal(a, b), name
        second.init_weights(1)
        assert not torch.equal(first.embedding.weight, second.embedding.weight)
        matrices = [p for p in first.parameters() if p.dim() == 2]
        assert len({p.flatten()[0].item() for p in matrices}) == len(matrices)

    def test_from_the_meta_device_and_with_layers_missing(self):
        whole = SWAMLAModel(TINY)
        with torch.device("meta"):
            part = SWAMLAModel(TINY)
        del part.blocks["0"], part.blocks["1"]
        part.to_empty(device="cpu")
        part.init_weights(0)
        values = dict(whole.named_parameters())
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, values[name]), name
        assert part.head.weight is part.embedding.weight

    @pytest.mark.parametrize("tied", [True, False])
    def test_each_weight_is_drawn_once(self, tied, monkeypatch):
        drawn = []

        def recorded(name, *args):
            drawn.append(name)
            return initial_value(name, *args)

        def refused(*args, **keys):
            raise AssertionError("torch's own first values are drawn")

        for name in ("kaiming_uniform_", "uniform_", "normal_"):
            monkeypatch.setattr(nn.init, name, refused)
        monkeypatch.setattr("swamla_titan.model.init.initial_value", recorded)
        state = torch.get_rng_state()
        config = replace(TINY, tie_embeddings=tied, q_lora_rank=14, qk_norm=True)
        model = SWAMLAModel(config)
        assert sorted(drawn) == sorted(name for name, _ in model.named_parameters())
        with torch.device("meta"):
            empty = SWAMLAModel(config)
        assert len(drawn) == len(list(model.parameters()))
        assert all(parameter.is_meta for parameter in empty.parameters())
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_last_stage_without_the_embedding_has_the_whole_models_head(self, tied):
        config = replace(TINY, tie_embeddings=tied)
        whole = SWAMLAModel(config)
        with torch.device("meta"):
            part = SWAMLAModel(config)
        del part.embedding, part.blocks["0"]
        part.to_empty(device="cpu")
        part.init_weights(0)
        values = dict(whole.named_parameters(remove_duplicate=False))
        assert "head.weight" in dict(part.named_parameters())
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, values[name]), name
        assert torch.equal(whole.head.weight, whole.embedding.weight) == tied

    def test_wrapped_blocks_keep_their_values(self):
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        plain, wrapped = SWAMLAModel(TINY), SWAMLAModel(TINY)
        wrapped.blocks["1"] = checkpoint_wrapper(wrapped.blocks["1"])
        for model in (plain, wrapped):
            model.init_weights(5)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters()))


def test_tied_head_is_the_embedding():
    tied, untied = build(), build(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    copied = copy.deepcopy(tied)
    assert copied.head.weight is copied.embedding.weight


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_loading_keeps_the_tie(tied, assign):
    source = build(tie_embeddings=tied)
    with torch.device("meta" if assign else "cpu"):
        plain = SWAMLAModel(source.config)
    for model in (plain, copy.deepcopy(plain)):
        model.double().load_state_dict(
            {name: value.clone() for name, value in source.state_dict().items()}, assign=assign
        )
        assert (model.head.weight is model.embedding.weight) == tied
        assert len(list(model.parameters())) == len(list(source.parameters()))
        tokens = random_tokens(1, 8)
        assert torch.equal(model.eval()(tokens), source(tokens))


@pytest.mark.parametrize("documents", [False, True])
def test_compiled_blocks_are_one_graph_and_equal(documents):
    torch._dynamo.reset()
    model = build(num_layers=6)
    tokens, targets = random_tokens(2, 24), random_tokens(2, 24)
    ids = (torch.rand(2, 24) < 0.1).cumsum(dim=1) if documents else None
    expected = model(tokens, targets, ids)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    torch._dynamo.utils.counters.clear()
    for block in model.blocks.values():
        block.compile(backend="aot_eager", fullgraph=True)
    loss = model(tokens, targets, ids)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), gradients):
        torch.testing.assert_close(a, b)
    model(tokens, targets, None if ids is None else ids.flip(1))  # another mask of the same kind
    # One graph for each kind of block, not one for each layer or mask.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_block_takes_a_block_mask_in_a_compiled_graph():
    """What runs on a GPU, as far as a CPU can run it: tracing with flex, without its kernel."""
    from swamla_titan.kernels.attention.masks import block_mask, document_starts

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(num_layers=2, swa_layers_per_cycle=1).requires_grad_(False)
    compiled = {name: torch.compile(block, backend="eager", fullgraph=True) for name, block in model.blocks.items()}
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    for step in range(3):  # new documents each time
        # Both kinds share Block.forward: the second is compiled again in the first step.
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            ids = (torch.rand(2, 40) < 0.1).cumsum(dim=1)
            plain, starts = model.context(40, ids), document_starts(ids)
            kinds = attention_kinds(model.config).items()
            masks = {kind: block_mask(starts, *attention.mask(model.config)) for kind, attention in kinds}
            flex = SequenceContext(
                {kind: replace(plain[kind], mask=mask, implementation=FLEX) for kind, mask in masks.items()}
            )
            for name, block in model.blocks.items():
                torch.testing.assert_close(compiled[name](x, flex), block(x, plain))
        # One graph for each kind of block, all of them in the first step.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(compiled)


def test_debug_flavor_learns():
    """Two sequences of random tokens by heart.

    Whoever knows only how often each token comes has their entropy as loss, 4.0 here. After 20 steps this model is at
    0.5 to 1.0, by the random numbers that it begins with, which differ between processors: half the entropy is far from
    either.
    """
    model = SWAMLAModel(FLAVORS["debug"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(0, 257, (2, 33))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    losses = []
    for _ in range(20):
        loss = model(inputs, targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    share = targets.unique(return_counts=True)[1] / targets.numel()
    # At first the logits have a variance of a few hundredths: all tokens are about as likely.
    assert losses[0] == pytest.approx(math.log(257), rel=0.1)
    assert losses[-1] < 0.5 * -(share * share.log()).sum()
