"""What keeps the code readable: sizes, docstrings and types, measured over the whole package."""

from __future__ import annotations

import ast
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.samples import ROOT

PACKAGE = ROOT / "lowvram_chat"
FILES = sorted(PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef

MEDIAN_LINES, P90_LINES, MAX_LINES = 10, 25, 70
MAX_ANY_PER_1000_LINES = 10
MAX_SHARE_OF_A_FOLDER = 0.20


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def code_lines(function: Function) -> int:
    """Return the lines of a function without its docstring."""
    end = function.end_lineno or function.lineno
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    return end - function.lineno + 1 - ((docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0)


def public_definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Yield (name, node) of the public functions, classes and methods of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{path.name}: {node.name}", node
            for member in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(member, Function) and not member.name.startswith("_"):
                    yield f"{path.name}: {node.name}.{member.name}", member


def test_functions_are_short() -> None:
    lengths = sorted(
        (code_lines(function), f"{path.name}: {function.name}")
        for path in FILES
        for function in functions(ast.parse(path.read_text(encoding="utf-8")))
    )
    lines = [length for length, _ in lengths]
    assert statistics.median(lines) <= MEDIAN_LINES
    assert lines[round(0.9 * len(lines))] <= P90_LINES
    assert lines[-1] <= MAX_LINES, lengths[-3:]


def test_every_public_function_class_and_method_has_a_docstring() -> None:
    missing = [
        name
        for path in FILES
        for name, node in public_definitions(path)
        if isinstance(node, Function | ast.ClassDef) and ast.get_docstring(node) is None
    ]
    assert not missing


def test_every_module_has_a_docstring() -> None:
    assert not [path for path in FILES if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None]


def test_every_argument_and_result_is_annotated() -> None:
    missing = []
    for path in FILES:
        for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            bare = [one.arg for one in arguments if one.annotation is None and one.arg not in ("self", "cls")]
            if bare or function.returns is None:
                missing.append(f"{path.name}: {function.name} {bare}")
    assert not missing


def test_any_is_rare() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in FILES)
    found = len(re.findall(r"\bAny\b", text))
    assert found <= MAX_ANY_PER_1000_LINES * text.count("\n") / 1000, found


def test_no_folder_is_more_than_a_fifth_of_the_package() -> None:
    lines: Counter[str] = Counter()
    for path in FILES:
        lines[path.relative_to(PACKAGE).parts[0]] += path.read_text(encoding="utf-8").count("\n")
    folders = {name: count / lines.total() for name, count in lines.items() if not name.endswith(".py")}
    assert max(folders.values()) <= MAX_SHARE_OF_A_FOLDER, folders


def test_every_test_named_in_the_makefile_exists() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert named
    assert not [(path, name) for path, name in named if f"def {name}" not in (ROOT / path).read_text(encoding="utf-8")]


def test_no_module_imports_in_a_circle() -> None:
    imports = {module_name(path): set(imported(path)) for path in FILES}
    reached: dict[str, set[str]] = {}

    def reach(module: str) -> set[str]:
        if module not in reached:
            reached[module] = set()
            reached[module] = imports[module].union(*(reach(one) for one in imports[module]))
        return reached[module]

    assert not [module for module in imports if module in reach(module)]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports anywhere, those for type checking included."""
    known = {module_name(one) for one in FILES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lowvram_chat"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known:
                    yield full
                elif node.module != "lowvram_chat":
                    yield str(node.module)
