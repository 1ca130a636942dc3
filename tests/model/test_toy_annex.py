"""An annex is one file, one line of the registry and its settings: a toy is added to a copy of the package."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swamla_titan.model.annex import Annex
from swamla_titan.model.annexes import registered
from swamla_titan.model.engram import Engram
from tests.patches import apply_patch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHECKS = (
    "tests/model/toy_annex/checks.py",
    "tests/model/test_config_fields.py::test_every_field_has_a_case",
    "tests/config/test_effects.py::test_every_key_has_a_condition_or_a_proof_that_it_always_counts",
    "tests/config/test_effects.py::"
    "test_a_key_without_effect_is_refused_with_what_takes_it_away_and_what_to_set[model.toy.rows]",
)


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    """A folder with the package and its tests, and the toy in it."""
    for name in ("swamla_titan", "tests", "train_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    touched = apply_patch(HERE / "toy_annex" / "toy.patch", tmp_path)
    assert sorted(touched) == [f"swamla_titan/model/{name}.py" for name in ("annexes", "config", "toy")]
    return tmp_path


def test_a_toy_touches_three_files(patched: Path):
    assert (patched / "swamla_titan" / "model" / "toy.py").exists()


@pytest.mark.slow
def test_a_toy_works_everywhere(patched: Path):
    checks = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *CHECKS]
    ran = subprocess.run(checks, cwd=patched, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_an_annex_without_settings_is_refused_by_the_registry():
    with pytest.raises(TypeError, match=r"\['engram', 'bare'\] needs a field of ModelConfig"):
        registered({"engram": Engram, "bare": Engram})
    with pytest.raises(TypeError, match="needs a field of ModelConfig"):
        registered({})


def test_an_annex_that_leaves_a_declaration_out_is_refused_when_it_is_defined():
    with pytest.raises(TypeError, match=r"Half must define .*\bflops\b.*\bindices, lookback\b"):
        type("Half", (Annex,), {})
