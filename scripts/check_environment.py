#!/usr/bin/env python3
"""Is the Python that runs this file fit to run the project? Standard library only.

usage: check_environment.py [--extras NAME,NAME] [--pyproject FILE]

Compares the requirements of pyproject.toml, and those of the extras, with the versions installed. Fit: prints one
line about the Python and exits 0. Not fit: prints what is missing, one line each, and exits 1.
"""

from __future__ import annotations  # so that an older Python reaches the message that says so

import argparse
import platform
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class NotFit(Exception):
    """This Python cannot run the project; the message says why."""


def import_first(*names: str) -> Any:
    """The first of these modules that is installed."""
    for name in names:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise NotFit(f"none of the modules {', '.join(names)} is there: install pip")


def read_project(pyproject: Path) -> dict[str, Any]:
    """The [project] table. Python 3.10 has no tomllib; pip brings one along."""
    toml = import_first("tomllib", "tomli", "pip._vendor.tomli")
    project: dict[str, Any] = toml.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return project


def packaging(module: str) -> Any:
    """A module of `packaging`, or of the copy inside pip."""
    return import_first(f"packaging.{module}", f"pip._vendor.packaging.{module}")


def requirements(project: dict[str, Any], extras: list[str]) -> list[Any]:
    """The requirements, the extras' included, that apply to this Python and platform."""
    optional = project.get("optional-dependencies", {})
    unknown = [extra for extra in extras if extra not in optional]
    if unknown:
        raise NotFit(f"pyproject.toml has no extra {', '.join(unknown)}; it has {', '.join(optional)}")
    lines = list(project.get("dependencies", []))
    for extra in extras:
        lines += optional[extra]
    parsed = [packaging("requirements").Requirement(line) for line in lines]
    return [requirement for requirement in parsed if not requirement.marker or requirement.marker.evaluate()]


def problem(requirement: Any) -> str | None:
    """What is wrong with the installed version, or None."""
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name}{requirement.specifier} is not installed"
    # A half-removed distribution has a folder but no version.
    if not installed:
        return f"{requirement.name}{requirement.specifier} is installed badly: it has no version"
    if not requirement.specifier.contains(installed, prereleases=True):
        return f"{requirement.name}{requirement.specifier} is needed, {installed} is installed"
    return None


def check(pyproject: Path, extras: list[str]) -> None:
    """Raises NotFit, with one line for each requirement that is not met."""
    project = read_project(pyproject)
    pythons = project.get("requires-python", "")
    if not packaging("specifiers").SpecifierSet(pythons).contains(platform.python_version(), prereleases=True):
        raise NotFit(f"Python {pythons} is needed, this is {platform.python_version()}")
    problems = [found for found in map(problem, requirements(project, extras)) if found]
    if problems:
        raise NotFit("\n".join(problems))


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that this Python has what pyproject.toml requires.")
    parser.add_argument("--extras", default="", help="comma-separated extras that must be there too")
    parser.add_argument("--pyproject", type=Path, default=ROOT / "pyproject.toml")
    options = parser.parse_args()
    try:
        check(options.pyproject, [extra for extra in options.extras.split(",") if extra])
    except NotFit as reason:
        print(reason)
        return 1
    print(f"Python {platform.python_version()} at {sys.executable}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
