"""Every shipped recipe loads, and a recipe that is dumped and loaded again is the same recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowvram_chat.recipe.adapters import ADAPTERS
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import dump_recipe, json_schema, load_recipe
from lowvram_chat.recipe.yaml_text import _Dumper
from tests.samples import ROOT

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NEEDED = {
    "quickstart",
    "fast_fp16",
    "full_fp16",
    "full_fp16_adamw",
    "lora_fp16",
    "qlora_nf4",
    "baseline_7h27m",
    "smollm2_lora",
}


def reloaded(recipe: Recipe, folder: Path) -> Recipe:
    path = folder / "resolved.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return load_recipe(path)


def as_one_line(value: object) -> str:
    """Return a value as YAML on one line, as a user writes it in an override."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def test_the_promised_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= NEEDED


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_and_its_resolved_form_is_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert reloaded(recipe, tmp_path) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_says_what_it_is_and_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert any("recipe.schema.json" in line for line in head[:2])
    assert any(f"python -m lowvram_chat.sft {path.relative_to(ROOT).as_posix()}" in line for line in head)
    assert any("Needs" in line for line in head)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resolved_recipe_loads_with_every_optimizer(name: str, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"optimizer": {"name": name}})
    again = reloaded(recipe, tmp_path)
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_resolved_recipe_loads_with_every_adapter(kind: str, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"adapter": {"kind": kind}})
    assert reloaded(recipe, tmp_path) == recipe


def test_a_resolved_recipe_hides_no_default() -> None:
    tree = yaml.safe_load(dump_recipe(Recipe()))
    assert set(tree) == set(Recipe.model_fields)
    for section in ("model", "data", "train", "memory", "output"):
        assert set(tree[section]) == set(type(getattr(Recipe(), section)).model_fields)


def test_a_resolved_recipe_shows_only_what_the_optimizer_reads() -> None:
    assert set(yaml.safe_load(dump_recipe(Recipe.model_validate({"optimizer": {"name": "sgd"}})))["optimizer"]) == {
        "name",
        "weight_decay",
        "momentum",
    }


def test_the_json_schema_for_editors_is_current() -> None:
    assert (ROOT / "schema" / "recipe.schema.json").read_text(encoding="utf-8") == json_schema()


def test_the_json_schema_has_a_text_for_every_setting() -> None:
    for name, field in Recipe.model_fields.items():
        section = getattr(Recipe(), name)
        for setting, info in type(section).model_fields.items() if section is not None else ():
            assert info.description, f"{field.annotation} {setting} has no docstring"


@settings(deadline=None)  # the first call also imports modules
@example(learning_rate=1.0, max_length=8, seed=0, name="adamw", folder="0E0", limit=None)
@given(
    learning_rate=st.floats(1e-8, 10, allow_nan=False),
    max_length=st.integers(8, 1024),
    seed=st.integers(0, 2**31 - 1),
    name=st.sampled_from(sorted(OPTIMIZERS)),
    folder=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
    limit=st.none() | st.integers(1, 10**9),
)
def test_overrides_arrive_as_they_were_meant(
    tmp_path_factory: pytest.TempPathFactory,
    learning_rate: float,
    max_length: int,
    seed: int,
    name: str,
    folder: str,
    limit: int | None,
) -> None:
    values: dict[str, object] = {
        "train.learning_rate": learning_rate,
        "data.max_length": max_length,
        "train.seed": seed,
        "optimizer.name": name,
        "output.dir": folder,
        "data.limit": limit,
    }
    place = tmp_path_factory.mktemp("overrides")
    (place / "r.yaml").write_text("", encoding="utf-8")
    words = [f"{key}={as_one_line(value)}" for key, value in values.items()]
    recipe = load_recipe(place / "r.yaml", words)
    assert (recipe.train.learning_rate, recipe.data.max_length, recipe.train.seed) == (learning_rate, max_length, seed)
    assert (recipe.optimizer.name, recipe.output.dir, recipe.data.limit) == (name, folder, limit)
    assert reloaded(recipe, place) == recipe
