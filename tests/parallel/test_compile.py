"""Compilation: how often, where it is kept, and what is said about it."""

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import async_compile

from swamla_titan.config import Override, load_config, with_vocabulary
from swamla_titan.config.schedule import Schedule
from swamla_titan.config.sections import ActivationCheckpoint, Compile, Float8
from swamla_titan.data import MicroBatch
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.parallel import compile as compile_file
from swamla_titan.parallel import model_parts
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.compile import DEFAULT_FOLDER, compilation, compile_model, set_cache_folder, warm_compiler
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.quantization.float8 import convert_to_float8
from tests.parallel.plan import MODES, batch, gradients, small_model, watch_compiled
from tests.waiting import HANG


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    torch._dynamo.reset()
    counters.clear()
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # so that what the test sets is undone
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    torch._dynamo.reset()


def _train_validate_train(layers: int, mode: str) -> int:
    torch._dynamo.reset()
    counters.clear()
    model = small_model(num_layers=layers)
    apply_activation_checkpointing(model, MODES[mode])
    compile_model(model, Compile(), backend="aot_eager")
    model(batch(), batch()).backward()
    model.eval()
    with torch.no_grad():
        model(batch(), batch())
    model.train()
    model(batch(), batch()).backward()
    seen = compilation()
    assert seen.breaks == 0
    return seen.graphs


@pytest.mark.parametrize(
    "layers, mode",
    [
        *((6, "none"), (6, "operators")),
        pytest.param(6, "full", marks=pytest.mark.slow),
        *(pytest.param(3, mode, marks=pytest.mark.slow) for mode in ("none", "operators", "full")),
    ],
)
def test_graphs_do_not_grow_with_depth(layers: int, mode: str):
    # two kinds of block and the loss, in training and in validation
    assert _train_validate_train(layers, mode) == 6


STAGES = """
[[training.stages]]
tokens = 1000
seq_len = 96
[[training.stages]]
tokens = 3000
local_batch_size = 3
[[training.stages]]
tokens = 6000
swa_window = 32
"""


def test_each_stage_of_training_compiles_once(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """Two kinds of block and the loss, where a stage changes their shape; on a CPU another window is another mask."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(model_parts, "compile_model", functools.partial(compile_model, backend=backend))
    tiny.write_text(tiny.read_text() + STAGES)
    config = with_vocabulary(
        load_config(tiny, [Override("compile", "enabled", "true"), Override("model", "dropout", "0")]), 257
    )
    world = World.alone()
    model = ParallelModel(config, world)
    model.init_weights(0)
    counts, losses, held_out = [], [], torch.zeros(2, 96, dtype=torch.int64)
    for stage in Schedule.of(config).stages:
        model.begin_stage(stage.config)
        shape = stage.training.local_batch_size, stage.training.seq_len
        tokens = torch.randint(0, 257, shape, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            losses.append(model.train_step([MicroBatch(tokens, tokens, None, len(tokens))] * 2, tokens.numel()).item())
        counts.append(len(compiled))
        model.evaluate([MicroBatch(held_out, held_out, None, 2)])
        counts.append(len(compiled))
    # After training and after validation, which is of one shape, but for the window.
    assert [after - before for before, after in pairwise([0, *counts])] == [3, 3, 3, 0, 3, 0, 0, 0]
    assert losses[0::3] == losses[1::3] == losses[2::3]
    assert len(set(losses)) == 4  # the window counts


def test_compiling_too_often_is_an_error():
    model = small_model(num_layers=1)
    compile_model(model, Compile(), backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        model(batch()[:, :16])
        model(batch()[:, :32])
        with pytest.raises(FailOnRecompileLimitHit):
            model(batch()[:, :48])


def test_each_kind_of_block_adds_to_the_limit_and_further_shapes_are_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compile_file, "_RECOMPILATIONS", 2)
    with torch._dynamo.config.patch(recompile_limit=1):
        model = small_model()
        compile_model(model, Compile(), backend="eager")
        for length in (16, 32):
            model(batch()[:, :length])
        assert compilation().graphs == 4
        with pytest.raises(FailOnRecompileLimitHit):
            model(batch()[:, :48])


def test_checkpointed_blocks_add_to_the_limit_as_well():
    model = small_model(num_layers=4)
    apply_activation_checkpointing(model, ActivationCheckpoint(mode="selective", selective="blocks", every_n_blocks=2))
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_model(model, Compile(), backend="eager")
        assert torch._dynamo.config.recompile_limit == 4 * compile_file._RECOMPILATIONS


def test_disabled_compiles_nothing():
    model = small_model(num_layers=1)
    compile_model(model, Compile(enabled=False))
    model(batch(), batch()).backward()
    assert compilation().graphs == 0


def test_the_memory_budget_reaches_blocks_and_nothing_else():
    kept, found = [], []
    for budget in (1.0, 0.0):
        torch._dynamo.reset()
        model = small_model(torch.float32)
        compile_model(model, Compile(), memory_budget=budget, backend="aot_eager")
        seen = watch_compiled(model, batch())
        kept.append(seen.kept)
        found.append(seen.gradients)
    assert kept[0] > kept[1]
    assert functorch_config.activation_memory_budget == 1.0
    for name, gradient in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_budget_recomputes_casts_before_float8_products():
    recomputed = []
    for budget in (0.9, 0.1):
        torch._dynamo.reset()
        model = small_model(torch.float32, num_layers=1)
        convert_to_float8(model, Float8(recipe="native", linear_layers="all"), torch.device("cpu"))
        compile_model(model, Compile(), memory_budget=budget, backend="aot_eager")
        seen = watch_compiled(model, batch(64))
        ours = torch.ops.swamla_titan
        recomputed.append([seen.backward[each.default] for each in (ours.float8_normalize, ours.float8_product)])
    (casts, products), (_, products_of_little) = recomputed
    assert casts == 2
    assert products == 0 < products_of_little


@pytest.mark.parametrize("layers", [6, pytest.param(3, marks=pytest.mark.slow)])
def test_blocks_under_a_budget_share_code_too(layers: int):
    model = small_model(torch.float32, num_layers=layers)
    compile_model(model, Compile(), memory_budget=0.5, backend="aot_eager")
    model(batch(), batch()).backward()
    assert compilation().graphs == 3
    assert len(gradients(model)) > 0


def test_the_cache_folder_that_is_named_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "environment"))
    assert set_cache_folder(Compile()) == tmp_path / "environment"
    assert set_cache_folder(Compile(cache_folder=str(tmp_path / "named"))) == tmp_path / "named"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "named")


def test_triton_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    set_cache_folder(Compile(cache_folder=str(tmp_path)))
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    set_cache_folder(Compile(cache_folder=str(tmp_path)))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


def test_the_default_folder_is_in_the_home(tmp_path: Path):
    assert set_cache_folder(Compile()) == tmp_path / ".cache/swamla-titan" == DEFAULT_FOLDER.expanduser()
    assert (tmp_path / ".cache/swamla-titan").is_dir()


def test_without_a_home_code_is_kept_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As of a container's user whom nobody has named. Triton writes into the home by itself, and fails there."""

    def nobody(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compile_file.tempfile, "gettempdir", lambda: str(tmp_path))
    with monkeypatch.context() as without_home:
        without_home.setattr(Path, "expanduser", nobody)
        assert set_cache_folder(Compile()) == tmp_path / f"swamla-titan-{os.getuid()}"
        with pytest.raises(UserError, match=r"Could not determine home directory.*give another one"):
            set_cache_folder(Compile(cache_folder="~nobody/x"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", "/proc/nowhere")
    compile_file._let_triton_keep_its_code()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / f"swamla-titan-{os.getuid()}" / "triton")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR")
    compile_file._let_triton_keep_its_code()
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    (tmp_path / "file").write_text("in the way")
    inside = str(tmp_path / "file/folder")
    with pytest.raises(UserError, match=r"compile\.cache_folder = .* cannot be written \(Not a directory\)"):
        set_cache_folder(Compile(cache_folder=inside))
    monkeypatch.setenv("HOME", inside)
    with caplog.at_level(logging.WARNING, logger="swamla_titan"):
        assert [set_cache_folder(Compile()) for _ in range(2)] == [None, None]
    assert caplog.text.count("cannot be written") == 1
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", inside)
    with pytest.raises(UserError, match="TORCHINDUCTOR_CACHE_DIR = "):
        set_cache_folder(Compile())


@pytest.mark.parametrize("name", ["two words", "quo'te", "back\\slash"])
def test_a_folder_that_torch_would_read_as_several_is_refused(tmp_path: Path, name: str):
    with pytest.raises(
        UserError, match="cannot be named to the C\\+\\+ compiler, for its spaces, quotes or backslashes; give"
    ):
        set_cache_folder(Compile(cache_folder=str(tmp_path / name)))
    assert not (tmp_path / name).exists()


ACCOUNT = """
import sys
import torch
from swamla_titan.config.sections import Compile
from swamla_titan.parallel.compile import compilation, set_cache_folder

set_cache_folder(Compile(cache_folder=sys.argv[1]))
x, y = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)
torch.compile(torch.mm)(x, y).sum().backward()
print(compilation())
"""
RUN = """
import sys
from swamla_titan.config.sections import Compile
from swamla_titan.parallel.activation_checkpoint import apply_activation_checkpointing
from swamla_titan.parallel.compile import compilation, compile_model
from tests.parallel.plan import MODES, batch, small_model

model = small_model(num_layers=1, ffn_hidden_dim=64)
apply_activation_checkpointing(model, MODES["operators"])
compile_model(model, Compile(cache_folder=sys.argv[1]))
model(batch(), batch()).backward()
print(compilation())
"""


# A product by itself needs no C++ compiler. A SWA block and the loss take half a minute, or minutes on a busy machine.
# That a run's code lies in the folder is a case of compile.cache_folder.
@pytest.mark.slow
@pytest.mark.parametrize("script, graphs", [(ACCOUNT, 1), (RUN, 2)])
def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path, script: str, graphs: int):
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=HANG
        )
        said.append(done.stdout)
    passes = 2 * graphs  # forward and backward
    assert f"compiled {graphs} graph" in said[0]
    assert f"0 graph breaks; 0 of {passes} from {tmp_path}" in said[0]
    assert f"0 graph breaks; {passes} of {passes} from {tmp_path}" in said[1]


def test_compiled_code_is_not_found_again_when_an_operator_of_ours_is_another(tmp_path, monkeypatch):
    """Of custom operators torch's keys hold the names alone, and compiled code their gradients."""
    (tmp_path / "room").mkdir()
    for name in ("__init__.py", "room/product.py"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(compile_file.kernels, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    tags = []
    for text in ("", "2 * x", ""):
        (tmp_path / "room/product.py").write_text(text)
        compile_file._tag_of_operators.cache_clear()
        compile_model(small_model(), Compile(cache_folder=str(tmp_path / "cache")), backend="eager")
        tags.append(torch.compiler.config.cache_key_tag)
    compile_file._tag_of_operators.cache_clear()
    assert tags[0] == tags[2] != tags[1]


def test_compiling_processes_start_for_a_gpu_alone_and_know_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folders: list[str] = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    here = str(tmp_path / "code")
    warm_compiler(Compile(cache_folder=here), torch.device("cpu"))
    warm_compiler(Compile(cache_folder=here, enabled=False), torch.device("cuda"))
    assert not folders
    warm_compiler(Compile(cache_folder=here), torch.device("cuda"))
    assert folders == [here]
