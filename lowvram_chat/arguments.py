"""Checks of the arguments of `lowvram_chat.api`. Nothing heavy is imported at the top."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_chat.errors import UsageError
from lowvram_chat.files import usable_path
from lowvram_chat.quiet import silence_libraries

if TYPE_CHECKING:
    from lowvram_chat.recipe.schema import Recipe


DEVICES = ("auto", "cpu", "cuda")
"""Devices that a model can be opened on. auto: the graphics card, if it has enough free memory."""


def checked_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe.

    Raises:
        UsageError: it is something else, such as the path of a recipe.
    """
    from lowvram_chat.recipe.schema import Recipe

    silence_libraries()
    if not isinstance(recipe, Recipe):
        raise UsageError(f"recipe: {recipe!r} is not a Recipe. Load it with load_recipe(path).")
    return recipe


def check_path(name: str, path: str | Path) -> None:
    """Refuse an argument that is not a path.

    Raises:
        UsageError: it is empty, or neither a text nor a Path, or no file can have it.
    """
    silence_libraries()
    if not isinstance(path, str | Path) or not str(path):
        raise UsageError(f"{name}: {path!r} is not a path. Give the path as a text.")
    usable_path(name, path)


def check_device_name(name: str) -> None:
    """Refuse a name that is none of `DEVICES`.

    Raises:
        UsageError: with the known names.
    """
    if name not in DEVICES:
        raise UsageError(f"device: {name!r} is not known. Give one of {', '.join(DEVICES)}.")


def as_list(names: str | Path | Sequence[str | Path] | None) -> list[str]:
    """Return one name or several as a list of texts.

    Raises:
        UsageError: they are not names.
    """
    if names is None:
        return []
    found = [names] if isinstance(names, str | Path) else list(names) if isinstance(names, Iterable) else [None]
    if not all(isinstance(name, str | Path) for name in found):
        raise UsageError(f"data: {names!r} is neither a name nor a list of names. Give files, globs or a hub dataset.")
    for name in found:
        check_path("name", name)
    return [str(name) for name in found]


def look_for_hub(*names: str) -> None:
    """Switch to the hub's cache if any of these names needs the hub and it cannot be reached."""
    from lowvram_chat.data.sources import is_remote
    from lowvram_chat.hub import work_offline_if_unreachable

    if any(is_remote(name) for name in names):
        work_offline_if_unreachable()
