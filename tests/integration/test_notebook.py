"""docs/notebook.ipynb runs from top to bottom on a CPU, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.samples import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def test_the_notebook_runs_and_learns(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "run_notebook.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (losses,) = [line for line in done.stdout.splitlines() if line.startswith("held-out loss: ") and "after" in line][
        -1:
    ]
    before, after = (float(word) for word in losses.split() if word.replace(".", "").isdigit())
    assert after < before - 0.5
    assert "Traceback" not in done.stdout


def test_the_notebook_is_valid_and_its_first_code_cell_installs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    first = next("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert '"pip", "install"' in first
    assert "cuda" in first
