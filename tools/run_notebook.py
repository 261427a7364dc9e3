"""Run docs/notebook.ipynb from top to bottom, without Jupyter.

    python tools/run_notebook.py            runs every cell in an empty folder
    python tools/run_notebook.py --store    keeps what the cells print in the notebook

A cell's printed text, and the HTML or text of its last expression, become its outputs.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run the code of a cell and return the value of its last expression; None if it ends with a statement."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def outputs_of(printed: str, value: Any, number: int) -> list[dict[str, Any]]:
    """Return a cell's outputs as a notebook holds them."""
    outputs: list[dict[str, Any]] = []
    if printed:
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed)})
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data = {"text/html": lines(value._repr_html_()), "text/plain": [f"<{type(value).__name__}>"]}
        outputs.append({"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": number})
    return outputs


def lines(text: str) -> list[str]:
    """Return a text as a notebook stores it, without the name of the home folder."""
    return text.replace(str(Path.home()), "~").splitlines(keepends=True)


def run(notebook: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Run a notebook's code cells in the current folder; yield each with its outputs."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()  # one for all cells: a logger keeps the stream that it found first
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        start = printed.tell()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            value = run_cell("".join(cell["source"]), names)
        yield cell, outputs_of(printed.getvalue()[start:], value, number)


def main() -> None:
    """Run, and store where that is asked for."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--store", action="store_true", help="keep what the cells print in the notebook")
    args = arguments.parse_args()
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        for number, (cell, outputs) in enumerate(run(notebook), start=1):
            cell["outputs"], cell["execution_count"] = outputs, number
            for output in outputs:
                sys.stdout.write("".join(output.get("text", output.get("data", {}).get("text/plain", []))) + "\n")
        os.chdir(NOTEBOOK.parent)
    if args.store:
        NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
