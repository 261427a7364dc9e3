"""List the private names of libraries that the package uses, in docs/developing.md.

    python tools/list_private_names.py            rewrites the table
    python tools/list_private_names.py --check    only says whether the table is current

A private name is an underscored attribute or module of a library, or an overridden underscored method. Each must be
declared in its file with `check_private_names` (the import fails, with the library's version, if the name has gone) or
`has_private_name` (the code falls back to a public, slower way). A name that is used without either is an error.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lowvram_chat"
PAGE = ROOT / "docs" / "developing.md"
BEGIN, END = "<!-- private names -->", "<!-- /private names -->"
CHECKS = {"check_private_names": "fails with the version", "has_private_name": "falls back to a public way"}
STANDARD_NAMES = ("_", "_replace", "_asdict", "_fields", "_getframe")
"""Underscored names of Python's own library."""
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")


def is_private(name: str) -> bool:
    """Return whether a name is underscored, dunder names and those of Python's own library aside."""
    return name.startswith("_") and not name.startswith("__") and name not in STANDARD_NAMES


def declared(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, check) of each declaration in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CHECKS:
            for argument in node.args:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value), node.func.id


def own_names(tree: ast.AST) -> set[str]:
    """Return the private names that a file defines itself: functions, methods, classes, attributes of self, fields."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            names.add(node.attr)
    return names


def used(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (private name of a library, line) as a file uses it."""
    own = own_names(tree)
    overridden = set(overrides(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own or (node.attr in overridden and not _is_self(node.value)):
                yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in LIBRARIES:
            parts = str(node.module).split(".") + [alias.name for alias in node.names]
            yield from ((part, node.lineno) for part in parts if is_private(part))
    yield from ((name, 0) for name in overridden)


def overrides(tree: ast.AST) -> Iterator[str]:
    """Yield the underscored methods of classes with a base class that the file imports from a library."""
    foreign = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in LIBRARIES
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in foreign for b in node.bases):
            called = {call.attr for call in ast.walk(node) if isinstance(call, ast.Attribute) and _is_self(call.value)}
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and is_private(member.name) and member.name not in called:
                    yield member.name


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def rows() -> tuple[list[tuple[str, str, str]], list[str]]:
    """Return (name, file, check) of each declaration, and the problems: names that are used but not declared."""
    found, problems = [], []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree, name = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT).as_posix()
        checks = dict(declared(tree))
        known = {part for dotted in checks for part in dotted.split(".")}
        problems += [f"{name}:{line}: {used_name}" for used_name, line in used(tree) if used_name not in known]
        found += [(dotted, name, CHECKS[check]) for dotted, check in checks.items()]
    return sorted(found), problems


def table(found: list[tuple[str, str, str]]) -> str:
    """Return the declarations as a Markdown table."""
    lines = ["| name | used in | if it has gone |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | `{file}` | {check} |" for name, file, check in found)])


def main() -> None:
    """Write or check."""
    found, problems = rows()
    if problems:
        sys.exit(
            "private names of libraries without check_private_names or has_private_name:\n  " + "\n  ".join(problems)
        )
    old = PAGE.read_text(encoding="utf-8")
    before, _, rest = old.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        sys.exit(f"{PAGE.name}: the markers {BEGIN} and {END} are missing. Put them where the table goes.")
    new = f"{before}{BEGIN}\n{table(found)}\n{END}{after}"
    if "--check" not in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit(
            "docs/developing.md: its table of private names is not current. Run python tools/list_private_names.py."
        )


if __name__ == "__main__":
    main()
