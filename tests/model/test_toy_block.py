"""A kind of block is one file, one line of the registry and its keys: a toy is added to a copy of the package.

There it is trained, and passes the tests of every key: no table of cases beside the package has to know it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from swamla_titan.model import Block, ModelConfig, SWAMLAModel
from swamla_titan.model.blocks import registered
from swamla_titan.model.branch import Attention
from swamla_titan.model.layers import Linear
from swamla_titan.model.swa import SlidingWindowAttention
from tests.patches import apply_patch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OF_KEYS = (
    "tests/model/test_config_fields.py::test_every_field_has_a_case",
    "tests/model/test_config_fields.py::test_every_key_of_a_kind_has_an_effect_by_its_declaration",
    "tests/model/test_config_fields.py::test_what_keys_say_of_a_kind_is_what_its_class_declares",
    "tests/config/test_effects.py::test_every_key_has_a_condition_or_a_proof_that_it_always_counts",
    "tests/config/test_effects.py::"
    "test_a_key_without_effect_is_refused_with_what_takes_it_away_and_what_to_set[model.toy_heads]",
)


# The tests of keys import far more than the toy's own.
@pytest.mark.parametrize(
    "checks", [("tests/model/toy_block/checks.py",), pytest.param(OF_KEYS, marks=pytest.mark.slow)], ids=["own", "keys"]
)
def test_a_toy_kind_touches_three_files_and_works_everywhere(tmp_path, checks):
    for name in ("swamla_titan", "tests", "train_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    touched = apply_patch(HERE / "toy_block" / "toy.patch", tmp_path)
    assert len(touched) <= 3, touched
    assert all(path.startswith("swamla_titan/") for path in touched), touched
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *checks]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_kind_that_leaves_a_declaration_out_is_refused_when_it_is_defined():
    with pytest.raises(TypeError, match=r"Half must define .*\bheads, mask\b.*\bsaved\b"):
        type("Half", (Attention,), {})

    class Wider(SlidingWindowAttention):  # what it inherits is declared
        pass

    assert Wider.heads(ModelConfig()) == SlidingWindowAttention.heads(ModelConfig())


def test_a_kind_without_a_key_for_its_layers_is_refused_by_the_registry():
    with pytest.raises(TypeError, match=r"keyless.*model\.KIND_layers_per_cycle"):
        registered({"swa": SlidingWindowAttention, "mla": SlidingWindowAttention, "keyless": SlidingWindowAttention})
    with pytest.raises(TypeError, match=r"model\.KIND_layers_per_cycle"):
        registered({"swa": SlidingWindowAttention})


def test_a_linear_layer_without_a_role_is_refused():
    with pytest.raises(TypeError, match="role"):
        Linear(4, 4)
    model = SWAMLAModel(ModelConfig(num_layers=1, dim=64, num_heads=2, vocab_size=50))
    block = model.blocks["0"]
    assert isinstance(block, Block)
    block.attention.extra = nn.Linear(4, 4, bias=False)
    with pytest.raises(TypeError, match=r"blocks\.0\.attention\.extra .*declares no role"):
        model.init_weights(0)
    block.attention.extra = nn.PReLU()
    with pytest.raises(TypeError, match=r"blocks\.0\.attention\.extra\.weight: .*PReLU"):
        model.init_weights(0)
    block.attention.extra.initial = {"weight": 0.5}
    model.init_weights(0)
    assert block.attention.extra.weight.tolist() == [0.5]
