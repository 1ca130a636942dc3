"""The CUDA C++ kernels for Hopper against a float64 reference.

On such a GPU with -m gpu; emulated on a CPU with -m slow.
"""

import ctypes
import math
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from swamla_titan.kernels import cuda
from swamla_titan.kernels.attention import hopper
from swamla_titan.kernels.attention.dispatch import reference_attention
from swamla_titan.kernels.attention.masks import dense_mask, document_ends, document_starts

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


def poisoned(*shape, dtype=torch.bfloat16):
    return torch.full(shape, math.nan, dtype=dtype)


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
    """hopper.cu compiled for this CPU, with hopper_emulated.h instead of Hopper's instructions."""

    class Map(ctypes.Structure):
        _fields_ = [("numbers", ctypes.c_uint64 * 16)]

    def __init__(self, path, width, documents):
        macros = [f"-DQK_WIDTH={width}", f"-DDOCUMENTS={int(documents)}"]
        paths = [f"-I{SOURCES}", f"-I{HERE}", "-o", str(path), str(HERE / "hopper_emulated.cpp")]
        subprocess.run(["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", *macros, *paths], check=True)
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

        assert getattr(self.library, f"run_{name}")(*map(passed, arguments)) == 0, f"{name}: a deadlock"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("width, documents", [(192, False), (192, True), (128, True)])
def test_emulated(tmp_path, width, documents):
    emulated = Emulated(tmp_path / "emulated.so", width, documents)
    for batch, length, heads, mean in SHAPES:
        if (mean is not None) != documents:
            continue
        given, (starts, ends), upstream, expected = problem(batch, length, heads, mean, width, "cpu")
        exact, exact_lse, *gradients = expected
        query, key, value = given
        scale = width**-0.5
        sizes = batch, heads, length
        out, lse = poisoned(*upstream.shape), poisoned(batch, heads, length, dtype=torch.float32)
        counter = torch.zeros(1, dtype=torch.int32)
        maps = [(x, 128) for x in given]
        emulated("forward", 2, length, *maps, out, lse, starts, counter, *sizes, scale * math.log2(math.e), 2)
        assert_near("out", out, exact, 0.01)
        assert_near("lse", lse, exact_lse, 1e-5)

        tiles = -(-length // 64)
        lse2, delta = (poisoned(batch, heads, 64 * tiles, dtype=torch.float32) for _ in range(2))
        sums = exact.bfloat16(), upstream, exact_lse.float(), lse2, delta
        emulated("row_sums", batch * heads * 64 * tiles // 16, length, *sums, *sizes, 64 * tiles)
        found = [poisoned(*query.shape), poisoned(*key.shape), poisoned(*value.shape)]
        at_once = max(1, batch * heads // 2)  # several launches
        workspace = torch.full((at_once * tiles * (tiles + 1) // 2 * 8192,), 255, dtype=torch.uint8)
        maps = (query, 64), (upstream, 64), (key, 128), (value, 128)
        for first in range(0, batch * heads, at_once):
            here = min(at_once, batch * heads - first)
            sizes_here = first, here, 2, heads, length
            rest = *sizes_here, 64 * tiles, scale, scale * math.log2(math.e)
            own = lse2, delta, ends, found[1], found[2], workspace
            emulated("backward_keys", -(-length // 128) * here, length, *maps, *own, *rest)
            own = (key, 64), starts, workspace, found[0]
            emulated("backward_queries", -(-length // 256) * here, length, *own, *sizes_here, scale)
        for name, a, b in zip(("query", "key", "value"), found, gradients):
            assert_near(name, a, b, 0.01)
