"""Parses the YAML of recipes: safe, with numbers as people write them, and with an error for whatever YAML would guess."""

from __future__ import annotations

import re
from collections.abc import Hashable

import yaml

from lowvram_chat.errors import RecipeError

MAX_CHARACTERS = 1 << 18
"""Longest recipe (256 Ki characters). The longest of the shipped ones has 2,000."""
MAX_VALUES = 20_000
"""Most values of a recipe, where what an alias (*name) stands for counts each time."""


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that reads `3e-4` as a number, and refuses duplicate keys and values that are not what they seem."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        """Return the mapping of a node.

        Raises:
            MarkedYAMLError: a key is not a word, or occurs twice.
        """
        if not isinstance(node, yaml.MappingNode):  # a word with the tag of a mapping
            raise yaml.MarkedYAMLError(problem="expected a mapping", problem_mark=node.start_mark)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        """Return the value of a node.

        Raises:
            MarkedYAMLError: the text is not of the type that its tag or its form says.
        """
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None
        except (
            LookupError,
            TypeError,
            AttributeError,
        ):  # PyYAML's constructors take for granted that the text has their form
            problem = f"the text is not what its tag {node.tag} says"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """A safe YAML dumper that quotes texts which `_Loader` would read as numbers."""


GUESSED_TYPES = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
"""Types whose forms in YAML 1.1 surprise: 190:20:30 is a number in base 60, 010 is 8, 2024-01-01 a date."""
INTEGER = re.compile(r"^[-+]?(0|[1-9][0-9_]*)$")
FLOAT = re.compile(
    r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\d+[eE][-+]?\d+$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)

for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag not in GUESSED_TYPES]
        for first, forms in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def dump_yaml(tree: dict[str, object]) -> str:
    """Return a tree as YAML that `parse_yaml` reads as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> object:
    """Return the value of a YAML text.

    Raises:
        RecipeError: the text is not valid YAML, or too large; the message names `where`, the line and the column.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(
            f"{where}: has {len(text):,} characters, far more than a recipe needs. Give the path of a recipe."
        )
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > MAX_VALUES:
            raise RecipeError(
                f"{where}: has more than {MAX_VALUES:,} values, counting aliases (*name). Write it without them."
            )
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{at}: not valid YAML: {error.problem}. Correct that line.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}. Correct the file.") from None
    except RecursionError:
        raise RecipeError(f"{where}: lists or mappings are nested too deeply. Correct the file.") from None
    except OverflowError:  # PyYAML's scanner makes a character of every \\U
        raise RecipeError(f"{where}: not valid YAML: an escape names no character. Correct the file.") from None


def after_value(text: str) -> str:
    """Return what follows the value of a valid YAML text: a comment; empty if nothing does."""
    node = yaml.compose(text, Loader=_Loader)
    return text[node.end_mark.index if node else 0 :].strip()


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Return the number of values in a node, with all that aliases stand for; one that contains itself has infinitely many."""
    if id(node) not in counted:
        counted[id(node)] = MAX_VALUES + 1  # until it is known: met again inside itself, it has no end
        children = (part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,)))
        is_scalar = isinstance(node, yaml.ScalarNode)
        counted[id(node)] = 1 if is_scalar else 1 + sum(_count_values(child, counted) for child in children)
    return counted[id(node)]
