"""Compilation block by block, the cache that runs share, and what was compiled."""

import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import compilation_time_metrics, counters
from torch._functorch import config as functorch_config

from swamla_titan import kernels
from swamla_titan.config.sections import Compile
from swamla_titan.errors import UserError
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.annexes import annexes_of

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = Path("~/.cache/swamla-titan")
_RECOMPILATIONS = 8  # of a kind of block or annex; torch's own limit of a function
_INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_TRITON_FOLDER = "TRITON_CACHE_DIR"


def compile_model(
    model: SWAMLAModel,
    config: Compile,
    memory_budget: float = 1.0,
    backend: str | Callable[..., Any] = "inductor",
    stages: int = 1,
) -> None:
    """Compile `model.blocks` one by one, annexes and the cross-entropy, in place; nothing if `config` says so.

    All blocks of a kind share one compiled code, so a deep model compiles as fast as a shallow one. The loss is
    compiled apart, which fuses its float32 upcast into the reduction. A graph break is an error, and so is code that is
    compiled too often (8 times a kind of block, torch's limit for one function, and twice for each more of `stages`,
    which may have other shapes). Comes after tensor parallelism and activation checkpointing, before FSDP2, whose hooks
    run outside.

    `memory_budget` (activation_checkpoint.memory_budget): below 1, the compiler keeps at most this share of the
    activations that it would keep by itself, between all (1) and a block's inputs (0), and recomputes what is cheapest.
    It holds for blocks and annexes. `backend` is torch.compile's.

    Raises UserError if `config.cache_folder` cannot be written.
    """
    if not config.enabled:
        return
    set_cache_folder(config)
    torch.compiler.config.cache_key_tag = _tag_of_operators()
    units = [*model.blocks.values(), *(annex for _, annex in model.annexes.each())]
    # torch counts recompilations per function. All kinds of block, checkpointed or not, share Block.forward, also those
    # of the other stages on this rank; kinds of annex may share theirs.
    kinds = max(len(set(model.config.block_kinds)), len(annexes_of(model.config)))
    limit = (_RECOMPILATIONS + 2 * (stages - 1)) * kinds * len({type(unit.regions) for unit in units})
    torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = max(limit, torch._dynamo.config.accumulated_recompile_limit)
    # One object for all blocks: torch compiles again for another backend.
    of_units = backend if memory_budget == 1 else _Budgeted(backend, memory_budget)
    for unit in units:
        unit.compile(fullgraph=True, dynamic=False, backend=of_units)
    model.loss_head.cross_entropy.compile(fullgraph=True, dynamic=False, backend=backend)


class _Budgeted:
    """A backend whose graphs are cut into forward and backward under a memory budget.

    The budget is a setting of the process, read when a graph is cut. Set for good, it would reach the loss, a compiled
    optimizer and whatever else the process compiles.
    """

    def __init__(self, backend: str | Callable[..., Any], budget: float) -> None:
        self.backend = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        self.budget = budget

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        # By itself torch recomputes every operator that is not its own as if it were free, attention first.
        with functorch_config.patch(activation_memory_budget=self.budget, is_non_builtin_to_include=True):
            compiled: Callable[..., Any] = self.backend(graph, inputs, **options)
        return compiled


def warm_compiler(config: Compile, device: torch.device) -> None:
    """Start the processes that compile a GPU's kernels, which takes seconds, without waiting for them.

    By themselves they start with the first graph, whose kernels are then compiled one after the other in this process.
    Sets the cache folder, on any device; raises UserError as `set_cache_folder` does.
    """
    if device.type == "cuda":
        _let_triton_keep_its_code()
    if config.enabled:
        set_cache_folder(config)  # which those processes ask for at their start
    if config.enabled and device.type == "cuda":
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()


def set_cache_folder(config: Compile) -> Path | None:
    """Where compiled code is kept from now on, for the next run as well; None: where torch does by itself.

    That is `config.cache_folder`, or the one that the environment names (TORCHINDUCTOR_CACHE_DIR), or
    ~/.cache/swamla-titan. Ranks and runs may share it: entries carry the versions, the device and the code that they
    were made of in their names. Must come before anything is compiled; TRITON_CACHE_DIR is left alone if set.

    Raises UserError for a named folder that cannot be written, or whose name torch would split; the default is then
    skipped with a warning.
    """
    folder = _cache_folder(config)
    problem = _misnamed(folder) or _unwritable(folder)
    if problem:
        _raise_if_named(config, problem)
        _warn_of(folder, problem)
        return None
    os.environ[_INDUCTOR_FOLDER] = str(folder)
    os.environ.setdefault(_TRITON_FOLDER, str(folder / "triton"))
    return folder


def _let_triton_keep_its_code() -> None:
    """Set Triton's cache folder where the home folder cannot be written, because its compiler then raises an error.

    Our own kernels run without torch's compiler too.
    """
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    if _TRITON_FOLDER not in os.environ and _unwritable(Path(home, ".triton", "cache")):
        os.environ[_TRITON_FOLDER] = str(_in_temporary_folder() / "triton")


def _in_temporary_folder() -> Path:
    return Path(tempfile.gettempdir(), f"swamla-titan-{os.getuid()}")


@functools.cache
def _warn_of(folder: Path, problem: str) -> None:
    """Log the warning, once a process."""
    logger.warning("%s cannot %s: compiled code is kept in the temporary folder", folder, problem)


@functools.cache
def _tag_of_operators() -> str:
    """A hash of the code of our own operators, of which torch puts no more than the names into its cache keys.

    Their gradients are traced into compiled code; without the hash, that of an earlier version would be reused.
    """
    digest = hashlib.sha256(os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "").encode())
    for path in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def validate_cache_folder(config: Compile) -> None:
    """Raise UserError where `set_cache_folder` would, as far as that can be seen without making the folder."""
    folder = _cache_folder(config)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    problem = _misnamed(folder)
    if not existing.is_dir():
        problem = f"be written ({existing} is a file)"
    elif not os.access(existing, os.W_OK | os.X_OK):
        problem = f"be written ({existing} must not be)"
    if config.enabled and problem:
        _raise_if_named(config, problem)


def _cache_folder(config: Compile) -> Path:
    named = config.cache_folder or os.environ.get(_INDUCTOR_FOLDER)
    try:
        return Path(named or DEFAULT_FOLDER).expanduser().absolute()
    except RuntimeError as error:  # no such user, or this one has no home
        if named:
            raise UserError(f"compile.cache_folder: {named}: {error}; give another one") from None
        return _in_temporary_folder()


def _raise_if_named(config: Compile, problem: str) -> None:
    """Raise UserError for a folder that somebody asked for; the default is no reason to refuse."""
    named = os.environ.get(_INDUCTOR_FOLDER)
    if config.cache_folder:
        raise UserError(
            f'compile.cache_folder = "{config.cache_folder}" cannot {problem}; give another folder, '
            'or leave it "" for the default'
        )
    if named:
        raise UserError(f"{_INDUCTOR_FOLDER} = {named} cannot {problem}; set another folder, or unset it")


def _misnamed(folder: Path) -> str | None:
    """What cannot be done with a folder of this name, or None."""
    if any(character.isspace() or character in "'\"\\" for character in str(folder)):
        # torch (2.11 to 2.13) splits the commands that it gives to the C++ compiler as a shell would.
        return "be named to the C++ compiler, for its spaces, quotes or backslashes"
    return None


def _unwritable(folder: Path) -> str | None:
    """What cannot be done with the folder, or None; makes it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permission bits say little, of a full or a read-only disk nothing
            return None
    except OSError as error:
        return f"be written ({error.strerror or error})"


@dataclass(frozen=True)
class Compilation:
    """What this process has compiled so far."""

    graphs: int
    breaks: int  # 0 as long as every part of the program asks for whole graphs
    seconds: float  # of waiting for the compiler
    hits: int  # forward and backward passes whose code was found in the cache folder
    misses: int  # and those that had to be compiled

    def __str__(self) -> str:
        cached = f"{self.hits} of {self.hits + self.misses} from {os.environ.get(_INDUCTOR_FOLDER, 'no cache')}"
        return f"compiled {self.graphs} graphs in {self.seconds:.1f} s, {self.breaks} graph breaks; {cached}"


def compilation() -> Compilation:
    """What was compiled up to now, by torch's own counters; for the log after the first step."""
    inductor = counters["inductor"]
    # Tracing and compiling the forward pass; backward passes are compiled when they are first run.
    stages = ("_compile.compile_inner", "backward._backward_impl")
    return Compilation(
        graphs=counters["stats"]["unique_graphs"],
        breaks=sum(counters["graph_break"].values()),
        seconds=sum(sum(compilation_time_metrics.get(stage, ())) for stage in stages),
        hits=inductor["fxgraph_cache_hit"],
        misses=inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"],
    )
