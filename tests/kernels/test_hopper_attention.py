"""The CUDA C++ kernels for Hopper against a float64 reference.

On such a GPU with -m gpu; emulated on a CPU with -m slow.
"""

import ctypes
import math
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from swamla_titan.kernels import cuda
from swamla_titan.kernels.attention import hopper
from swamla_titan.kernels.attention.dispatch import reference_attention
from swamla_titan.kernels.attention.latent_hopper import latent_hopper_attention
from swamla_titan.kernels.attention.masks import dense_mask, document_ends, document_starts
from swamla_titan.model.layers import rotate, rotation

HERE = Path(__file__).parent
SOURCES = Path(hopper.__file__).parent
SHAPES = [  # B, T, H, mean length of documents
    (1, 1, 2, None),
    (1, 128, 1, None),
    (2, 129, 2, None),
    (1, 300, 3, None),
    (2, 330, 2, 40),
    (2, 200, 1, 1.5),  # of one token, most of them
    (1, 600, 2, 150),
]


def problem(batch, length, heads, mean, width, device):
    """Inputs, where documents start and end, the upstream gradient, and exact output, lse and gradients."""
    torch.manual_seed(length)
    query, key = (torch.randn(batch, length, heads, width, device=device).bfloat16() for _ in range(2))
    value = torch.randn(batch, length, heads, 256, device=device).bfloat16()[..., 128:]
    starts = torch.zeros(batch, length, dtype=torch.int64, device=device)
    if mean is not None:
        starts = document_starts((torch.rand(batch, length, device=device) < 1 / mean).cumsum(dim=1))
    given = [query, key, value]
    exact_in = [x.double().requires_grad_() for x in given]
    heads_first = [x.transpose(1, 2) for x in exact_in]
    mask = dense_mask(starts, None, 0)
    exact = reference_attention(*heads_first, mask, width**-0.5).transpose(1, 2)
    scores = (heads_first[0] @ heads_first[1].transpose(-2, -1) * width**-0.5).masked_fill(~mask, -math.inf)
    upstream = torch.randn(exact.shape, device=device).bfloat16()
    gradients = torch.autograd.grad(exact, exact_in, upstream.double())
    bounds = (None, None) if mean is None else (starts.int(), document_ends(starts).int())
    return given, bounds, upstream, (exact.detach().contiguous(), scores.logsumexp(-1).detach(), *gradients)


def assert_near(name, found, exact, tolerance):
    floor = 0.1 * exact.numel() ** 0.5  # of sequences of one token queries and keys get no gradient
    assert (found.double() - exact).norm() < tolerance * exact.norm().clamp(min=floor), name


@pytest.mark.gpu
@pytest.mark.parametrize("width", hopper.QK_WIDTHS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2048, 4, None), (2, 2048, 4, 300), (1, 8192, 2, None)], ids=str)
def test_value_and_gradients(monkeypatch, shape, width):
    if why := hopper.why_not_hopper_kernel(torch.device("cuda"), torch.bfloat16, width, 128, shape[3] is not None):
        pytest.skip(why)
    # Heads in several launches.
    monkeypatch.setattr(hopper, "WORKSPACE_BYTES", 2**24)
    given, bounds, upstream, (exact, lse, *gradients) = problem(*shape, width, "cuda")
    given = [x.detach().requires_grad_() for x in given]

    def run():
        out = hopper.hopper_attention(*given, width**-0.5, *bounds)
        return out, *torch.autograd.grad(out, given, upstream)

    first, second = run(), run()
    for name, a, b, expected in zip(("out", "query", "key", "value"), first, second, (exact, *gradients)):
        assert_near(name, a, expected, 0.01)
        assert torch.equal(a, b), f"{name} differs from run to run"
    with torch.no_grad():
        assert_near("lse", hopper.run_forward(*given, *bounds, width**-0.5)[1], lse, 1e-4)


@pytest.mark.gpu
def test_compiled_by_torch_without_graph_breaks():
    if why := hopper.why_not_hopper_kernel(torch.device("cuda"), torch.bfloat16, 192, 128, False):
        pytest.skip(why)
    given, _, upstream, (exact, _, *gradients) = problem(1, 200, 2, None, 192, "cuda")
    given = [x.detach().requires_grad_() for x in given]
    out = torch.compile(hopper.hopper_attention, fullgraph=True)(*given, 192**-0.5)
    assert_near("out", out, exact, 0.01)
    for a, b in zip(torch.autograd.grad(out, given, upstream), gradients):
        assert_near("gradient", a, b, 0.01)


@pytest.mark.gpu
def test_a_thread_that_has_no_context_yet():
    if why := hopper.why_not_hopper_kernel(torch.device("cuda"), torch.bfloat16, 192, 128, False):
        pytest.skip(why)
    given, bounds, _, (exact, *_) = problem(1, 200, 2, None, 192, "cuda")
    hopper.run_forward(*given, *bounds, 192**-0.5)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as threads:
        out, _ = threads.submit(hopper.run_forward, *given, *bounds, 192**-0.5).result()
    torch.cuda.synchronize()
    assert_near("out", out, exact, 0.01)


def test_heads_of_one_launch_share_a_workspace_that_is_bounded():
    at_once, a_head = hopper._heads_at_once(256, 32)
    assert (at_once, a_head) == (256, 528 * 8192)  # 16 sequences of 2,048 tokens at once
    at_once, a_head = hopper._heads_at_once(64, 128)
    assert at_once * a_head <= hopper.WORKSPACE_BYTES
    assert -(-64 // at_once) * at_once - 64 < -(-64 // at_once)  # launches of about the same size
    longest = hopper.longest_sequence()
    assert longest > 32768
    assert hopper._heads_at_once(1, longest // 64)[1] <= hopper.WORKSPACE_BYTES < hopper._heads_at_once(1, longest)[1]


def test_a_kept_compilation_that_cannot_be_read_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "_nvrtc", lambda: None)
    monkeypatch.setattr(cuda, "_version", lambda nvrtc: (13, 0))
    monkeypatch.setattr(cuda, "_compile", lambda *about: b"new")
    (tmp_path / "a.cu").write_text("")
    assert cuda.compiled(tmp_path / "a.cu", (), {}) == b"new"
    [kept] = (tmp_path / "cache").iterdir()
    kept.write_bytes(b"kept")
    assert cuda.compiled(tmp_path / "a.cu", (), {}) == b"kept"
    kept.unlink()
    kept.mkdir()
    assert cuda.compiled(tmp_path / "a.cu", (), {}) == b"new"
    assert [*(tmp_path / "cache").iterdir()] == [kept]


def test_a_machine_without_nvrtc_is_told_what_is_missing(monkeypatch):
    cuda._nvrtc.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    assert cuda.why_not_compiled() == "needs NVRTC (libnvrtc.so.99), which comes with PyTorch for CUDA"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.why_not_compiled() == "needs PyTorch for CUDA"


class Emulated:
    """CUDA C++ compiled for this CPU, with hopper_emulated.h instead of Hopper's instructions."""

    class Map(ctypes.Structure):
        _fields_ = [("numbers", ctypes.c_uint64 * 16)]

    def __init__(self, path, source, **macros):
        defined = [f"-D{name}={value}" for name, value in macros.items()]
        paths = [f"-I{SOURCES}", f"-I{HERE}", "-o", str(path), str(HERE / source)]
        subprocess.run(["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", *defined, *paths], check=True)
        self.library = ctypes.CDLL(str(path))

    def __call__(self, name, *arguments):
        held = []

        def passed(given):
            if given is None or isinstance(given, torch.Tensor):
                return ctypes.c_void_p(None if given is None else given.data_ptr())
            if isinstance(given, tuple):
                x, rows = given
                strides = [2 * x.stride(i) for i in (2, 1, 0)]
                held.append(self.Map((ctypes.c_uint64 * 16)(x.data_ptr(), *reversed(x.shape), *strides, rows)))
                return ctypes.byref(held[-1])
            return ctypes.c_float(given) if isinstance(given, float) else given

        assert getattr(self.library, name.replace("hopper", "run"))(*map(passed, arguments)) == 0, f"{name}: a deadlock"


@pytest.fixture
def deterministic():
    """Memory that nothing was written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def emulate(monkeypatch, module, emulated):
    """Let a module launch its kernels on this CPU."""
    launch = lambda device, width, documents, name: lambda blocks, threads, *rest: emulated(name, blocks, 1, *rest)  # noqa: E731
    monkeypatch.setattr(module, "_kernel", launch)
    monkeypatch.setattr(module, "TensorMap", lambda x, rows: (x, rows))
    monkeypatch.setattr(module, "_multiprocessors", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def emulate_causal(monkeypatch, path, width, documents):
    """Those of hopper.py."""
    emulate(monkeypatch, hopper, Emulated(path, "hopper_emulated.cpp", QK_WIDTH=width, DOCUMENTS=int(documents)))
    monkeypatch.setattr(hopper, "WORKSPACE_BYTES", 2**18)  # several launches


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("width, documents", [(192, False), (192, True), (128, True)])
def test_emulated(monkeypatch, tmp_path, deterministic, width, documents):
    emulate_causal(monkeypatch, tmp_path / "emulated.so", width, documents)
    for shape in SHAPES:
        if (shape[3] is not None) != documents:
            continue
        given, bounds, upstream, (exact, exact_lse, *gradients) = problem(*shape, width, "cpu")
        out, lse = hopper.run_forward(*given, *bounds, width**-0.5)
        assert_near("out", out, exact, 0.01)
        assert_near("lse", lse, exact_lse, 1e-5)
        found = hopper.run_backward(upstream, *given, *bounds, out, lse, width**-0.5)
        for name, a, b in zip(("query", "key", "value"), found, gradients):
            assert_near(name, a, b, 0.01)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_emulated_in_parts(monkeypatch, tmp_path, deterministic):
    """A last part of keys for all heads, and gradients of keys and values in one tensor, are the same to the bit."""
    emulate_causal(monkeypatch, tmp_path / "emulated.so", 192, False)
    (query, key, value), bounds, upstream, _ = problem(2, 200, 3, None, 192, "cpu")
    last = key[:, :, :1, 128:].contiguous()
    key = torch.cat([key[..., :128], last.expand(-1, -1, 3, -1)], dim=-1)
    keys_values = torch.cat([key[..., :128], value], dim=-1)
    parts = hopper.Parts(query, query[..., 128:].contiguous()), hopper.Parts(keys_values, last), keys_values[..., 128:]
    spoilt = query.clone()
    spoilt[..., 128:] = math.nan  # is not read
    parts = hopper.Parts(spoilt, parts[0].last), *parts[1:]
    out, lse = hopper.run_forward(query, key, value, *bounds, 192**-0.5)
    in_parts = hopper.launch_forward(*parts, *bounds, 192**-0.5, 192)
    assert torch.equal(out, in_parts[0])
    assert torch.equal(lse, in_parts[1])
    grad_query, grad_key, grad_value = hopper.run_backward(upstream, query, key, value, *bounds, out, lse, 192**-0.5)
    grad_keys_values, grad_last = torch.empty_like(keys_values), torch.empty(2, 200, 3, 64).bfloat16()
    to = hopper.Gradients(
        torch.empty_like(query), hopper.Parts(grad_keys_values, grad_last), grad_keys_values[..., 128:]
    )
    hopper.launch_backward(upstream, *parts, *bounds, out, lse, 192**-0.5, to)
    assert torch.equal(to.query, grad_query)
    assert torch.equal(torch.cat([grad_keys_values[..., :128], grad_last], dim=-1), grad_key)
    assert torch.equal(grad_keys_values[..., 128:], grad_value)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or os.environ.get("TRITON_INTERPRET") != "1", reason="needs g++ and TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("documents", [False, True])
def test_emulated_with_its_rotation(monkeypatch, tmp_path, deterministic, documents):
    emulate_causal(monkeypatch, tmp_path / "emulated.so", 192, documents)
    batch, length, heads = 2, 140, 3
    query, keys_values, beside = (
        torch.randn(batch, length, *shape).bfloat16().requires_grad_() for shape in ((heads, 192), (heads, 256), (88,))
    )
    positions = torch.arange(length)[None]
    by, exact_by = (rotation(positions, 64, 10000.0, 1.0, kind) for kind in (torch.float32, torch.float64))
    starts = torch.zeros(batch, length, dtype=torch.int64)
    if documents:
        starts = document_starts((torch.rand(batch, length) < 0.05).cumsum(1))
    bounds = (starts.int(), document_ends(starts).int()) if documents else ()
    given = [query, keys_values, beside]
    ours = latent_hopper_attention(query, keys_values, beside[..., 24:], *by, 192**-0.5, *bounds)
    exact_in = [x.detach().double().requires_grad_() for x in given]
    q_nope, q_rope = exact_in[0].split([128, 64], dim=-1)
    k_nope, value = exact_in[1].split([128, 128], dim=-1)
    shared = rotate(exact_in[2][:, :, None, 24:], exact_by).expand(-1, -1, heads, -1)
    steps = torch.cat([q_nope, rotate(q_rope, exact_by)], dim=-1), torch.cat([k_nope, shared], dim=-1), value
    exact = reference_attention(*(x.transpose(1, 2) for x in steps), dense_mask(starts, None, 0), 192**-0.5)
    assert_near("out", ours, exact.transpose(1, 2), 0.01)
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, given, upstream)
    expected = torch.autograd.grad(exact.transpose(1, 2), exact_in, upstream.double())
    for name, a, b in zip(("query", "keys_values", "rope_key"), found, expected):
        assert_near(name, a, b, 0.02)
