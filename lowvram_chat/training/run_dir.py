"""The run folder: everything that later commands need. `new_run` makes it.

recipe.yaml  environment.json  metrics.jsonl  samples.json  result.json  report.html  checkpoints/  adapter/ or model/
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lowvram_chat import __version__
from lowvram_chat.errors import NotFoundError, UsageError
from lowvram_chat.files import usable_path
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.training.checkpoints import newest_whole

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")

Result = dict[str, Any]
"""What result.json holds."""


@dataclass(frozen=True)
class RunDir:
    """A run folder and the paths in it, none of which need exist."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunDir:
        """Return the run folder of a recipe; `~` is the home folder.

        Raises:
            UsageError: no folder can have this path.
        """
        return cls(usable_path("output.dir", recipe.output.dir))

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def result_file(self) -> Path:
        """The result of a finished run."""
        return self.path / "result.json"

    @property
    def samples_file(self) -> Path:
        """Answers to the sample prompts."""
        return self.path / "samples.json"

    @property
    def report_file(self) -> Path:
        """The page with curves, settings and answers."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """Folder of `checkpoint-<step>` folders."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model of a full fine-tune."""
        return self.path / "model"

    @property
    def merged(self) -> Path:
        """The model that `merge` writes."""
        return self.path / "merged"

    def recipe(self) -> Recipe:
        """Return the run's resolved recipe."""
        return load_recipe(self.recipe_file)

    def last_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint, whose files have the content that they were written with."""
        return newest_whole(self.checkpoints)[0]

    def damaged_checkpoints(self) -> dict[Path, str]:
        """Return the checkpoints that are newer than the last whole one, and what is damaged in each."""
        return newest_whole(self.checkpoints)[1]


def is_main_process() -> bool:
    """Return whether this process writes files: the only process, or rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def open_run(path: str | Path) -> RunDir:
    """Return an existing run folder.

    Raises:
        NotFoundError: there is no such folder, or it holds no run.
    """
    run = RunDir(Path(path).expanduser())
    if not run.path.is_dir():
        raise NotFoundError(f"{path}: there is no such folder. Give the run folder that sft printed.")
    if not run.recipe_file.is_file():
        raise NotFoundError(f"{path}: has no recipe.yaml, so it is not a run folder. Give the folder that sft printed.")
    return run


def read_result(run: RunDir) -> Result:
    """Return what `result.json` holds; empty if the run has not finished.

    Raises:
        UsageError: the file is damaged.
    """
    if not run.result_file.is_file():
        return {}
    try:
        result = json.loads(run.result_file.read_text(encoding="utf-8"))
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise UsageError(f"{run.result_file}: is damaged. Delete it; sft --resume writes it again.")
    return result


def environment() -> dict[str, Any]:
    """Return what ran: package versions, Python, machine, device. It holds no path, user or host name."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "lowvram_chat": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES if importlib.util.find_spec(name)},
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "device_total_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cuda": torch.version.cuda,
    }
