"""A YAML file and `section.key=value` words become a Recipe, or one error that lists every problem."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lowvram_chat.errors import NotFoundError, RecipeError, UsageError, did_you_mean
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import Recipe


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that reads `3e-4` as a number and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper that puts text in quotes which `_Loader` would read as a number."""


# YAML 1.1 wants a dot and a sign in the exponent; people write 3e-4 and 1e6.
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file with `section.key=value` words applied.

    Raises:
        NotFoundError: there is no such file.
        UsageError: an override is not of the form `section.key=value`.
        RecipeError: the YAML or any of its settings is wrong; the message lists every problem.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such recipe file.{_nearby(path)} Give the path of a .yaml file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file in UTF-8. Give the path of a .yaml file.") from None
    tree = _parse(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is a {type(tree).__name__}. See recipes/.")
    for word in overrides:
        _apply(tree, word)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(describe_problems(error, str(path))) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that loads to the same recipe."""
    tree = recipe.model_dump(mode="json")
    read = OPTIMIZERS[recipe.optimizer.name].reads
    tree["optimizer"] = {k: v for k, v in tree["optimizer"].items() if k in read or k in ("name", "weight_decay")}
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def json_schema() -> str:
    """Return the JSON schema of recipes, as editors read it."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


def _nearby(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    return did_you_mean(path.name, [p.name for p in folder.glob("*.yaml")]) if folder.is_dir() else ""


def _parse(text: str, where: str) -> Any:
    """Return the parsed YAML.

    Raises:
        RecipeError: with line and column.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{at}: not valid YAML: {error.problem}. Mend that line.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}. Mend the file.") from None


def _apply(tree: dict[str, Any], word: str) -> None:
    """Set what a `section.key=value` word says in the tree."""
    key, equals, value = word.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UsageError(f"'{word}': not understood. Write section.key=value, such as train.learning_rate=3e-5.")
    node = tree
    for depth, part in enumerate(parts[:-1], start=1):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UsageError(f"'{word}': {'.'.join(parts[:depth])} is not a section. Write section.key=value.")
        node = child
    node[parts[-1]] = _parse(value, f"'{word}'")


def describe_problems(error: ValidationError, where: str) -> str:
    """Return every problem of a recipe, one a line: path, value, what is wrong, the nearest known name."""
    lines: list[str] = []
    for detail in error.errors():
        # A section-spanning check puts several problems into one error, each with its own path.
        path = ".".join(str(part) for part in detail["loc"] if part not in UNION_BRANCH_NAMES)
        for text in _sentence(detail).split("\n"):
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
"""Settings of version 0.1.0 that have another name now."""

UNION_BRANCH_NAMES = ("str", "list[str]")
"""What pydantic puts into a path for the branches of `str | list[str]`."""


def _sentence(detail: ErrorDetails) -> str:
    """Return what is wrong with one value, with the value."""
    value = detail.get("input")
    if detail["type"] == "extra_forbidden":
        renamed = RENAMED_SETTINGS.get(".".join(map(str, detail["loc"])))
        if renamed:
            return f"this setting is called {renamed} now. Rename it."
        known = _fields_at(detail["loc"][:-1])
        hint = did_you_mean(str(detail["loc"][-1]), known) or f" Known here: {', '.join(known)}."
        return f"there is no such setting.{hint}"
    if detail["type"] == "literal_error":
        expected = detail.get("ctx", {}).get("expected", "")
        hint = did_you_mean(str(value), re.findall(r"'([^']*)'", expected))
        return f"{value!r} is not a choice; known: {expected}.{hint}"
    message = detail["msg"].removeprefix("Value error, ")
    end = "" if message.endswith((".", "?")) else "."
    if isinstance(value, dict) or message.startswith("'"):  # the message names the value itself
        return f"{message}{end}"
    return f"{value!r}: {message[0].lower()}{message[1:]}{end}"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Return the names of the settings at a place in the recipe."""
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(str(part))
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        section = next((t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)), section)
    return list(section.model_fields)
