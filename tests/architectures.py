"""What the commands do with the model families of tests/families.py: everything that is not in `REFUSED` works."""

from __future__ import annotations

from collections.abc import Mapping

COMMANDS = ("plan", "full", "full resume", "full evaluate", "lora", "lora resume", "lora evaluate", "merge", "chat")
"""What is tried with each family; a refused run has nothing to resume, evaluate or merge."""

NO_PLAN = "the planner cannot trace this model"
NO_ADAPTER = "PEFT cannot adapt this"

EXPERTS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "phimoe",
    "gpt_oss",
    "jetmoe",
    "deepseek_v3",
    "inkling_text",
)
"""Mixtures of experts: torch has no fake kernel for their grouped products in float32."""

REFUSED: Mapping[str, Mapping[str, str]] = {
    **{name: {"plan": NO_PLAN} for name in (*EXPERTS, "recurrent_gemma")},
    **{name: {"lora": NO_ADAPTER} for name in ("ctrl", "falcon_h1", "mamba")},
}
"""Family -> command -> words of the refusal."""
