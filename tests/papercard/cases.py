"""The runs that the planner is held against torch's allocator with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lowvram_chat.recipe.adapters import ADAPTERS
from lowvram_chat.recipe.optimizers import OPTIMIZERS

SHIPPED = ("baseline_7h27m", "fast_fp16", "full_fp16", "full_fp16_adamw", "lora_fp16", "qlora_nf4", "quickstart")
SMALL, MEDIUM = "full_fp16", "model.name=gpt2-medium"
TINY = "quickstart"

Kind = Literal["full rows", "mixed rows", "evaluated", "resumed"]
"""What a run does: all rows have the maximum length; they have any length; held-out rows are scored; it is resumed. The first is
held against the plan of the same run, and the others against the worst of all runs that a plan considers."""


@dataclass(frozen=True)
class Case:
    """A recipe with overrides, on a card of a compute capability."""

    name: str
    recipe: str
    overrides: Sequence[str] = ()
    capability: int = 86
    kind: Kind = "full rows"
    has_flash: bool = True
    """Whether torch has FlashAttention, which its builds for Windows lack."""


LORA = ("adapter.kind=lora", "optimizer.name=adamw")
VARIANTS: Mapping[str, Sequence[str]] = {
    **{f"adapter {kind}": (*LORA, f"adapter.kind={kind}") for kind in ADAPTERS},
    "adapter lora, dropout": (*LORA, "adapter.dropout=0.05"),
    "adapter lora, not fused": (*LORA, "adapter.fused=false"),
    **{f"optimizer {name}": (f"optimizer.name={name}",) for name in OPTIMIZERS},
    "fp32": ("train.precision=fp32",),
    "bf16": ("train.precision=bf16",),
    "packed": ("data.rows=packed",),
    "packed, lora": ("data.rows=packed", *LORA),
    "checkpointed": ("train.gradient_checkpointing=true",),
    "checkpointed, lora": ("train.gradient_checkpointing=true", *LORA),
    "without accumulation": ("train.gradient_accumulation_steps=1",),
    "one row": ("train.per_device_train_batch_size=1",),
    "attention mask": ("data.attention_mask=true",),
    "eager attention": ("model.attention=eager",),
    "own loss": ("model.fused_loss=false",),
    "own gelu": ("model.fused_gelu=false",),
    "dropout": ("model.dropout=0.1",),
    "fp16 base, lora": ("model.dtype=float16", *LORA),
    "4-bit base, lora": ("model.dtype=float16", "model.load_in=4bit", *LORA),
    "4-bit base, dora": ("model.dtype=float16", "model.load_in=4bit", *LORA, "adapter.kind=dora"),
    "4-bit base, checkpointed": (
        *("model.dtype=float16", "model.load_in=4bit", "train.gradient_checkpointing=true"),
        *LORA,
    ),
}
"""Name -> overrides of a recipe for full fine-tuning."""
MEDIUM_VARIANTS = ("adapter lora", "adapter dora", "optimizer adamw_8bit", "packed", "checkpointed", "4-bit base, lora")
OTHER_CAPABILITIES = (75, 80, 89)


def all_cases() -> Iterator[Case]:
    """Yield the cases: the shipped recipes, their variants at three sizes, and other cards."""
    for recipe in SHIPPED:
        yield Case(recipe, recipe)
    for name, overrides in VARIANTS.items():
        yield Case(f"gpt2, {name}", SMALL, overrides)
        yield Case(f"tiny, {name}", TINY, ("adapter=null", *tiny_precision(overrides), *overrides))
    for name in MEDIUM_VARIANTS:
        yield Case(f"gpt2-medium, {name}", SMALL, (MEDIUM, "train.per_device_train_batch_size=1", *VARIANTS[name]))
    for capability in OTHER_CAPABILITIES:
        for recipe in ("full_fp16", "lora_fp16", "fast_fp16"):
            yield Case(f"{recipe}, compute capability {capability / 10}", recipe, capability=capability)
    for name in ("full_fp16", "lora_fp16"):
        yield Case(f"{name}, kernels of Windows", name, has_flash=False)
        yield Case(f"{name}, packed, kernels of Windows", name, ("data.rows=packed",), has_flash=False)
    for kind in get_args(Kind)[1:]:
        for recipe in ("full_fp16", "lora_fp16", "quickstart"):
            yield Case(f"{recipe}, {kind}", recipe, kind=kind)
    yield Case("full_fp16, attention mask, mixed rows", "full_fp16", ("data.attention_mask=true",), kind="mixed rows")
    yield Case("full_fp16, packed, mixed rows", "full_fp16", ("data.rows=packed",), kind="mixed rows")
    yield Case("gpt2, adapter dora, evaluated", SMALL, VARIANTS["adapter dora"], kind="evaluated")
    yield Case("full_fp16 paged, resumed", "full_fp16", ("optimizer.name=paged_adamw_8bit",), kind="resumed")


def tiny_precision(overrides: Sequence[str]) -> Sequence[str]:
    """Return fp16 for the tiny model, whose recipe is for a CPU, unless a variant sets a precision."""
    return () if any(word.startswith("train.precision") for word in overrides) else ("train.precision=fp16",)
