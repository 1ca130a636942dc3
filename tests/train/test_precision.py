"""The precision of float32 products: one switch, set before anything is compiled."""

import re
from pathlib import Path

import pytest
import torch

import swamla_titan
from swamla_titan.config import Config
from swamla_titan.config.sections import Float8, Training
from swamla_titan.parallel import model_parts
from swamla_titan.quantization.float8 import convert_to_float8
from swamla_titan.train import setup
from swamla_titan.train.precision import set_precision_and_determinism
from tests.distributed.ranks import on_ranks
from tests.parallel.plan import batch, small_model
from tests.train.runs import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)  # which need not be there


def precision(wanted: str) -> Config:
    return Config(training=Training(fp32_precision=wanted))


def test_no_other_switch_is_used():
    """torch refuses a mix of the old and the new ones, and torch.compile asks the old; cuDNN has one of its own."""
    sources = {path.name: path.read_text() for path in Path(swamla_titan.__file__).parent.rglob("*.py")}
    calls = {name for name, text in sources.items() if "torch.set_float32_matmul_precision(" in text}
    assert calls == {"precision.py"}
    others = re.compile(r"allow_tf32|backends\.\S*fp32_precision|cudnn\.\S*fp32_precision|TF32_CUBLAS")
    sources["precision.py"], count = re.subn(r"torch\.backends\.cudnn\.allow_tf32 = ", "", sources["precision.py"])
    assert count == 1
    assert not [name for name, text in sources.items() if others.search(text)]


@pytest.mark.parametrize("wanted, allowed", [("tf32", True), ("ieee", False)])
def test_all_that_asks_agrees(wanted, allowed):
    set_precision_and_determinism(precision(wanted), CUDA)
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    assert torch.backends.cuda.matmul.allow_tf32 == allowed  # what the compiler asks
    assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if allowed else "ieee")
    assert torch.backends.cudnn.allow_tf32 == allowed
    set_precision_and_determinism(precision("ieee"), CUDA)
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("recipe", ["tensorwise", "native"])
def test_float8_compiles_under_it(recipe):
    torch._dynamo.reset()
    set_precision_and_determinism(precision("tf32"), CUDA)
    model = small_model(torch.float32, num_layers=1)
    convert_to_float8(model, Float8(recipe=recipe, linear_layers="all"), CPU)
    for block in model.blocks.values():
        block.compile(fullgraph=True, backend="aot_eager")
    model(batch(), batch()).backward()
    assert torch.get_float32_matmul_precision() == "high"


def _seen_when_compiling(config: str, wanted: str) -> list[str]:
    seen = []
    real, real_set = model_parts.compile_model, setup.set_precision_and_determinism

    def watched(*arguments, **options):
        seen.append(torch.get_float32_matmul_precision())
        return real(*arguments, **options)

    model_parts.compile_model = watched
    setup.set_precision_and_determinism = lambda config, device, rank: real_set(config, CUDA, rank)
    assert train(config, "--training.steps", "1", "--training.fp32_precision", wanted) == 0
    return seen


@pytest.mark.parametrize(
    "wanted, expected", [("tf32", "high"), pytest.param("ieee", "highest", marks=pytest.mark.slow)]
)
def test_every_rank_sets_it_before_it_compiles(tiny, wanted, expected):
    assert on_ranks(2, _seen_when_compiling, tiny, wanted) == [[expected], [expected]]


def test_on_a_cpu_products_stay_exact():
    set_precision_and_determinism(Config(), CPU)
    assert torch.get_float32_matmul_precision() == "highest"
