"""Whole blocks compiled on a GPU, against the plain reference in float64. Run with -m gpu."""

import copy

import pytest
import torch

from swamla_titan.config import Config
from swamla_titan.config.sections import Data, Kernels, Training
from swamla_titan.kernels.attention.masks import WindowRule
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.generation import Decoder, generate
from swamla_titan.parallel.kernels import choose_kernels

pytestmark = pytest.mark.gpu


def use_ours(model, documents, loss):
    kernels = Kernels(attention="triton", loss=loss, elementwise="triton")
    training = Training(seq_len=512, compute_dtype=str(model.compute_dtype).removeprefix("torch."))
    config = Config(model=model.config, kernels=kernels, training=training, data=Data(document_mask=documents))
    choose_kernels(model, config, model.device)


def models(compute_dtype, **changes):
    """(model on its fast path with compiled blocks, the same weights in float64 on the reference)."""
    torch._dynamo.reset()
    config = ModelConfig(num_layers=3, dim=384, num_heads=4, vocab_size=1000, swa_window=128, **changes)
    exact = SWAMLAModel(config).cuda()
    with torch.no_grad():
        for parameter in exact.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)
    fast = copy.deepcopy(exact)
    fast.compute_dtype = compute_dtype
    for block in fast.blocks.values():
        block.compile(fullgraph=True, dynamic=False)
    exact.double().attention_backend = "reference"
    return fast, exact


@pytest.mark.parametrize("compute_dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float32, 5e-3)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 2, "qk_norm": True, "q_lora_rank": 128},
        {"mla_selective": True, "selection_head": 3},
    ],
)
@pytest.mark.parametrize("backend", ["auto", "triton", "flex"])
def test_compiled_blocks_equal_the_reference(compute_dtype, tolerance, documents, changes, backend):
    fast, exact = models(compute_dtype, **changes)
    fast.attention_backend = backend
    if fast.config.mla_selective:  # it adds roundings up over queries; another head's selection would be 1 off
        tolerance *= 4
    if backend == "triton":  # all of our kernels
        assert isinstance(fast.context(512)["swa"].mask, WindowRule)
        use_ours(fast, documents, "fused")
    for seq_len in (512, 300):
        tokens = torch.randint(0, 1000, (2, seq_len + 1), device="cuda")
        tokens, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        ids = (torch.rand(2, seq_len, device="cuda") < 0.01).cumsum(dim=1) if documents else None
        fast.zero_grad()
        exact.zero_grad()
        loss, exact_loss = fast(tokens, targets, ids), exact(tokens, targets, ids)
        loss.backward()
        exact_loss.backward()
        assert abs(loss.item() / exact_loss.item() - 1) < tolerance
        for (name, a), b in zip(fast.named_parameters(), exact.parameters()):
            error = ((a.grad.double() - b.grad).norm() / b.grad.norm()).item()
            assert error < 2 * tolerance, f"gradient of {name} at length {seq_len}: {error}"


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("compute_dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float32, 5e-3)])
def test_rows_of_one_token_train_and_generate(compute_dtype, tolerance, backend, documents):
    """Compiled blocks with all of our kernels, and the prompt of one token, against the reference in float64."""
    fast, exact = models(compute_dtype)
    fast.attention_backend = backend
    if backend == "triton":
        use_ours(fast, documents, "plain")
    for batch in (1, 16):
        tokens = torch.randint(0, 1000, (batch, 1), device="cuda")
        ids = torch.arange(batch, device="cuda")[:, None] if documents else None
        fast.zero_grad()
        exact.zero_grad()
        loss, exact_loss = fast(tokens, tokens, ids), exact(tokens, tokens, ids)
        loss.backward()
        exact_loss.backward()
        assert abs(loss.item() / exact_loss.item() - 1) < tolerance
        total = torch.stack([weight.grad.norm() for weight in exact.parameters()]).norm()
        for (name, a), b in zip(fast.named_parameters(), exact.parameters()):
            error = (a.grad.double() - b.grad).norm()  # queries and keys get no gradient
            assert error < 2 * tolerance * b.grad.norm() + 1e-3 * tolerance * total, f"gradient of {name}: {error}"
        with torch.no_grad():
            logits = fast.prefill(tokens, DecodeCache(fast, batch, 4))
            wanted = exact(tokens)[:, -1]
        assert (logits.double() - wanted).norm() < 2 * tolerance * wanted.norm()


@pytest.mark.parametrize("backend", ["auto", "flex"])
def test_new_documents_do_not_compile_anew(backend):
    fast, _ = models(torch.bfloat16)
    fast.attention_backend = backend
    tokens = torch.randint(0, 1000, (2, 512), device="cuda")
    for step in range(4):
        ids = (torch.rand(2, 512, device="cuda") < 0.01).cumsum(dim=1)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            fast(tokens, tokens, ids).backward()


def test_training_after_a_validation_in_inference_mode():
    fast, _ = models(torch.bfloat16)
    fast.attention_backend = "flex"  # whose masks are kept
    tokens = torch.randint(0, 1000, (2, 512), device="cuda")
    fast.eval()
    with torch.inference_mode():
        fast(tokens, tokens)
    fast.train()(tokens, tokens).backward()


def test_decode_on_the_gpu_equals_the_full_forward():
    _, exact = models(torch.bfloat16)
    tokens = torch.randint(0, 1000, (2, 200), device="cuda")
    cache = DecodeCache(exact, 2, 200)
    logits = exact.prefill(tokens[:, :190], cache)
    for end in range(190, 200):
        torch.testing.assert_close(logits, exact(tokens[:, :end])[:, -1].detach(), rtol=1e-9, atol=1e-9)
        logits = exact.decode(tokens[:, end : end + 1], cache)


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}])
def test_what_generate_runs_equals_the_full_forward_of_the_reference(changes):
    """bfloat16 activations, "auto", prompts of unequal length: the prefill and 20 steps, each row by itself."""
    lengths, steps = [1, 3, 100, 256, 300, 517], 20  # around the sink, the window, and past both
    config = ModelConfig(
        num_layers=3, dim=512, num_heads=4, vocab_size=1000, swa_window=256, swa_sink_size=4, **changes
    )
    fast = SWAMLAModel(config).cuda().eval()
    with torch.no_grad():
        for parameter in fast.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)
    exact = copy.deepcopy(fast).double()
    exact.attention_backend = "reference"
    fast.compute_dtype = torch.bfloat16
    assert fast.attention_backend == "auto"

    longest = max(lengths)
    texts = [torch.randint(0, 1000, (length + steps,), device="cuda") for length in lengths]
    padded = torch.zeros(len(texts), longest, dtype=torch.int64, device="cuda")
    for row, (length, text) in enumerate(zip(lengths, texts)):
        padded[row, longest - length :] = text[:length]
    with torch.no_grad():
        expected = [exact(text[None])[0] for text in texts]
    cache = DecodeCache(fast, len(texts), longest + steps)
    logits = fast.prefill(padded, cache, torch.tensor(lengths, device="cuda"))
    for step in range(steps + 1):
        for row, length in enumerate(lengths):
            wanted = expected[row][length + step - 1]
            error = ((logits[row].double() - wanted).norm() / wanted.norm()).item()
            assert error < 3e-2, f"prompt of {length} tokens, step {step}: {error}"
        if step < steps:
            tokens = torch.stack([text[length + step] for length, text in zip(lengths, texts)])
            logits = fast.decode(tokens[:, None], cache)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("changes", [{}, {"engram": {"layers": [0, 3], "d_mem": 64, "table_size": 101}}])
def test_layers_on_two_gpus_give_what_one_gives(changes):
    config = ModelConfig(num_layers=6, dim=512, num_heads=4, vocab_size=1000, swa_window=64, **changes)
    one = SWAMLAModel(config).to("cuda", torch.bfloat16).eval()
    with torch.device("meta"):
        two = SWAMLAModel(config).to(torch.bfloat16)
    two.spread([torch.device("cuda", number) for number in range(2)])
    two.load_state_dict(one.state_dict())
    prompts = [torch.randint(0, 1000, (length,)).tolist() for length in (100, 3, 70)]
    assert generate(one, prompts, 40, temperature=0) == generate(two.eval(), prompts, 40, temperature=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_graph_of_a_step_gives_the_tokens_of_the_steps_apart(dtype, monkeypatch):
    """Also of a decoder that is used again, for other prompts and lengths; past the window."""
    config = ModelConfig(num_layers=3, dim=512, num_heads=4, vocab_size=1000, swa_window=64)
    model = SWAMLAModel(config).to("cuda", dtype).eval()
    decoder, apart = Decoder(model, 3, 200), Decoder(model, 3, 200)
    apart._captures = False
    for longest in (100, 20):
        prompts = [torch.randint(0, 1000, (length,)).tolist() for length in (longest, 3, 17)]
        given = [generate(model, prompts, 80, temperature=0, decoder=each) for each in (decoder, apart)]
        assert given[0] == given[1]
        drawn = [
            generate(
                model, prompts, 20, top_p=0.9, generator=torch.Generator("cuda").manual_seed(seed), decoder=decoder
            )
            for seed in (1, 1, 2)
        ]
        assert drawn[0] == drawn[1] != drawn[2]
    assert decoder._graph is not None
    assert apart._graph is None
