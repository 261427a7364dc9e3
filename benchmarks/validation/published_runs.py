"""The published training speeds that the time model is compared with, and how each is read as a training step.

Source of the figures: the project's collected facts (the baseline's notebook; Karpathy's lecture "Let's reproduce GPT-2";
nanoGPT's README; reports of plain PyTorch on an RTX 3090).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache, partial

from transformers import PreTrainedModel

from benchmarks.validation.plain_gpt import PlainGpt, PlainGptConfig
from benchmarks.validation.plain_step import PlainStep
from benchmarks.validation.stock_run import build_stock_model


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published time per step, and the step that it is taken to be of."""

    name: str
    gpu: str
    """A key of `lowvram_chat.gpus.GPUS`; its rates at the highest power limit count."""
    milliseconds: float
    """The published time; the lower end where a range was published."""
    at_most: float | None = None
    """The upper end of a range, in milliseconds."""
    step: PlainStep
    of_a_micro_batch: bool = False
    """Whether the figure is the time of one micro-batch, with its share of the update."""
    tf32: bool = False
    """Whether fp32 matrix products run as TF32."""
    compiled: bool = False
    """Whether the model is under `torch.compile`."""
    pads: bool = True
    """Whether the compiler pads unaligned matrices, as torch does from version 2.2 on."""
    system: str = "linux"
    """"linux" or "windows"; kernel launches take longer on Windows."""
    reading: str = ""
    """What the source leaves open, and what is assumed for it."""


@cache
def plain_gpt(shape: PlainGptConfig) -> partial[PlainGpt]:
    """Return what builds a hand-written GPT-2: the same object for the same shape, so that it is traced once."""
    return partial(PlainGpt, shape)


@cache
def stock_model(model_type: str, config: str, attention: str) -> partial[PreTrainedModel]:
    """Return what builds a transformers model from its configuration as JSON: the same object for the same model."""
    return partial(build_stock_model, model_type, json.loads(config), attention)


BASELINE = Published(
    name="baseline, micro-batch of 4 x 128",
    gpu="rtx-3050-laptop-4gb",
    milliseconds=139.7,
    step=PlainStep(
        build=stock_model("gpt2", "{}", "eager"),
        rows=4,
        length=128,
        precision="fp16",
        micro_batches=4,
        clip=True,
        extra=("attention_mask",),
    ),
    of_a_micro_batch=True,
    system="windows",
    reading="the power limit is unknown (35 to 80 W) and taken as 80 W; the installed transformers stands in for that of "
    "December 2023",
)

FUSED_ATTENTION = plain_gpt(PlainGptConfig(fused_attention=True))
ALIGNED_VOCABULARY = plain_gpt(PlainGptConfig(fused_attention=True, vocabulary=50304))


def _rung(name: str, milliseconds: float, step: PlainStep, *, tf32: bool = True, compiled: bool = False) -> Published:
    return Published(
        name=f"ladder: {name}", gpu="a100-40gb", milliseconds=milliseconds, step=step, tf32=tf32, compiled=compiled
    )


FP32 = PlainStep(build=plain_gpt(PlainGptConfig()), rows=16, length=1024)
BF16 = replace(FP32, precision="bf16")
LADDER = (
    _rung("fp32", 1000, FP32, tf32=False),
    _rung("TF32", 333, FP32),
    _rung("bf16 autocast", 300, BF16),
    _rung("compile", 130, BF16, compiled=True),
    _rung("flash attention", 96, replace(BF16, build=FUSED_ATTENTION), compiled=True),
    _rung("vocabulary 50,304", 93, replace(BF16, build=ALIGNED_VOCABULARY), compiled=True),
    _rung("fused AdamW", 90, replace(BF16, build=ALIGNED_VOCABULARY, fused=True, clip=True), compiled=True),
)
"""Karpathy's lecture: each rung keeps the changes of those before it. Clipping was added between the last two."""

NANOGPT = Published(
    name="nanoGPT, eager",
    gpu="a100-40gb",
    milliseconds=250,
    step=PlainStep(
        build=plain_gpt(PlainGptConfig(fused_gelu=False)), rows=12, length=1024, precision="bf16", clip=True
    ),
    tf32=True,
    reading="hard: 'an iteration' is taken as one micro-batch of 12 x 1,024 with its update (with 5 accumulated, 135 ms "
    "compiled would exceed the card's peak rate), without dropout; all-reduce is left out",
)
RTX_3090 = Published(
    name="RTX 3090, 163 M untied, TF32",
    gpu="rtx-3090-24gb",
    milliseconds=4096 / 20,
    at_most=4096 / 12,
    step=PlainStep(build=plain_gpt(PlainGptConfig(fused_gelu=False, tied=False, dropout=0.1)), rows=4, length=1024),
    tf32=True,
    reading="12,000 to 20,000 tokens/s; the batch is taken as 4 x 1,024",
)

PUBLISHED: tuple[Published, ...] = (
    BASELINE,
    replace(BASELINE, name="baseline, step of 4 x 4 x 128", milliseconds=558.7, of_a_micro_batch=False),
    *LADDER,
    NANOGPT,
    replace(NANOGPT, name="nanoGPT, compiled", milliseconds=135, compiled=True, pads=False),
    RTX_3090,
    replace(RTX_3090, name="RTX 3090, 163 M untied, bf16", step=replace(RTX_3090.step, precision="bf16")),
)
