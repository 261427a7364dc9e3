"""Makes a run folder, so that a process that dies meanwhile loses nothing: an earlier run is put back, and what it left is known.

.lowvram-chat-starting        in the folder while it is made
.NAME.lowvram-chat-earlier    beside it: the earlier run that it replaces
"""

from __future__ import annotations

import contextlib
import glob
import logging
from collections.abc import Iterator
from pathlib import Path

from lowvram_chat.errors import NotFoundError, UsageError
from lowvram_chat.files import beside, discard, patiently, recover, write_json, write_text
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import dump_recipe
from lowvram_chat.training.checkpoints import newest_whole, numbered
from lowvram_chat.training.run_dir import RunDir, environment, is_main_process

log = logging.getLogger(__name__)

REHEARSAL = "rehearsal"
"""Folder in the run folder in which saving is tried before the first step."""
STARTING = ".lowvram-chat-starting"
"""File of a run folder that is being made. A process that dies meanwhile leaves it."""
WRITTEN_BY_CHECKS = ("checkpoints", REHEARSAL, "recipe.yaml", "environment.json", STARTING)
"""What a run folder may hold while it is made, until the checks before the first step have ended."""


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
