"""The cases of [compile], [activation_checkpoint] and [kernels]: what is done to the blocks of a real run."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from tests.config.runner import Runner
from tests.parallel.plan import PRODUCT, Witness

ONE_CALL = ("--training.steps", "1", "--training.local_batch_size", "5")


class Compiler:
    """In the place of the code generator: everything before it is done, and its graphs are run as they are."""

    def __init__(self) -> None:
        self.whole: list[torch.fx.GraphModule] = []  # as captured: a block of a kind, or the loss
        self.backward: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        self.whole.append(graph)
        compiled: Callable[..., Any] = aot_autograd(
            fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
            bw_compiler=self._keep,
            partition_fn=min_cut_rematerialization_partition,
        )(graph, inputs)
        return compiled

    def _keep(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.backward.append(graph)
        return make_boxed_func(graph.forward)

    def products(self) -> int:
        """In all backward passes."""
        return sum(node.target is PRODUCT for graph in self.backward for node in graph.graph.nodes)


@contextlib.contextmanager
def compiler(run: Runner) -> Iterator[Compiler]:
    """Code is compiled anew, into a cache folder of the test's own, by a Compiler."""
    stand_in = Compiler()
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(run.folder / "cache"))
        patch.setenv("TRITON_CACHE_DIR", str(run.folder / "cache/triton"))
        patch.setattr(torch._inductor.compile_fx, "compile_fx", stand_in)
        yield stand_in
    torch._dynamo.reset()


def compile_enabled(run: Runner) -> None:
    """Each block of a kind, and the loss, are captured as whole graphs."""
    losses = {}
    for enabled, graphs in (("false", 0), ("true", 3)):  # SWA, MLA, loss
        with compiler(run) as seen:
            done = run("--training.local_batch_size", "5", "--compile.enabled", enabled)
        losses[enabled] = done.series()
        assert len(seen.whole) == graphs
        assert (done.folder / "logs/rank-0.log").read_text().count(", 0 graph breaks; ") == (enabled == "true")
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5)


def cache_folder(run: Runner) -> None:
    """What is compiled after the start of a run lies in the folder; a small function stands for the model."""
    folder = run.folder / "compiled"
    refused = run.refusal("--compile.cache_folder", str(folder))
    assert "has no effect with compile.enabled = false" in refused
    generate_code = torch._inductor.compile_fx.compile_fx
    with compiler(run):
        run(*ONE_CALL, "--compile.enabled", "true", "--compile.cache_folder", str(folder))
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
        torch.compile(torch.mm, backend=generate_code)(torch.ones(2, 2), torch.ones(2, 2))  # no C++ to compile
    assert list(folder.glob("fxgraph/*"))
    assert not (run.folder / "cache").exists()


def operators(run: Runner, *overrides: str) -> Counter[Any]:
    with Witness() as seen:
        run(*ONE_CALL, *overrides)
    return seen.operators


def mode(run: Runner) -> None:
    none, selective, full = (
        operators(run, "--activation_checkpoint.mode", mode)[PRODUCT] for mode in ("none", "selective", "full")
    )
    products = 4 + 4 + 6  # of two SWA blocks and an MLA block
    assert none == 3 * (products + 1)  # with the head; forward, and backward for both factors
    assert selective == none + 3 + 1  # gate_up of each block, wkv_b
    assert full == none + products - 3  # all but `down`, for whose result nothing asks


def selective(run: Runner) -> None:
    at = ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective")
    none = operators(run)[PRODUCT]
    assert operators(run, *at, "operators")[PRODUCT] == none + 3 + 1
    assert operators(run, *at, "blocks")[PRODUCT] == none + 4 - 1  # the second of three blocks, a SWA block


def every_n_blocks(run: Runner) -> None:
    at = ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective", "blocks")
    none = operators(run)[PRODUCT]
    for number, again in (("1", 3 + 3 + 5), ("2", 3), ("3", 5), ("4", 0)):
        assert operators(run, *at, "--activation_checkpoint.every_n_blocks", number)[PRODUCT] == none + again


def modules(run: Runner) -> None:
    """Of two SWA blocks (wqkv, wo, gate_up, down) and an MLA block (three before wo), what a step multiplies again."""
    at = ("--activation_checkpoint.mode", "full", "--activation_checkpoint.modules")
    none = operators(run)[PRODUCT]
    for name, again in (("block", 3 + 3 + 5), ("attention", 1 + 1 + 3), ("feed_forward", 3), ("both", 5 + 3)):
        assert operators(run, *at, name)[PRODUCT] == none + again


def memory_budget(run: Runner) -> None:
    """The less may be kept, the more products are in the compiled backward passes."""
    found = []
    losses = []
    for budget in ("1", "0.5", "0"):
        with compiler(run) as seen:
            overrides = ("--compile.enabled", "true", "--activation_checkpoint.memory_budget", budget)
            losses.append(run(*ONE_CALL, "--model.num_layers", "1", *overrides).series()[0])
        found.append(seen.products())
    assert found[0] < found[1] < found[2]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def attention(run: Runner) -> None:
    """What computes it, and what it says it is; each to the same losses."""
    losses = {}
    for path in ("auto", "sdpa", "reference"):
        with Witness() as seen:
            done = run("--kernels.attention", path)
        losses[path] = done.series()
        fused = sum(count for operator, count in seen.operators.items() if "_scaled_dot_product" in str(operator))
        assert (fused == 0) == (path == "reference")
        said = (done.folder / "logs/rank-0.log").read_text()
        assert {
            "auto": "attention: SWA by sdpa, MLA by sdpa, causal\n",
            "sdpa": "attention: SWA by sdpa, MLA by sdpa, causal\n",
            "reference": "attention: SWA by reference, MLA by reference",
        }[path] in said
    assert losses["auto"] == losses["sdpa"] == pytest.approx(losses["reference"], rel=1e-5)
    whole_row = run("--training.steps", "1", "--model.swa_window", "64")
    assert "attention: SWA by sdpa, causal, MLA" in (whole_row.folder / "logs/rank-0.log").read_text()
    wide = ("--model.dim", "128")  # heads of 64
    for path in ("triton", "flex"):
        assert f'kernels.attention = "{path}" needs a GPU' in run.refusal(*wide, "--kernels.attention", path)


def loss(run: Runner) -> None:
    """Head and loss as one or apart, to the same losses."""
    losses = {}
    for name in ("auto", "plain", "fused"):
        done = run("--kernels.loss", name)
        losses[name] = done.series()
        said = (done.folder / "logs/rank-0.log").read_text()
        assert ("loss: as one with the output head" in said) == (name == "fused")
    assert losses["auto"] == losses["plain"] == pytest.approx(losses["fused"], rel=1e-5)
    refused = run.refusal("--kernels.loss", "fused", "--parallel.pipeline", "2")
    assert '"fused" needs the full output head' in refused


def elementwise(run: Runner) -> None:
    """On a CPU it is left to torch; what is chosen on a GPU is seen in tests/parallel/test_kernels.py."""
    assert run("--kernels.elementwise", "auto").series() == run("--kernels.elementwise", "plain").series()
    assert 'kernels.elementwise = "triton" needs a GPU' in run.refusal("--kernels.elementwise", "triton")


BLOCK_CASES: dict[str, Callable[[Runner], None]] = {
    "compile.enabled": compile_enabled,
    "compile.cache_folder": cache_folder,
    "activation_checkpoint.mode": mode,
    "activation_checkpoint.selective": selective,
    "activation_checkpoint.every_n_blocks": every_n_blocks,
    "activation_checkpoint.modules": modules,
    "activation_checkpoint.memory_budget": memory_budget,
    "kernels.attention": attention,
    "kernels.loss": loss,
    "kernels.elementwise": elementwise,
}
