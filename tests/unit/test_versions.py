"""The version ranges in pyproject.toml admit only what is tested: from constraints-lowest.txt to constraints.txt."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.samples import ROOT

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def pinned(file: Path) -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return {name: Version(version) for name, _, version in (line.partition("==") for line in lines if line)}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_range_begins_and_ends_with_a_tested_version(library: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = {found.name: found.specifier for found in map(Requirement, project["dependencies"])}
    bounds = {bound.operator: Version(bound.version) for bound in ranges[library]}
    lowest, highest = (pinned(ROOT / name)[library] for name in ("constraints-lowest.txt", "constraints.txt"))
    if library == "torch":  # the paper card's, with which the whole suite was run once
        highest = max(map(Version, re.findall(r"torch==([\d.]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))))
    assert bounds[">="] == lowest
    assert bounds["<"] == Version(f"{highest.major}.{highest.minor + 1}")
    assert len(bounds) == 2


def test_the_lowest_versions_are_of_packages_that_are_pinned() -> None:
    assert pinned(ROOT / "constraints-lowest.txt").keys() <= pinned(ROOT / "constraints.txt").keys()
