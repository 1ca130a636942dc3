#!/usr/bin/env python3
"""Install what pyproject.toml requires into the Python that runs this file. Called by environment.sh.

usage: install_requirements.py [--extras NAME,NAME]

torch goes first, by its own range: installed later, as a dependency of a dependency, it would come in its CUDA build,
several GB, also where no GPU is. TORCH_INDEX_URL may name an extra index with CPU builds of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from check_environment import ROOT, NotFit, packaging, problem, read_project, requirements

LOG = Path(sys.prefix) / "install.log"
# Stands while packages are being written. Found on the next run, it tells that this one was cut off.
INCOMPLETE = Path(sys.prefix) / ".incomplete"
UNREACHABLE = re.compile(r"ConnectionError|ConnectTimeout|NameResolutionError|name resolution|unreachable|ProxyError")


class InstallFailed(Exception):
    """pip could not do what it was asked to; the message is for the user."""


def pip(*arguments: str) -> str:
    """Runs pip and returns its standard output. All it prints is added to the log."""
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n{ran.stdout}{ran.stderr}\n")
    if ran.returncode == 0:
        return ran.stdout
    if "Installing collected packages" not in ran.stdout:
        INCOMPLETE.unlink(missing_ok=True)  # pip gave up before it changed anything
    if UNREACHABLE.search(ran.stderr):
        reason = "pip cannot reach its package index. Without a network, name a Python that has everything: PYTHON=..."
    else:
        errors = re.findall(r"^ERROR: (.*)", ran.stderr, re.MULTILINE)
        reason = errors[-1] if errors else f"pip stopped with exit code {ran.returncode}"
    raise InstallFailed(f"{reason}\nall that pip said is in {LOG}")


def install(what: str, *arguments: str) -> None:
    print(f"installing {what} ... ", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        pip("install", *arguments)
    except InstallFailed:
        print("failed", file=sys.stderr)
        raise
    print(f"done in {time.monotonic() - start:.0f} s", file=sys.stderr)


def has_gpu() -> bool:
    if Path("/dev/nvidia0").exists():
        return True
    lister = shutil.which("nvidia-smi")
    return lister is not None and subprocess.run([lister, "-L"], capture_output=True).returncode == 0


def newest_cpu_build(requirement: Any, index: list[str]) -> str | None:
    """The newest version in the requirement's range that pip offers as a CPU build, such as 2.13.0+cpu."""
    offered = re.search(r"Available versions: (.*)", pip("index", "versions", requirement.name, *index))
    parsed = map(packaging("version").Version, offered[1].split(", ") if offered else [])
    fitting = [v for v in parsed if v.local == "cpu" and requirement.specifier.contains(v)]
    return str(max(fitting)) if fitting else None


def pulls_cuda(requirement: Any, index: list[str]) -> bool:
    report = json.loads(pip("install", "--quiet", "--dry-run", "--report", "-", str(requirement), *index))
    names = [item["metadata"]["name"].lower() for item in report["install"]]
    return any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names)


def install_torch(requirement: Any) -> None:
    index = ["--extra-index-url", os.environ["TORCH_INDEX_URL"]] if os.environ.get("TORCH_INDEX_URL") else []
    if sys.platform == "linux" and not has_gpu():
        version = newest_cpu_build(requirement, index)
        if version:
            install(f"torch {version}", f"{requirement.name}=={version}", *index)
            return
        if pulls_cuda(requirement, index):
            python = f"{sys.version_info[0]}.{sys.version_info[1]}"
            print(
                f"note: no GPU here, but no CPU build of {requirement} is offered for Python {python}: the CUDA build, "
                "several GB, is installed. TORCH_INDEX_URL=URL names an extra index that has CPU builds.",
                file=sys.stderr,
            )
    install("torch", str(requirement), *index)


def install_all(extras: str) -> None:
    LOG.unlink(missing_ok=True)
    INCOMPLETE.touch()
    if packaging("version").Version(metadata.version("pip")).release < (22, 2):
        install("a newer pip", "--upgrade", "pip")  # for --report, and for editable installs from pyproject.toml alone
    project = read_project(ROOT / "pyproject.toml")
    for requirement in requirements(project, []):
        if requirement.name == "torch" and problem(requirement):
            install_torch(requirement)
    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    install(f"{project['name']} with {extras}" if extras else project["name"], "--editable", target)
    INCOMPLETE.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description="Install what pyproject.toml requires into this Python.")
    parser.add_argument("--extras", default="", help="comma-separated extras to install too")
    try:
        install_all(parser.parse_args().extras)
    except (InstallFailed, NotFit) as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the next run starts the installation again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
