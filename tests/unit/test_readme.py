"""README says what the code does: its commands parse, its recipes exist, its wrong recipe gives the message it shows."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lowvram_chat.cli import COMMANDS as COMMAND_NAMES
from lowvram_chat.errors import RecipeError
from lowvram_chat.recipe.yaml_file import load_recipe

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"python -m (lowvram_chat\.\w+[^`\n]*)", README)))
WRONG = re.search(
    r"\$ python -m lowvram_chat\.sft ([^\n]*optimizer\.name=adam_8bit[^\n]*)\n(.*?)```", README, re.DOTALL
)


def test_readme_names_the_two_commands_and_every_recipe() -> None:
    assert "make quickstart" in README
    assert "make test" in README
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert f"`{path.stem}`" in README, path


def test_the_tables_are_what_the_stored_results_say() -> None:
    checked = subprocess.run(
        [sys.executable, "tools/make_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_readme_shows_every_command() -> None:
    for name in COMMAND_NAMES:
        assert f"python -m lowvram_chat.{name}" in README, name
    assert README.rstrip().endswith("`tools/make_tiny_gpt2.py`.")  # a generator of tables has not cut it short


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_readme_is_one_of_ours(command: str) -> None:
    module, *words = shlex.split(command.split("#")[0])
    assert callable(importlib.import_module(module).main)
    overrides = [word for word in words[1:] if "=" in word and not word.startswith("-")]
    if words and words[0].endswith(".yaml") and "adam_8bit" not in command:
        load_recipe(ROOT / words[0], overrides)


def test_the_wrong_recipe_in_readme_gives_the_message_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert WRONG is not None
    monkeypatch.chdir(ROOT)
    path, *overrides = shlex.split(WRONG[1])
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    assert str(error.value) == WRONG[2].strip()


def test_the_plan_in_readme_is_the_one_that_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowvram_chat.planning.prediction import make_plan
    from lowvram_chat.reporting.plan_tables import show_plan

    # The advice below it is planned in the same way, and takes half a minute.
    shown = re.search(
        r"\$ python -m lowvram_chat\.plan ([^\n]*)\n(.*?)looking for settings that fit", README, re.DOTALL
    )
    assert shown is not None
    monkeypatch.setenv("COLUMNS", "80")
    path, *overrides = shlex.split(shown[1])
    recipe = load_recipe(ROOT / path, overrides)
    show_plan(recipe, make_plan(recipe))
    assert capsys.readouterr().out.rstrip() == shown[2].rstrip()
