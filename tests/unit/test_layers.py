"""Who may import whom: each folder only those left of it in `LAYERS`; commands import any."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.samples import ROOT

PACKAGE = ROOT / "lowvram_chat"
LAYERS = (
    "recipe",
    "data",
    "model",
    "tracing",
    "planning",
    "timing",
    "training",
    "exporting",
    "results",
    "selftest",
    "reporting",
)
FOR_ALL = (
    "errors",
    "quiet",
    "hub",
    "gpus",
    "nvidia_smi",
    "units",
    "files",
    "locks",
    "stopping",
    "private_names",
    "terminal",
    "wording",
    "__version__",
)
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def imports(path: Path, *, at_top: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every import of a file; those under TYPE_CHECKING count too, unless `at_top`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            yield from ((str(node.module), alias.name) for alias in node.names)


def own(path: Path) -> set[str]:
    """Return the parts of the package (`data`, `errors`, `sft` ...) that a file imports."""
    parts = set()
    for module, name in imports(path):
        if module == "lowvram_chat":
            parts.add(name)
        elif module.startswith("lowvram_chat."):
            parts.add(module.split(".")[1])
    return parts


def test_every_folder_is_a_known_layer() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders - {"__pycache__", "assets"} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_layer_imports_only_layers_above_it(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    if folder not in LAYERS:
        return  # a command may import every layer
    allowed = {*LAYERS[: LAYERS.index(folder) + 1], *FOR_ALL, "assets"}
    assert own(path) <= allowed, f"{path.name} reaches down or across"


def test_only_the_trainer_its_settings_and_its_check_import_trl() -> None:
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(m.split(".")[0] == "trl" for m, _ in imports(path))
    }
    assert importers == {"training/trainer.py", "training/sft_settings.py", "training/probe_documents.py"}


def test_nothing_in_recipe_imports_torch_or_transformers() -> None:
    heavy = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "numpy", "pyarrow"}
    for path in (PACKAGE / "recipe").glob("*.py"):
        assert not heavy & {module.split(".")[0] for module, _ in imports(path)}


def test_commands_import_nothing_heavy_before_they_run() -> None:
    heavy = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "numpy", "pyarrow"}
    for path in PACKAGE.glob("*.py"):
        assert not heavy & {module.split(".")[0] for module, _ in imports(path, at_top=True)}, path.name
