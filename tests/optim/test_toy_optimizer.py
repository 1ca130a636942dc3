"""An optimizer is its name and one class: a toy is added to a copy of the package, where it trains."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patches import apply_patch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    """A folder with the package and its tests, and the toy in it."""
    for name in ("swamla_titan", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    touched = apply_patch(HERE / "toy_optimizer" / "toy.patch", tmp_path)
    assert touched == ["swamla_titan/config/sections.py", "swamla_titan/optim/rules.py"]
    return tmp_path


def test_a_toy_touches_two_files(patched: Path):
    assert "class SGD(Rule)" in (patched / "swamla_titan/optim/rules.py").read_text()


@pytest.mark.slow
def test_a_toy_works_everywhere(patched: Path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/optim/toy_optimizer/checks.py",
    ]
    ran = subprocess.run(command, cwd=patched, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
