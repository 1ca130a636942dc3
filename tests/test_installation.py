"""The package as pip installs it: the shipped configurations come along, wherever it goes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "train_configs").glob("*.toml"))
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index"]

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel is made of; building leaves folders behind, which the repository is spared."""
    if shutil.which("pip") is None and subprocess.run([*PIP, "--version"], capture_output=True).returncode:
        pytest.skip("needs pip")
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("swamla_titan", "train_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", str(folder), str(source), cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def listed(where: Path, *, cwd: Path) -> list[str]:
    """The configurations that `config ls` names, of the package in `where`."""
    out = run(sys.executable, "-m", "swamla_titan", "config", "ls", cwd=cwd, PYTHONPATH=str(where))
    return [line.split()[0] for line in out.split("\n\n")[0].splitlines()[1:]]


def site_packages(prefix: Path) -> Path:
    return next(prefix.rglob("swamla_titan-*.dist-info")).parent


def test_target(wheel, tmp_path):
    run(*PIP, "install", *OFFLINE[1:], "--target", str(tmp_path / "target"), str(wheel), cwd=tmp_path)
    assert listed(tmp_path / "target", cwd=tmp_path) == CONFIGS
    package = (sys.executable, "-m", "swamla_titan", "config")
    environment = {"PYTHONPATH": str(tmp_path / "target")}
    copied = run(*package, "cp", "debug", "mine.toml", cwd=tmp_path, **environment)
    assert copied == "mine.toml written; train with: swamla-titan train mine.toml\n"
    assert (tmp_path / "mine.toml").read_bytes() == (ROOT / "train_configs/debug.toml").read_bytes()
    assert next((tmp_path / "target").rglob("LICENSE")).read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_user_and_prefix(wheel, tmp_path):
    user = {"PYTHONUSERBASE": str(tmp_path / "user"), "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    if sys.prefix == sys.base_prefix:  # pip has no --user in a virtual environment
        run(*PIP, "install", *OFFLINE[1:], "--user", str(wheel), cwd=tmp_path, **user)
        assert listed(site_packages(tmp_path / "user"), cwd=tmp_path) == CONFIGS
    run(*PIP, "install", *OFFLINE[1:], "--prefix", str(tmp_path / "prefix"), str(wheel), cwd=tmp_path)
    assert listed(site_packages(tmp_path / "prefix"), cwd=tmp_path) == CONFIGS


def test_source_distribution(source, tmp_path):
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", build, str(tmp_path), cwd=source).splitlines()[-1]
    run(*PIP, "install", *OFFLINE, "--target", str(tmp_path / "target"), str(tmp_path / name), cwd=tmp_path)
    assert listed(tmp_path / "target", cwd=tmp_path) == CONFIGS


def test_editable(source, tmp_path):
    """The checkout's own folder stays the one that counts."""
    run(*PIP, "install", *OFFLINE, "--prefix", str(tmp_path / "prefix"), "--editable", str(source), cwd=tmp_path)
    show = (
        "import site, sys; site.addsitedir(sys.argv[1])\n"
        "from swamla_titan.config import shipped_configs; print(*shipped_configs().values(), sep='\\n')"
    )
    found = run(sys.executable, "-c", show, str(site_packages(tmp_path / "prefix")), cwd=tmp_path).split()
    assert found == [str(source / "train_configs" / f"{name}.toml") for name in CONFIGS]
