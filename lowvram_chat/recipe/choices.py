"""Types of settings: names out of a table, and numbers within bounds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from lowvram_chat.errors import did_you_mean
from lowvram_chat.gpus import GPUS
from lowvram_chat.recipe.adapters import ADAPTERS, REFUSED_ADAPTERS
from lowvram_chat.recipe.formats import FORMATS
from lowvram_chat.recipe.optimizers import OPTIMIZERS


def _one_of(known: Iterable[str], descriptions: Iterable[str] = ()) -> tuple[AfterValidator, FieldInfo]:
    """Return the metadata that restricts a `str` field to the names of a table: a check and a JSON-schema `enum`.

    Editors show `descriptions`, one for each name, beside the names.
    """
    names, texts = list(known), list(descriptions)

    def check(value: str) -> str:
        if value in REFUSED_ADAPTERS and value not in names:
            raise ValueError(f"'{value}' {REFUSED_ADAPTERS[value]}; known: {', '.join(names)}")
        if value not in names:
            raise ValueError(f"unknown choice; known: {', '.join(names)}.{did_you_mean(value, names)}".rstrip("."))
        return value

    extra: JsonDict = {"enum": [*names]}
    if texts:
        extra["enumDescriptions"] = [*texts]
    choices: FieldInfo = Field(json_schema_extra=extra)
    return AfterValidator(check), choices


ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
HUB_KERNEL = re.compile(r"kernels-community/[\w.-]+(@[\w.-]+)?(:\w+)?")
"""A compiled attention kernel of the hub. It is code that runs, so transformers loads only those of this organisation."""


def _check_attention(name: str) -> str:
    if name not in ATTENTIONS and not HUB_KERNEL.fullmatch(name):
        raise ValueError(
            f"unknown choice; known: {', '.join(ATTENTIONS)}, and the hub's kernels-community/<name>."
            f"{did_you_mean(name, ATTENTIONS)}".rstrip(".")
        )
    return name


def portable_attention(name: str) -> str:
    """Return an attention implementation that computes the same function on every device."""
    return name if name == "eager" else "sdpa"


AttentionName = Annotated[
    str,
    AfterValidator(_check_attention),
    Field(json_schema_extra={"anyOf": [{"enum": [*ATTENTIONS]}, {"pattern": f"^{HUB_KERNEL.pattern}$"}]}),
]
OptimizerName = Annotated[str, *_one_of(OPTIMIZERS)]
AdapterKind = Annotated[str, *_one_of(ADAPTERS)]
AUTO = "auto"
"""`memory.gpu`: the card of this machine."""
GpuName = Annotated[str, *_one_of([AUTO, *GPUS], ["the card of this machine", *(gpu.title for gpu in GPUS.values())])]
FormatName = Annotated[str, *_one_of(FORMATS, (kind.description for kind in FORMATS.values()))]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Rate = Annotated[float, Field(gt=0, le=10**6)]
Share = Annotated[float, Field(ge=0, lt=1)]
