"""The documentation matches the code: its commands parse, its files and links exist, its examples are what is printed."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lowvram_chat.cli import COMMANDS as COMMAND_NAMES
from lowvram_chat.errors import RecipeError
from lowvram_chat.recipe.yaml_file import load_recipe

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
CHECKED_OUT_FOLDERS = (
    "lowvram_chat",
    "tests",
    "benchmarks",
    "tools",
    "recipes",
    "schema",
    "docs",
    r"\.github",
    r"\.ci",
)
PATH = re.compile(rf"`((?:{'|'.join(CHECKED_OUT_FOLDERS)})/[\w./-]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
MAX_README_WORDS = 1500
CHANGELOG = "CHANGELOG.md"
"""Names files and commands of earlier versions, too."""


@cache
def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


COMMANDS = sorted(
    {
        (page, command)
        for page in PAGES
        if page != CHANGELOG
        for command in re.findall(r"python -m ((?:lowvram_chat|benchmarks)\.\w+[^`\n]*)", text_of(page))
    }
)


def test_readme_names_the_two_commands_and_every_recipe() -> None:
    assert "make quickstart" in README
    assert "make test" in README
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert f"`{path.stem}`" in README, path


def test_readme_is_short() -> None:
    assert len(README.split()) <= MAX_README_WORDS


def test_readme_shows_every_command() -> None:
    for name in COMMAND_NAMES:
        assert f"python -m lowvram_chat.{name}" in README, name
    assert README.rstrip().endswith("`tools/make_tiny_gpt2.py`.")  # a generator of tables has not cut it short


def test_the_tables_are_what_the_stored_results_say() -> None:
    checked = subprocess.run(
        [sys.executable, "tools/make_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_in_the_documentation_is_one_of_ours(page: str, command: str) -> None:
    module, *words = shlex.split(command.split("#")[0])
    main = f"{module}.__main__" if module == "benchmarks.validation" else module
    assert callable(importlib.import_module(main).main), page
    if not module.startswith("lowvram_chat"):
        return
    recipes = [word for word in words if word.endswith(".yaml")]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    if "adam_8bit" not in command:
        for recipe in recipes:
            load_recipe(ROOT / recipe, overrides)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_page_and_a_heading(page: str) -> None:
    for target, anchor in LINK.findall(text_of(page)):
        path = (PAGES[page].parent / target).resolve() if target else PAGES[page]
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target}#{anchor}"


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page != CHANGELOG])
def test_every_file_named_in_the_documentation_exists(page: str) -> None:
    missing = [name for name in PATH.findall(text_of(page)) if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing


def test_every_table_and_function_named_for_developers_exists() -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("lowvram_chat", "tests", "benchmarks", "tools")
        for path in (ROOT / folder).rglob("*.py")
    )
    names = set(re.findall(r"`(_?[a-z]+(?:_[a-z]+)+|[A-Z]+(?:_[A-Z]+)*)`", text_of("docs/developing.md")))
    assert len(names) > 20
    assert not [name for name in names if not re.search(rf"\b{name}\b", code)]


@pytest.mark.parametrize("page", [page for page in PAGES if page != CHANGELOG])
def test_every_make_target_named_in_the_documentation_exists(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"^make ([\w-]+)|`(?:\w+=\S+ )?make ([\w-]+)", text_of(page), re.MULTILINE))
    assert {name for pair in named for name in pair if name} <= targets


def test_every_message_quoted_in_troubleshooting_is_one_of_ours() -> None:
    messages = "\n".join(text for path in (ROOT / "lowvram_chat").rglob("*.py") for text in string_literals(path))
    quoted = re.findall(
        r'"([^"]+)"', " ".join(re.findall(r"^\*\*(.*?)\*\*", text_of("docs/troubleshooting.md"), re.MULTILINE))
    )
    assert len(quoted) > 20
    assert not [quote for quote in quoted for part in quote.split("...") if part.strip() not in messages]


def string_literals(path: Path) -> list[str]:
    """Return the texts in a file, with `{}` for each value in an f-string."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
    return texts


def test_the_wrong_recipe_in_readme_gives_the_message_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    words, shown = example(r"python -m lowvram_chat\.sft [^\n]*optimizer\.name=adam_8bit[^\n]*", README)
    monkeypatch.chdir(ROOT)
    path, *overrides = words
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    assert str(error.value) == shown.strip()


def test_the_plans_in_the_documentation_are_the_ones_that_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowvram_chat.planning.prediction import make_plan
    from lowvram_chat.reporting.plan_tables import show_plan

    command = r"python -m lowvram_chat\.plan [^\n]*"
    words, whole = example(command, text_of("docs/memory.md"))
    words_in_readme, excerpt = example(command, README)
    assert words_in_readme == words
    monkeypatch.setenv("COLUMNS", "80")
    path, *overrides = words
    recipe = load_recipe(ROOT / path, overrides)
    show_plan(recipe, make_plan(recipe))
    printed = capsys.readouterr().out.rstrip()
    assert printed == without_advice(whole)
    parts = [part.strip("\n") for part in without_advice(excerpt).split("...")]
    assert re.search(".*".join(map(re.escape, parts)), printed, re.DOTALL)


def example(command: str, text: str) -> tuple[list[str], str]:
    """Return the arguments of a command shown in a page, and the output shown below it."""
    shown = re.search(rf"\$ ({command})\n(.*?)```", text, re.DOTALL)
    assert shown is not None
    return shlex.split(shown[1])[3:], shown[2]


def without_advice(shown: str) -> str:
    """Return the output of a plan without its advice, which is planned in the same way and takes half a minute."""
    return shown.partition("looking for settings that fit")[0].rstrip()
