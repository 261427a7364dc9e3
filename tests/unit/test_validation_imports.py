"""`make validate` runs with transformers 4.51.3, which CI does not install: what it imports must not need a later version."""

from __future__ import annotations

import subprocess
import sys

import pytest

LATER = ("transformers.masking_utils", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
"""What the environment of `make validate` does not have."""


@pytest.mark.parametrize("module", ["benchmarks.validation.memory", "benchmarks.test_planner"])
def test_validation_is_imported_without_later_libraries(module: str) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({LATER})); import {module}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
