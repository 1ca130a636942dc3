"""A data source is one file, and its name among those of the key: a toy is added to a copy of the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.patches import apply_patch
from tests.tiny_config import tiny_config

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "toy_source"


def test_a_toy_source_touches_two_files_and_works_everywhere(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "swamla_titan", copy / "swamla_titan", ignore=shutil.ignore_patterns("__pycache__"))
    touched = apply_patch(HERE / "toy.patch", copy)
    assert len(touched) <= 2, touched
    config = tiny_config(tmp_path)
    ran = subprocess.run(
        [sys.executable, str(HERE / "checks.py"), str(tmp_path), str(config)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(copy), str(ROOT)])},
        cwd=copy,  # before which no other copy is found
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
