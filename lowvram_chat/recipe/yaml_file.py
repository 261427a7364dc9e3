"""Loads a recipe from a YAML file and `section.key=value` overrides, or raises one error that lists every problem."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lowvram_chat.errors import NotFoundError, RecipeError, UsageError, did_you_mean
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import Recipe


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that reads `3e-4` as a number and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        """Return the mapping of a node.

        Raises:
            MarkedYAMLError: a key is not a word, or occurs twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A safe YAML dumper that quotes texts which `_Loader` would read as numbers."""


# YAML 1.1 requires a dot and a signed exponent in a number; people write 3e-4 and 1e6.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


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
    tree = _parse(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{path}: a recipe must be a mapping of sections, and this is a {type(tree).__name__}. See recipes/."
        )
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(describe_problems(error, str(path))) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return all settings as YAML that loads to the same recipe; settings that the optimizer does not use are left out."""
    tree = recipe.model_dump(mode="json")
    used = {"name", "weight_decay", *OPTIMIZERS[recipe.optimizer.name].reads}
    tree["optimizer"] = {name: value for name, value in tree["optimizer"].items() if name in used}
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def json_schema() -> str:
    """Return the JSON schema of recipes, which editors use for completion and checks."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


def _nearby(path: Path) -> str:
    """Return a hint at the recipe with the most similar name, in the same folder or in recipes/."""
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    return did_you_mean(path.name, [file.name for file in folder.glob("*.yaml")]) if folder.is_dir() else ""


def _parse(text: str, where: str) -> object:
    """Return the parsed YAML.

    Raises:
        RecipeError: the text is not valid YAML; the message names `where`, the line and the column.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{at}: not valid YAML: {error.problem}. Correct that line.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}. Correct the file.") from None


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
    node[parts[-1]] = _parse(value, f"'{override}'")


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
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return f"{where}: {count} in the recipe.\n" + "\n".join(lines)


RENAMED_SETTINGS: Mapping[str, str] = {
    "model.lean_gelu": "model.fused_gelu",
    "model.lean_loss": "model.fused_loss",
    "model.lean_attention": "model.document_attention",
    "adapter.lean": "adapter.fused",
}
"""Settings that were renamed after version 0.1.0: old name -> new name."""

UNION_BRANCH_NAMES = ("str", "list[str]")
"""Parts of pydantic's error paths that name the branches of `str | list[str]`, not a setting."""


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
    message = detail["msg"].removeprefix("Value error, ")
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
