"""A decoded token by our kernels against the full forward pass; with -m gpu, or slowly with TRITON_INTERPRET=1."""

import copy
import os
from dataclasses import replace

import pytest
import torch

from swamla_titan.kernels import decode as kernels
from swamla_titan.model import ModelConfig, SWAMLAModel, cache
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.generation import restrict

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPE = ModelConfig(
    num_layers=2,
    dim=32,
    num_heads=2,
    vocab_size=50,
    max_seq_len=256,
    ffn_hidden_dim=128,
    swa_layers_per_cycle=1,
    swa_window=6,
    swa_sink_size=3,
    kv_lora_rank=40,
    qk_nope_head_dim=20,
    qk_rope_head_dim=12,
    v_head_dim=24,
)
LENGTHS = [1, 2, 9]  # shorter than the sink, longer than the window
NEW = 8  # past window and sink


@pytest.fixture(autouse=True)
def taken_everywhere(monkeypatch):
    monkeypatch.setattr(cache, "why_no_decode_kernels", lambda device, dtype: None)


def model(dtype=torch.float32, **changes):
    made = SWAMLAModel(replace(SHAPE, **changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.2 * torch.randn_like(parameter))
    return made.to(DEVICE, dtype)


def largest_error(made, lengths, new=NEW):
    """Of the logits of any step, relative to the full forward pass in float64."""
    exact = copy.deepcopy(made).double()
    texts = [torch.randint(0, 50, (length + new,), device=DEVICE) for length in lengths]
    padded = torch.zeros(len(texts), max(lengths), dtype=torch.int64, device=DEVICE)
    for row, (length, text) in enumerate(zip(lengths, texts)):
        padded[row, max(lengths) - length :] = text[:length]
    memory = DecodeCache(made, len(texts), max(lengths) + new)
    expected = [exact(text[None])[0].detach() for text in texts]
    logits, worst = made.prefill(padded, memory, torch.tensor(lengths, device=DEVICE)), 0.0
    for step in range(new):
        tokens = torch.stack([text[length + step] for length, text in zip(lengths, texts)])
        logits = made.decode(tokens[:, None], memory)
        for row, length in enumerate(lengths):
            wanted = expected[row][length + step]
            worst = max(worst, ((logits[row].double() - wanted).norm() / wanted.norm()).item())
    return worst, memory


def sample(logits, *options):
    return kernels.sample(logits, torch.empty(len(logits), dtype=torch.int64, device=DEVICE), *options)


GROUPED = {"num_kv_heads": 1, "q_lora_rank": 28, "qk_norm": True}
ENGRAM = {"engram": {"layers": [0, 1], "orders": [2, 3], "heads": 2, "d_mem": 16, "table_size": 31}}
LARGE_SINK = {"swa_window": 2, "swa_sink_size": 5}
OTHERS = [GROUPED, ENGRAM, LARGE_SINK, {"swa_window": 1, "swa_sink_size": 0}]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes, lengths",
    [
        ({}, [9]),
        (GROUPED, LENGTHS),
        (LARGE_SINK, [9]),
        *(pytest.param(changes, [3] * 17, marks=pytest.mark.tedious) for changes in ({}, GROUPED)),
        *(pytest.param(changes, LENGTHS, marks=pytest.mark.tedious) for changes in ({}, *OTHERS[1:])),
    ],
)
def test_equals_the_full_forward(changes, lengths, monkeypatch):
    if lengths is LENGTHS:
        monkeypatch.setattr(kernels, "_RING_SLOTS", (4, 4))  # several tiles of the window
    if len(lengths) > 9:
        monkeypatch.setattr(kernels, "_MULTIPROCESSORS", 8)  # fewer than programs
    error, memory = largest_error(model(**changes), lengths, NEW if len(lengths) < 9 else 4)
    assert error < 1e-5
    assert len(memory.steps) == 2  # no layer by Block.decode


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[150, 3, 70], [150]])
def test_latents_in_many_parts(lengths):
    error, _ = largest_error(model(swa_layers_per_cycle=0, num_layers=1), lengths, 3)
    assert error < 1e-5
    assert kernels._parts(len(lengths), 2, 153) > 2


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="not in Triton's interpreter")
@pytest.mark.parametrize("lengths", [[300], [1, 256, 300, 517], [77] * 64])
def test_bfloat16_is_as_near_as_the_plain_form(lengths, monkeypatch):
    shape = {"dim": 512, "num_heads": 4, "max_seq_len": 600, "swa_window": 256, "swa_sink_size": 4, "kv_lora_rank": 128}
    shape |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
    made = model(torch.bfloat16, **shape, num_layers=4, ffn_hidden_dim=0)
    error, _ = largest_error(made, lengths)
    monkeypatch.setattr(cache, "why_no_decode_kernels", lambda device, dtype: "compared with")
    plain, memory = largest_error(made, lengths)
    assert not memory.steps
    assert error < 1.5 * plain + 0.01
    assert plain < 0.1


@pytest.mark.gpu
def test_layers_that_no_kernel_takes_are_computed_as_before():
    for changes in ({"mla_selective": True}, {"norm": "dynamic_tanh"}):
        made = model(**changes)
        error, memory = largest_error(made, [9, 4], 2)
        assert error < 1e-5
        assert set(memory.steps) == ({"0"} if "mla_selective" in changes else set())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("held", [0, 1, 3])
def test_linear_layers_behind_a_norm_and_into_the_stream(tokens, group, held, monkeypatch):
    tile = {"BN": 4, "BK": 32, "HELD": held, "AHEAD": 0}  # several tiles of the width
    monkeypatch.setattr(kernels, "_tile_of_one", lambda *sizes: tile)
    many = {"BM": 16, "BN": 16, "BK": 16}
    monkeypatch.setattr(kernels, "_tile_of_many", lambda *sizes: (many, 32 if sizes[-1] else 80))
    x, weight, gain = (torch.randn(size, device=DEVICE) for size in ((tokens, 72), (96, 72), (72,)))
    back = torch.randn(72, 96 // (2 if group else 1), device=DEVICE)
    normed = torch.nn.functional.rms_norm(x.double(), (72,), gain.double(), 1e-6)
    expected = normed @ weight.double().T
    if group:
        gate, up = expected.unflatten(-1, (-1, 2, group)).unbind(dim=-2)
        expected = (torch.nn.functional.silu(gate) * up).flatten(-2)
    stream, hidden = kernels.normed_linear(kernels.Stream(x.clone()), gain, 1e-6, weight, group)
    torch.testing.assert_close(hidden.double(), expected, rtol=1e-4, atol=1e-4)
    stream = kernels.add_linear(stream, hidden, back)
    expected = x.double() + expected @ back.double().T
    torch.testing.assert_close(stream.sum().double(), expected, rtol=1e-4, atol=1e-3)
    assert stream.added is None or len(stream.added) > 1
    stream, again = kernels.normed_linear(stream, gain, 1e-6, weight)
    normed = torch.nn.functional.rms_norm(expected, (72,), gain.double(), 1e-6)
    torch.testing.assert_close(again.double(), normed @ weight.double().T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(stream.x.double(), expected, rtol=1e-4, atol=1e-3)
    assert stream.added is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "top_k, top_p",
    [(5, 0.7), *(pytest.param(*each, marks=pytest.mark.tedious) for each in ((0, 1.0), (3, 1.0), (0, 0.6), (9, 0.4)))],
)
def test_draws_are_those_that_top_k_and_top_p_leave_in_their_frequencies(top_k, top_p):
    """Some values are equal, also at the edges. Only tokens that are left are drawn, each as often as it is likely."""
    rows = 2000 if DEVICE == "cuda" else 60
    logits = torch.tensor([2.0, 0.5, 1.0, 1.0, -1.0, 1.0, 2.0, -3.0, 0.5, 0.0], device=DEVICE)
    expected = restrict(logits[None] / 0.7, top_k, top_p).softmax(dim=-1)[0]
    padded = torch.nn.functional.pad(logits, (0, 6), value=99.0).expand(rows, 16)  # what lies behind is not drawn
    drawn = sample(padded[:, :10], 0.7, top_k, top_p, torch.Generator(DEVICE).manual_seed(3))
    frequencies = torch.bincount(drawn, minlength=10) / rows
    # Of values equal to the smallest that stays, any may be left.
    for value in logits.unique():
        found, wanted = frequencies[logits == value].sum(), expected[logits == value].sum()
        assert abs(found - wanted) < 4 * (wanted * (1 - wanted) / rows).sqrt() + 1e-6, value
    assert (frequencies > 0).sum() <= (expected > 0).sum()
    again = sample(padded[:, :10], 0.7, top_k, top_p, torch.Generator(DEVICE).manual_seed(3))
    assert torch.equal(drawn, again)


@pytest.mark.gpu
def test_tokens_are_of_the_vocabulary_whatever_the_logits_are():
    logits = torch.full((2, 300), float("nan"), device=DEVICE)
    logits[1, 7] = 1.0
    drawn = sample(logits, 0, 0, 1.0).tolist()
    assert 0 <= drawn[0] < 300
    assert drawn[1] == 7


@pytest.mark.gpu
def test_of_temperature_0_the_likeliest_is_drawn():
    logits = torch.randn(5, 1000, device=DEVICE)
    assert torch.equal(sample(logits[:, :777], 0, 0, 1.0), logits[:, :777].argmax(dim=-1))
