"""Loads a recipe from a YAML file and `section.key=value` overrides, or raises one error that lists every problem."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lowvram_chat.errors import NotFoundError, RecipeError, UsageError, did_you_mean
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_text import after_value, dump_yaml, parse_yaml
from lowvram_chat.units import count
from lowvram_chat.wording import kind_of, shorten


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file with `section.key=value` overrides applied.

    Raises:
        NotFoundError: the file does not exist.
        UsageError: an override is not of the form `section.key=value`.
        RecipeError: the file is not valid YAML, or settings are wrong; the message lists every problem.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such recipe file.{_nearby(path)} Give the path of a .yaml file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a UTF-8 text file. Give the path of a .yaml file.") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path}: a recipe must be a mapping of sections, and this is {kind_of(tree)}. See the examples in recipes/."
        )
    return build_recipe(tree, overrides, str(path))


def build_recipe(tree: dict[str, object], overrides: Sequence[str], where: str) -> Recipe:
    """Return the recipe of a tree of settings with `section.key=value` overrides applied; `where` begins each error.

    Raises:
        UsageError: an override is not of the form `section.key=value`.
        RecipeError: settings are wrong; the message lists every problem.
    """
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(describe_problems(error, where)) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return all settings as YAML that loads to the same recipe; settings that the optimizer does not use are left out."""
    tree = recipe.model_dump(mode="json")
    used = {"name", "weight_decay", *OPTIMIZERS[recipe.optimizer.name].reads}
    tree["optimizer"] = {name: value for name, value in tree["optimizer"].items() if name in used}
    return dump_yaml(tree)


def json_schema() -> str:
    """Return the JSON schema of recipes, which editors use for completion and checks."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


def _nearby(path: Path) -> str:
    """Return a hint at the recipe with the most similar name, in the same folder or in recipes/."""
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    return did_you_mean(path.name, [file.name for file in folder.glob("*.yaml")]) if folder.is_dir() else ""


def _apply_override(tree: dict[str, object], override: str) -> None:
    """Set one `section.key=value` override in the tree.

    Raises:
        UsageError: the override is not of this form.
        RecipeError: the value is not valid YAML.
    """
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UsageError(f"'{override}': not understood. Write section.key=value, such as train.learning_rate=3e-5.")
    node = tree
    for depth, part in enumerate(parts[:-1], start=1):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UsageError(f"'{override}': {'.'.join(parts[:depth])} is not a section. Write section.key=value.")
        node = child
    node[parts[-1]] = parse_yaml(value, f"'{override}'")
    if comment := after_value(value):
        raise UsageError(
            f"'{override}': YAML takes {comment!r} for a comment. Put the value in quotes that the shell leaves: "
            f"{key}='\"...\"'."
        )


def describe_problems(error: ValidationError, where: str) -> str:
    """Return all problems of a recipe, one on a line: path, value, what is wrong, the most similar known name."""
    lines: list[str] = []
    for detail in error.errors():
        # A check across sections reports several problems in one error, each with its own path.
        path = ".".join(str(part) for part in detail["loc"] if part not in UNION_BRANCH_NAMES)
        for text in _explain_problem(detail).split("\n"):
            line = f"  {path}: {text}" if path else f"  {text}"
            if line not in lines:
                lines.append(line)
    listed = [shorten(line) for line in lines[:MAX_PROBLEMS]]
    more = [f"  and {len(lines) - MAX_PROBLEMS:,} more"] if len(lines) > MAX_PROBLEMS else []
    return f"{where}: {count(len(lines), 'problem')} in the recipe.\n" + "\n".join([*listed, *more])


MAX_PROBLEMS = 20
"""Problems of a recipe that are listed."""

RENAMED_SETTINGS: Mapping[str, str] = {
    "model.lean_gelu": "model.fused_gelu",
    "model.lean_loss": "model.fused_loss",
    "model.lean_attention": "model.document_attention",
    "adapter.lean": "adapter.fused",
}
"""Settings that were renamed after version 0.1.0: old name -> new name."""

UNION_BRANCH_NAMES = ("str", "list[str]", "constrained-int", "constrained-float")
"""Parts of pydantic's error paths that name the branches of a union such as `str | list[str]`, not a setting."""

EXPECTED: Mapping[str, str] = {
    "model_type": "expected a section, written as indented `key: value` lines",
    "list_type": "expected a list, such as [a, b]",
    "string_type": "expected text",
    "dict_type": "expected `key: value` lines",
    "invalid_key": "a key must be text",
}
"""Type of pydantic's error -> what is wrong, in the words of a recipe."""


def _explain_problem(detail: ErrorDetails) -> str:
    """Return a sentence that says what is wrong with one value, and quotes it."""
    value = detail.get("input")
    if detail["type"] == "extra_forbidden":
        renamed = RENAMED_SETTINGS.get(".".join(map(str, detail["loc"])))
        if renamed:
            return f"this setting is called {renamed} now. Rename it."
        known = _settings_at(detail["loc"][:-1])
        hint = did_you_mean(str(detail["loc"][-1]), known) or f" Known here: {', '.join(known)}."
        return f"there is no such setting.{hint}"
    if detail["type"] == "literal_error":
        expected = detail.get("ctx", {}).get("expected", "")
        hint = did_you_mean(str(value), re.findall(r"'([^']*)'", expected))
        return f"{value!r} is not one of the choices; known: {expected}.{hint}"
    message = EXPECTED.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    end = "" if message.endswith((".", "?")) else "."
    if isinstance(value, dict) or message.startswith("'"):  # the message already quotes the value
        return f"{message}{end}"
    return f"{value!r}: {message[0].lower()}{message[1:]}{end}"


def _settings_at(location: tuple[int | str, ...]) -> list[str]:
    """Return the names of the settings of the section at a path in the recipe."""
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(str(part))
        types = [field.annotation, *get_args(field.annotation)] if field else []
        section = next((kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
    return list(section.model_fields)
