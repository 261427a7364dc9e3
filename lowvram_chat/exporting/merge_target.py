"""Checks that a run can be merged and where its merged model goes, before anything heavy is imported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lowvram_chat.errors import ModelError, UsageError
from lowvram_chat.files import recover
from lowvram_chat.locks import owned
from lowvram_chat.training.run_dir import RunDir, open_run


@contextlib.contextmanager
def owned_target(run_path: str | Path, out: Path | None) -> Iterator[None]:
    """Own a run folder and the folder that its merged model goes to while the context is open.

    Raises:
        UsageError: another process owns one of them, or what an interrupted merge left cannot be moved.
    """
    run = RunDir(Path(run_path).expanduser())
    target = run.merged if out is None else out.expanduser()
    with contextlib.ExitStack() as owned_folders:
        for folder in {folder.resolve(): folder for folder in (run.path, target)}.values():
            owned_folders.enter_context(owned(folder, "Wait until it has ended, or choose another folder."))
        recover(target)
        yield


def check_merge(run_path: str | Path, out: Path | None, *, base: str | None, overwrite: bool) -> tuple[RunDir, Path]:
    """Return the run and the folder that its merged model goes to.

    Raises:
        NotFoundError: there is no such run.
        ModelError: the run has no adapter.
        UsageError: the target is in use, or holds the base model.
    """
    run = open_run(run_path)
    out = run.merged if out is None else out.expanduser()
    if not (run.adapter / "adapter_config.json").is_file():
        if run.model.is_dir():
            advice = "It was a full fine-tune, so its model folder is already a complete model."
        else:
            advice = "Finish the run first (sft --resume)."
        raise ModelError(f"{run_path}: has no adapter to merge. {advice}")
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: exists. Add --overwrite to replace an earlier merge, or --out for another folder.")
    base_folder = Path(base or run.recipe().model.name).expanduser().resolve()
    if out.exists() and base_folder.is_relative_to(out.resolve()):
        raise UsageError(f"{out}: holds the base model, so it is not replaced. Give another folder with --out.")
    if out.exists() and not _is_earlier_merge(out):
        raise UsageError(
            f"{out}: exists and is not an earlier merge, so it is left alone. Give another folder with --out."
        )
    return run, out


def _is_earlier_merge(folder: Path) -> bool:
    """Return whether a folder holds a merged model: its card says so."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return (folder / "config.json").is_file() and "lowvram_chat" in text and "adapter, merged into" in text
