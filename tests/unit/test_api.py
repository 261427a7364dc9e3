"""The Python API: its names, its documentation, and how little its import costs."""

from __future__ import annotations

import ast
import inspect
import math
import re
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram_chat import api
from lowvram_chat.errors import UsageError
from tests.samples import ROOT

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "numpy", "pydantic", "rich")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_documented_names_are_the_exported_ones() -> None:
    functions = {
        name for name, value in vars(api).items() if inspect.isfunction(value) and value.__module__ == api.__name__
    }
    assert functions == set(api.__all__)
    documented = set(re.findall(r"\bapi\.(\w+)", README))
    assert documented == set(api.__all__)


@pytest.mark.parametrize("name", api.__all__)
def test_a_function_is_documented_with_its_arguments_and_errors(name: str) -> None:
    function = getattr(api, name)
    documentation = inspect.getdoc(function) or ""
    assert "Raises:" in documentation
    optional = [p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    missing = [
        argument for argument in optional if f"`{argument}" not in documentation and argument not in documentation
    ]
    assert not missing


@pytest.mark.parametrize("name", api.__all__)
def test_a_function_is_typed(name: str) -> None:
    function = getattr(api, name)
    assert "return" in function.__annotations__
    assert set(inspect.signature(function).parameters) <= set(function.__annotations__)


def test_the_annotations_name_what_exists() -> None:
    tree = ast.parse(Path(inspect.getfile(api)).read_text(encoding="utf-8"))
    namespace = dict(vars(typing)) | vars(api)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), "types", "exec"), namespace)
    for name in api.__all__:
        typing.get_type_hints(getattr(api, name), namespace)


def test_importing_imports_nothing_heavy() -> None:
    code = "import sys, lowvram_chat.api; print(sorted(set(sys.argv[1:]) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_importing_takes_under_a_fifth_of_a_second() -> None:
    def seconds(code: str) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
            times.append(time.perf_counter() - started)
        return min(times)

    assert seconds("import lowvram_chat.api") - seconds("pass") < 0.2


def test_a_wrong_batch_size_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(UsageError, match="batch_size: 0 is not a whole number above 0"):
        api.evaluate("no-such-model", "builtin:chitchat-held-out", batch_size=0)


def test_a_plan_is_shown_as_html_in_a_notebook() -> None:
    recipe = api.load_recipe(ROOT / "recipes" / "quickstart.yaml")
    plan = api.plan(recipe)
    html = plan._repr_html_()
    assert "fits on RTX 3050 Laptop 4 GB, Linux" in html
    assert html.count("<tr>") == 1 + sum(size > 0 for size in plan.categories.values())
    shares = [float(share) for share in re.findall(r"width:([\d.]+)%;background", html)]
    assert sum(shares) == pytest.approx(100 * plan.on_card_bytes / plan.limit_bytes, abs=0.1)
    assert html.count("<div") == html.count("</div>")


def test_a_plan_that_does_not_fit_says_so_in_html() -> None:
    recipe = api.load_recipe(ROOT / "recipes" / "quickstart.yaml", "memory.limit_mib=310")
    html = api.plan(recipe)._repr_html_()
    assert "DOES NOT FIT in memory.limit_mib = 310 MiB" in html
    assert "usable: 310 MiB" in html


@pytest.mark.parametrize("wrong", ["recipes/quickstart.yaml", Path("recipes/quickstart.yaml"), None, {}])
@pytest.mark.parametrize("name", ["plan", "search", "train"])
def test_what_is_no_recipe_is_refused(name: str, wrong: object) -> None:
    with pytest.raises(UsageError, match=r"is not a Recipe. Load it with load_recipe"):
        getattr(api, name)(wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.load_recipe(None), "path: None is not a path"),  # type: ignore[arg-type]
        (lambda: api.load_recipe("r.yaml", {"train.max_steps": 1}), "an override is not a text"),  # type: ignore[arg-type]
        (lambda: api.merge(None), "run: None is not a path"),  # type: ignore[arg-type]
        (lambda: api.merge("run", dtype="int8"), "the type 'int8' is not known"),
        (lambda: api.evaluate("m", 3), "data: 3 is neither a name nor a list of names"),  # type: ignore[arg-type]
        (lambda: api.evaluate("m", "d", batch_size=1.5), "batch_size: 1.5 is not a whole number"),  # type: ignore[arg-type]
        (lambda: api.open_chat("m", temperature=math.inf), "temperature: inf is neither 0 nor"),
        (lambda: api.open_chat("m", temperature=math.nan), "temperature: nan is neither 0 nor"),
        (lambda: api.open_chat("m", temperature="0.7"), "temperature: '0.7' is not a number"),  # type: ignore[arg-type]
        (lambda: api.open_chat("m", seed=10**30), "seed: 1000"),
        (lambda: api.open_chat("m", system=3), "system: 3 is not a text"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_argument_is_told_in_a_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError) as error:
        call()
    assert message in str(error.value)


def test_resume_and_overwrite_exclude_each_other() -> None:
    recipe = api.load_recipe(ROOT / "recipes" / "quickstart.yaml")
    with pytest.raises(UsageError, match="exclude each other"):
        api.train(recipe, resume=True, overwrite=True)
