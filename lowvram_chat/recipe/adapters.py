"""The adapter kinds a recipe can name, and those that are refused on GPT-2 with the reason.

Both tables were found by training, merging and reloading each kind on GPT-2's Conv1D layers with PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
"""Kind -> what it adds to `peft.LoraConfig`."""

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
"""Kind -> why it is refused."""

REFUSED_TARGETS: Mapping[str, str] = {
    "wte": "merges wrongly: GPT-2's input embedding is tied to its output head",
    "lm_head": "merges wrongly: GPT-2's output head is tied to its input embedding",
    "embed_tokens": "merges wrongly where the embedding is tied to the output head",
}
"""Module name -> why no adapter goes there."""
