"""The kinds of adapter that a recipe can name, and the kinds and target layers that are refused, with the reason.

The tables record what happened when each kind was trained, merged and reloaded on GPT-2's Conv1D layers with PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict


class LoraOptions(TypedDict, total=False):
    """Arguments of `peft.LoraConfig` that distinguish one kind of adapter from plain LoRA."""

    use_rslora: bool
    use_dora: bool
    init_lora_weights: Literal["pissa"]


ADAPTERS: Mapping[str, LoraOptions] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
"""Kind -> additional arguments of `peft.LoraConfig`."""

_FAILS = "fails on GPT-2's Conv1D layers in PEFT"
REFUSED_ADAPTERS: Mapping[str, str] = {
    "olora": _FAILS,
    "loha": _FAILS,
    "lokr": _FAILS,
    "oft": _FAILS,
    "boft": _FAILS,
    "hra": _FAILS,
    "miss": _FAILS,
    "shira": _FAILS,
    "road": _FAILS,
}
"""Kind -> the reason why it is refused."""

REFUSED_TARGETS: Mapping[str, str] = {
    "wte": "merges wrongly: GPT-2's input embedding is tied to its output head",
    "lm_head": "merges wrongly: GPT-2's output head is tied to its input embedding",
    "embed_tokens": "merges wrongly where the embedding is tied to the output head",
}
"""Module name -> the reason why it cannot have an adapter."""
