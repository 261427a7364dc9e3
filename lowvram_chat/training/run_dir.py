"""The run folder: everything that later commands need. Nothing is written before the run can start.

recipe.yaml  environment.json  metrics.jsonl  samples.json  result.json  report.html  checkpoints/  adapter/ or model/
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lowvram_chat import __version__
from lowvram_chat.errors import NotFoundError, UsageError
from lowvram_chat.files import discard, write_json, write_text
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import dump_recipe, load_recipe

COUNTS_FILE = "token_counts.json"
"""File in each checkpoint with what the run had processed when it was written."""

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")

Result = dict[str, Any]
"""What result.json holds."""


@dataclass(frozen=True)
class RunDir:
    """A run folder and the paths in it, none of which need exist."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunDir:
        """Return the run folder of a recipe; `~` is the home folder."""
        return cls(Path(recipe.output.dir).expanduser())

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
        """Return the newest complete checkpoint.

        The Trainer writes `trainer_state.json` last, and our callback writes the token counts after it.
        """
        complete = [folder for folder in self.checkpoints.glob("checkpoint-*") if step_of(folder) is not None]
        return max(complete, key=lambda folder: step_of(folder) or 0, default=None)


def step_of(checkpoint: Path) -> int | None:
    """Return the optimizer step of a checkpoint; None if the checkpoint is not complete."""
    if not (checkpoint / COUNTS_FILE).is_file():
        return None
    try:
        return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_main_process() -> bool:
    """Return whether this process writes files: the only process, or rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def check_new(path: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse to write over an earlier run.

    Raises:
        UsageError: the folder is in use and neither `overwrite` nor `resume` was given, or it is not a run folder.
        NotFoundError: `resume` without a complete checkpoint.
    """
    has_checkpoint = RunDir(path).last_checkpoint() is not None
    if resume:
        if not has_checkpoint:
            start = "with --overwrite" if RunDir(path).recipe_file.is_file() else "without --resume"
            raise NotFoundError(f"{path}: there is no complete checkpoint to resume from. Start the run {start}.")
        return
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise UsageError(
            f"output.dir: {path} cannot be created, because {nearest} is a file. Set output.dir to another folder."
        )
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / "recipe.yaml").is_file() or not (path / "environment.json").is_file():
        raise UsageError(
            f"{path}: exists and is not a run folder, so it is left alone. Set output.dir to another folder."
        )
    if not overwrite:
        resume_hint = " --resume to continue it," if has_checkpoint else ""
        raise UsageError(
            f"{path}: holds an earlier run. Add --overwrite to replace it,{resume_hint} or set output.dir to a new folder."
        )


@contextlib.contextmanager
def created(recipe: Recipe, *, resume: bool) -> Iterator[RunDir]:
    """Create the run folder of a recipe while the context is open; if it ends with an error, put back what was there.

    An earlier run is set aside first and deleted when the context ends well. `resume` keeps what the folder holds. The recipe
    and the environment are written at the end.

    Raises:
        UsageError: the folder cannot be created, or an earlier run cannot be moved.
    """
    run = RunDir.of(recipe)
    if not is_main_process() or resume:
        yield run
    else:
        with _replaced(run.path):
            yield run
    if is_main_process():
        write_text(run.recipe_file, dump_recipe(recipe))
        write_json(run.path / "environment.json", environment())


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[None]:
    """Set a folder aside and create it anew; with an error in the context, put it back, or leave nothing."""
    earlier = folder.with_name(f"{folder.name}.earlier-{os.getpid()}")
    had_one = folder.exists()
    missing = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        if had_one:
            folder.rename(earlier)
        folder.mkdir(parents=True)
    except OSError as error:
        if earlier.exists():
            earlier.rename(folder)
        raise UsageError(
            f"output.dir: {folder} cannot be created ({error.strerror}). Set output.dir to another folder, or close the programs "
            "that use it."
        ) from None
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if had_one:
            earlier.rename(folder)
        for parent in missing:
            parent.rmdir()
        raise
    if had_one:
        discard(earlier)


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
    """Return what `result.json` holds; empty if the run has not finished."""
    if not run.result_file.is_file():
        return {}
    result: Result = json.loads(run.result_file.read_text(encoding="utf-8"))
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
