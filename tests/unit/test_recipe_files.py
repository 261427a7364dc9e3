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


YAML_PROBLEMS: dict[str, tuple[str, str]] = {
    "a number in base 60": ("train: {seed: 190:20:30}", "train.seed: '190:20:30'"),
    "a date with a month 13": ("train: {seed: 2024-13-45}", "train.seed: '2024-13-45'"),
    "hexadecimal without digits": ("train: {seed: 0x_}", "train.seed: '0x_'"),
    "a tag on a word": ("train:\n  seed: !!int abc", ":2:9: not valid YAML"),
    "a python tag": ("train:\n  seed: !!python/name:os.system x", "could not determine a constructor"),
    "a null character": ("model:\n  name: a\x00b", "not valid YAML"),
    "an escape sequence": ('model: {name: "\\e[31mred"}', "model.name: '\\x1b[31mred' holds the character"),
    "half a surrogate pair": ('output: {dir: "\\ud800"}', "output.dir: '\\ud800' holds the character"),
    "an empty key": ("? \n: 3", "a key must be a word"),
    "a deep list": ("model: " + 3000 * "[" + 3000 * "]", "nested too deeply"),
    "a list that contains itself": ("data: {source: &a [*a]}", "counting aliases"),
    "aliases of aliases": (
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{n}: &a{n} [{','.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 9)),
        "counting aliases",
    ),
    "a long file": ("train: {" + ", ".join(f"k{n}: 1" for n in range(60_000)) + "}", "far more than a recipe needs"),
    "many unknown settings": ("train: {" + ", ".join(f"k{n}: 1" for n in range(99)) + "}", "and 79 more"),
    "a section that is a list": ("model: [a, b]", "expected a section"),
    "a section that is true": ("memory: true", "memory: True: expected a section"),
    "a list that is a text": ("adapter: {target_modules: c_attn}", "adapter.target_modules: 'c_attn': expected a list"),
    "a number instead of sections": ("42", "a recipe must be a mapping of sections, and this is a number"),
    "a seed that numpy does not take": ("train: {seed: 4294967296}", "train.seed: 4294967296"),
    "true instead of a number": ("train: {max_steps: true}", "expected another value than true"),
    "a whole share": ("data: {max_bad_rows: 1.0}", "data.max_bad_rows"),
    "a name that no file has": (f"output: {{dir: {300 * 'x'}}}", "a file name has at most 255 bytes"),
    "an endless run": (f"train: {{max_steps: {30 * '9'}}}", "train.max_steps"),
}


@pytest.mark.parametrize("name", YAML_PROBLEMS)
def test_a_recipe_that_yaml_would_guess_or_choke_on_is_refused_in_one_message(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowvram_chat import sft

    text, words = YAML_PROBLEMS[name]
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    assert sft.main(["--print-recipe", str(path)]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith(str(path))
    assert len(message) < 20_000
    assert "\x1b" not in message
