"""CUDA C++ kernels, compiled at first use by NVRTC, which comes with PyTorch for CUDA, and launched on torch's stream.

Compiled kernels are kept beside Triton's, under a name made of all that they depend on.
"""

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swamla_titan.kernels.device import Limit

_TARGET = "sm_90a"  # Hopper with its own instructions
_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_BFLOAT16, _SWIZZLE_128, _L2_256 = 9, 3, 3  # of CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


class CannotCompile(Exception):
    """NVRTC is not there, or refuses the source."""


class TensorMap:
    """A [B, T, H, D] bf16 tensor for the tensor memory accelerator: boxes of `rows` tokens by 64 columns of one head.

    Elements of a head must be adjacent, and heads at multiples of 16 bytes. Rows of a box have 128 bytes in shared
    memory, swizzled by 128; tokens and columns outside of the tensor are zeros.
    """

    def __init__(self, x: Tensor, rows: int) -> None:
        self._room = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        self.address = -(-ctypes.addressof(self._room) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        sizes = (ctypes.c_uint64 * 4)(*reversed(x.shape))
        strides = (ctypes.c_uint64 * 3)(*(x.stride(i) * x.element_size() for i in (2, 1, 0)))
        box, ones = (ctypes.c_uint32 * 4)(64, 1, rows, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1)
        _driver(
            "cuTensorMapEncodeTiled",
            *(ctypes.c_void_p(self.address), _BFLOAT16, 4, ctypes.c_void_p(x.data_ptr()), sizes, strides, box, ones),
            *(0, _SWIZZLE_128, _L2_256, 0),
        )


class Kernel:
    """One function of a compiled source on one device, which must be the current one; `shared` bytes of memory."""

    def __init__(self, module: ctypes.c_void_p, name: str, shared: int) -> None:
        self._function, self._shared = ctypes.c_void_p(), shared
        _driver("cuModuleGetFunction", ctypes.byref(self._function), module, name.encode())
        _driver("cuFuncSetAttribute", self._function, _SHARED_BYTES, shared)

    def __call__(self, blocks: int, threads: int, *arguments: Any) -> None:
        """Launch on the current stream: tensors and None as pointers, integers and floats in 32 bits."""
        held = [_argument(each) for each in arguments]
        pointers = (ctypes.c_void_p * len(held))(
            *(each.address if isinstance(each, TensorMap) else ctypes.addressof(each) for each in held)
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _set_context()
        _driver("cuLaunchKernel", self._function, blocks, 1, 1, threads, 1, 1, self._shared, stream, pointers, None)


def _argument(given: Any) -> Any:
    if isinstance(given, TensorMap):
        return given
    if given is None or isinstance(given, Tensor):
        return ctypes.c_void_p(None if given is None else given.data_ptr())
    return ctypes.c_float(given) if isinstance(given, float) else ctypes.c_int(given)


def load(cubin: bytes) -> ctypes.c_void_p:
    """The module of compiled kernels on the current device."""
    module = ctypes.c_void_p()
    _set_context()
    _driver("cuModuleLoadData", ctypes.byref(module), cubin)
    return module


def compiled(source: Path, headers: tuple[Path, ...], macros: Mapping[str, int]) -> bytes:
    """The kernels of `source`, compiled for Hopper with these macros, or kept from an earlier run.

    Raises CannotCompile.
    """
    texts = [each.read_text() for each in (source, *headers)]
    options = [f"--gpu-architecture={_TARGET}", "--std=c++17", *(f"-D{key}={value}" for key, value in macros.items())]
    nvrtc = _nvrtc()
    named = "\0".join([*map(str, _version(nvrtc)), *options, *texts])
    kept = _folder() / f"{source.stem}-{hashlib.sha256(named.encode()).hexdigest()}.cubin"
    with suppress(OSError):  # not there, or somebody else's in a folder that users share
        return kept.read_bytes()
    cubin = _compile(nvrtc, source.name, texts, [each.name for each in headers], options)
    _keep(kept, cubin)
    return cubin


def why_not_compiled() -> Limit | None:
    """Why there is nothing to compile CUDA C++ with, or None."""
    try:
        _nvrtc()
    except CannotCompile as error:
        return Limit(str(error))
    return None


def _folder() -> Path:
    """Triton's, by its own rule."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))


def _keep(path: Path, cubin: bytes) -> None:
    """Write under another name first, because several ranks may be at it; a folder that cannot be written is left."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = Path(folder, path.name)
            partial.write_bytes(cubin)
            os.replace(partial, path)
    except OSError:
        return


def _compile(nvrtc: ctypes.CDLL, name: str, texts: list[str], headers: list[str], options: list[str]) -> bytes:
    program, count = ctypes.c_void_p(), len(headers)
    source, *others = (each.encode() for each in texts)
    included = (ctypes.c_char_p * count)(*others), (ctypes.c_char_p * count)(*(each.encode() for each in headers))
    _checked(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), count, *included), "a program")
    given = (ctypes.c_char_p * len(options))(*(each.encode() for each in options))
    code = nvrtc.nvrtcCompileProgram(program, len(options), given)
    if code:
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        errors = [line for line in log.splitlines() if "error" in line]
        raise CannotCompile(f"NVRTC cannot compile {name}: {' '.join(errors[:1])} (error {code})")
    cubin = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin


def _text(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _checked(size_of(program, ctypes.byref(size)), "a size")
    room = ctypes.create_string_buffer(size.value)
    _checked(get(program, room), "a result")
    return room.raw


def _checked(code: int, what: str) -> None:
    if code:
        raise CannotCompile(f"NVRTC gives no {what.removeprefix('a ')}: error {code}")


def _version(nvrtc: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _checked(nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "a version")
    return major.value, minor.value


@cache
def _nvrtc() -> ctypes.CDLL:
    """Of the CUDA version that torch was built for: in the package beside torch's, or where the loader finds it."""
    if torch.version.cuda is None:
        raise CannotCompile("needs PyTorch for CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    package = importlib.util.find_spec("nvidia")
    folders = [Path(each) for each in (package.submodule_search_locations or ())] if package else []
    for path in (*(path for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))), Path(name)):
        try:
            # It opens a second library by its name alone, which is found if it is loaded already.
            for builtins in path.parent.glob("libnvrtc-builtins.so.*") if path.is_absolute() else ():
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise CannotCompile(f"needs NVRTC ({name}), which comes with PyTorch for CUDA")


@cache
def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _set_context() -> None:
    """Give this thread the current device's context, as torch's own calls do: autograd's threads begin without one."""
    context, device = ctypes.c_void_p(), ctypes.c_int()
    _driver("cuCtxGetCurrent", ctypes.byref(context))
    if context.value is None:
        _driver("cuDeviceGet", ctypes.byref(device), torch.cuda.current_device())
        _driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        _driver("cuCtxSetCurrent", context)


def _driver(name: str, *arguments: Any) -> None:
    """Call a function of the CUDA driver. Raises RuntimeError with its error's name."""
    if code := getattr(_libcuda(), name)(*arguments):
        text = ctypes.c_char_p()
        _libcuda().cuGetErrorName(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'').decode() or code}")
