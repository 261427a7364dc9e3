"""The run folder: everything that later commands need. Nothing is written before the run can start.

recipe.yaml  environment.json  metrics.jsonl  samples.json  result.json  report.html  checkpoints/  adapter/ or model/
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lowvram_chat import __version__
from lowvram_chat.errors import NotFoundError, UsageError
from lowvram_chat.files import beside, discard, patiently, recover, usable_path, write_json, write_text
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import dump_recipe, load_recipe
from lowvram_chat.training.checkpoints import newest_whole, numbered

log = logging.getLogger(__name__)

REHEARSAL = "rehearsal"
"""Folder in the run folder in which saving is tried before the first step."""
STARTING = ".lowvram-chat-starting"
"""File of a run folder that is being made. A process that dies meanwhile leaves it."""
WRITTEN_BY_CHECKS = ("checkpoints", REHEARSAL, "recipe.yaml", "environment.json", STARTING)
"""What a run folder may hold while it is made, until the checks before the first step have ended."""

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


def check_sources_outside(recipe: Recipe) -> None:
    """Refuse to replace a run folder that holds something which the run is made from.

    Raises:
        UsageError: the base, the data or the template is in the run folder.
    """
    run, data = RunDir.of(recipe).path.resolve(), recipe.data
    sources = {"model.name": recipe.model.name, "data.chat_template": data.chat_template}
    for name, value in (("data.source", data.source), ("data.eval_source", data.eval_source)):
        sources |= {name: value} if isinstance(value, str) else {f"{name} {one}": one for one in value or ()}
    for name, value in sources.items():
        paths = map(Path, [value, *glob.glob(value, recursive=True)])
        if any(path.exists() and path.resolve().is_relative_to(run) for path in paths):
            raise UsageError(
                f"output.dir: {RunDir.of(recipe).path} holds {value} ({name.split()[0]}), so it is not replaced. Set "
                "output.dir to another folder."
            )


def check_new(path: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse to write over an earlier run.

    Raises:
        UsageError: the folder is in use and neither `overwrite` nor `resume` was given, or it is not a run folder.
        NotFoundError: `resume` without a whole checkpoint.
    """
    _recover_start(path)
    if resume:
        checkpoint, damaged = newest_whole(RunDir(path).checkpoints)
        if checkpoint is None:
            start = "with --overwrite" if RunDir(path).recipe_file.is_file() else "without --resume"
            reasons = "".join(f" {folder.name}: {reason}." for folder, reason in damaged.items())
            raise NotFoundError(f"{path}: there is no whole checkpoint to resume from.{reasons} Start the run {start}.")
        return
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise UsageError(
            f"output.dir: {path} cannot be created, because {nearest} is a file. Set output.dir to another folder."
        )
    if not path.exists() or not any(path.iterdir()):
        return
    if not _is_run(path):
        raise UsageError(
            f"{path}: exists and is not a run folder, so it is left alone. Set output.dir to another folder."
        )
    if not overwrite:
        resume_hint = " --resume to continue it," if numbered(RunDir(path).checkpoints) else ""
        raise UsageError(
            f"{path}: holds an earlier run. Add --overwrite to replace it,{resume_hint} or set output.dir to a new folder."
        )


def _is_run(folder: Path) -> bool:
    """Return whether a folder holds a run of ours."""
    return (folder / "recipe.yaml").is_file() and (folder / "environment.json").is_file()


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
        if is_main_process():
            _describe(run, recipe)
    else:
        with _replaced(run.path):
            yield run
            _describe(run, recipe)


def _describe(run: RunDir, recipe: Recipe) -> None:
    """Write the recipe and the environment of a run."""
    write_json(run.path / "environment.json", environment())
    write_text(run.recipe_file, dump_recipe(recipe))


def _recover_start(folder: Path) -> None:
    """Delete what a start that died left of a run folder, and put an earlier run back that it had set aside.

    Raises:
        UsageError: something cannot be moved or deleted, or is not the start's.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    if (folder / STARTING).is_file():
        others = sorted(path.name for path in folder.iterdir() if path.name not in WRITTEN_BY_CHECKS)
        if others:
            raise UsageError(
                f"{folder}: holds the beginning of a run that was interrupted, and {others[0]}, which is not the run's. Move "
                "it to another folder."
            )
        _delete_start(folder)
        with contextlib.suppress(OSError):  # a mount point or a link stays
            folder.rmdir()
    elif folder.is_dir() and not any(folder.iterdir()) and beside(folder, "earlier").exists():
        folder.rmdir()  # died before it wrote its first file
    if not folder.exists() or _is_run(folder):
        recover(folder)


def _delete_start(folder: Path) -> None:
    """Delete what the making of a run folder wrote, its mark last."""
    for name in WRITTEN_BY_CHECKS:
        path = folder / name
        if path.is_dir():
            discard(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[None]:
    """Set a folder aside and create it anew; with an error in the context, put it back, or leave nothing.

    An empty folder is used as it is: it may be a mount point, or a link to another disk. Only what the checks of a run write is
    deleted, never another file.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    is_empty = folder.is_dir() and not any(folder.iterdir())
    created_folders: list[Path] = []
    earlier = None
    if not is_empty:
        if folder.is_dir() and not _is_run(folder):
            raise UsageError(
                f"{folder}: files appeared here that are not a run's, so it is left alone. Set another output.dir."
            )
        created_folders = [folder, *(parent for parent in folder.absolute().parents if not parent.exists())]
        earlier = _set_aside(folder)
    try:
        (folder / STARTING).touch()
        yield
        (folder / STARTING).unlink()
    except BaseException:
        _delete_start(folder)
        _put_back(earlier, folder, created_folders)
        raise
    if earlier is not None:
        discard(earlier)


def _set_aside(folder: Path) -> Path | None:
    """Create a folder anew, and return where an earlier one of its name is now; None if there was none.

    Raises:
        UsageError: the folder cannot be created, or the earlier one cannot be moved; it is as it was.
    """
    earlier = beside(folder, "earlier") if folder.exists() else None
    try:
        if earlier is not None:
            patiently(lambda: folder.rename(earlier))
        folder.mkdir(parents=True)
    except OSError as error:
        if earlier is not None and earlier.exists():
            patiently(lambda: earlier.rename(folder))
        raise UsageError(
            f"output.dir: {folder} cannot be created ({error.strerror}). Set output.dir to another folder, or close the programs "
            "that use it."
        ) from None
    return earlier


def _put_back(earlier: Path | None, folder: Path, created_folders: list[Path]) -> None:
    """Remove the empty folders that were created, and move an earlier run back; log where it is if that is not possible."""
    try:
        for path in created_folders:
            path.rmdir()
        if earlier is not None:
            patiently(lambda: earlier.rename(folder))
    except OSError as error:
        where = f" The earlier run is in {earlier}." if earlier is not None else ""
        log.warning("%s: could not be put back as it was (%s).%s", folder, error.strerror, where)


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
