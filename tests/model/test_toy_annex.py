"""An annex is two files, one line of the registry and one field of ModelConfig: a toy is added to a copy.

There it trains and decodes. Its keys need cases in the tests of every key, which are not part of the patch.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patches import apply_patch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def patched(folder: Path, *copied: str) -> list[str]:
    for name in copied:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return apply_patch(HERE / "toy_annex" / "toy.patch", folder)


def test_a_toy_annex_touches_four_files(tmp_path):
    touched = patched(tmp_path, "swamla_titan/model")
    assert len(touched) <= 4, touched
    assert all(path.startswith("swamla_titan/model/") for path in touched), touched


@pytest.mark.slow
def test_a_toy_annex_works_everywhere(tmp_path):
    patched(tmp_path, "swamla_titan", "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    checks = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/model/toy_annex/checks.py"]
    ran = subprocess.run(checks, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
