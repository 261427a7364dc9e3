"""The time model held against speeds that others have published: every row, its error, and how the row was read.

Source of the figures: the project's collected facts (the baseline's notebook; Karpathy's lecture "Let's reproduce GPT-2";
nanoGPT's README; reports of plain PyTorch on an RTX 3090).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.validation.plain_gpt import PlainGpt, PlainGptConfig
from benchmarks.validation.plain_step import PlainStep, trace_plain_step
from lowvram_chat.gpus import GPUS
from lowvram_chat.timing import fusion
from lowvram_chat.timing.roofline import Rates, seconds_per_step
from lowvram_chat.timing.speed import card_rates
from lowvram_chat.tracing.operations import Operation

TF32_TFLOPS = {"a100-40gb": 156.0, "rtx-3090-24gb": 35.6}
"""Peak rates of fp32 products as TF32. Source: NVIDIA's A100 data sheet and GA102 whitepaper."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published speed, and the run that it is taken to be of."""

    name: str
    gpu: str
    """A row of the card table; its highest power limit counts."""
    milliseconds: float
    """The figure; the shorter end where a range was published."""
    at_most: float | None = None
    """The longer end of a range, milliseconds."""
    step: PlainStep
    of_a_micro_batch: bool = False
    """Whether the figure is a step's share for one of its micro-batches."""
    tf32: bool = False
    compiled: bool = False
    pads: bool = True
    """Whether that compiler padded matrices, as torch's does from 2.2 on."""
    system: str = "linux"
    reading: str = ""
    """What the source leaves open, and how it is filled in."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A published speed beside the predicted one."""

    published: Published
    predicted_ms: float

    @property
    def error(self) -> float:
        """(predicted - published) / published; 0 inside a range, from its nearer end outside."""
        low = self.published.milliseconds
        nearest = min(max(self.predicted_ms, low), self.published.at_most or low)
        return (self.predicted_ms - nearest) / nearest


def _stock_gpt2() -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config

    return AutoModelForCausalLM.from_config(GPT2Config(), attn_implementation="eager")


@cache
def _plain(**settings: Any) -> partial[PlainGpt]:
    return partial(PlainGpt, PlainGptConfig(**settings))


BASELINE = Published(
    name="baseline, micro-batch of 4 x 128",
    gpu="rtx-3050-laptop-4gb",
    milliseconds=139.7,
    step=PlainStep(
        build=_stock_gpt2,
        rows=4,
        length=128,
        precision="fp16",
        micro_batches=4,
        clip=True,
        extra=("attention_mask",),
    ),
    of_a_micro_batch=True,
    system="windows",
    reading="power limit unknown (35 to 80 W), taken as 80 W; today's transformers in place of December 2023's",
)

A_STEP = PlainStep(build=_plain(), rows=16, length=1024)
LADDER = (
    Published(name="ladder: fp32", gpu="a100-40gb", milliseconds=1000, step=A_STEP),
    Published(name="ladder: TF32", gpu="a100-40gb", milliseconds=333, step=A_STEP, tf32=True),
    Published(
        name="ladder: bf16 autocast",
        gpu="a100-40gb",
        milliseconds=300,
        step=replace(A_STEP, precision="bf16"),
        tf32=True,
    ),
    Published(
        name="ladder: compile",
        gpu="a100-40gb",
        milliseconds=130,
        step=replace(A_STEP, precision="bf16"),
        tf32=True,
        compiled=True,
    ),
    Published(
        name="ladder: flash attention",
        gpu="a100-40gb",
        milliseconds=96,
        step=replace(A_STEP, precision="bf16", build=_plain(fused_attention=True)),
        tf32=True,
        compiled=True,
    ),
    Published(
        name="ladder: vocabulary 50,304",
        gpu="a100-40gb",
        milliseconds=93,
        step=replace(A_STEP, precision="bf16", build=_plain(fused_attention=True, vocabulary=50304)),
        tf32=True,
        compiled=True,
    ),
    Published(
        name="ladder: fused AdamW",
        gpu="a100-40gb",
        milliseconds=90,
        step=replace(
            A_STEP,
            precision="bf16",
            build=_plain(fused_attention=True, vocabulary=50304),
            fused=True,
            clip=True,
        ),
        tf32=True,
        compiled=True,
    ),
)
"""Karpathy's lecture: each step keeps those before it. Clipping came between the last two."""

NANOGPT = Published(
    name="nanoGPT, eager",
    gpu="a100-40gb",
    milliseconds=250,
    step=PlainStep(build=_plain(fused_gelu=False), rows=12, length=1024, precision="bf16", clip=True),
    tf32=True,
    reading="hard: 'an iteration' is taken as one micro-batch of 12 x 1,024 with its update (with 5 accumulated, 135 ms "
    "compiled would be above the card's peak), without dropout; all-reduce left out",
)
RTX_3090 = Published(
    name="RTX 3090, 163 M untied, TF32",
    gpu="rtx-3090-24gb",
    milliseconds=4096 / 20,
    at_most=4096 / 12,
    step=PlainStep(build=_plain(fused_gelu=False, tied=False, dropout=0.1), rows=4, length=1024),
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


def compare(rows: Sequence[Published] = PUBLISHED) -> list[Comparison]:
    """Returns each row with what the model predicts; the traces take some 20 seconds, once."""
    return [Comparison(published=row, predicted_ms=1000 * _seconds(row)) for row in rows]


def median_error(comparisons: Sequence[Comparison]) -> float:
    """Returns the median of the absolute errors of the rows that publish a figure, not a range."""
    return statistics.median(abs(row.error) for row in comparisons if row.published.at_most is None)


def largest_error(comparisons: Sequence[Comparison]) -> float:
    """Returns the largest absolute error of all rows."""
    return max(abs(row.error) for row in comparisons)


def table(comparisons: Sequence[Comparison]) -> Table:
    """Returns the comparison as a table for the terminal."""
    shown = Table("run", "card", "published ms", "predicted ms", "error")
    for row in comparisons:
        published = row.published
        figures = [published.milliseconds, *([published.at_most] if published.at_most else [])]
        shown.add_row(
            published.name,
            GPUS[published.gpu].title,
            " to ".join(f"{figure:.4g}" for figure in figures),
            f"{row.predicted_ms:.1f}",
            f"{row.error:+.1%}",
        )
    return shown


def run(*, as_json: bool) -> None:
    """Prints the comparison, and as JSON where asked."""
    comparisons = compare()
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(comparisons))
    print(
        f"median error {median_error(comparisons):.1%} of the {sum(c.published.at_most is None for c in comparisons)} rows "
        f"with a figure, largest {largest_error(comparisons):.1%}; the constants were chosen with these rows in sight"
    )
    for name, reading in {c.published.name: c.published.reading for c in comparisons if c.published.reading}.items():
        print(f"{name}: {reading}")
    if as_json:
        print(json.dumps({"rows": [_document(row) for row in comparisons]}))


def _document(row: Comparison) -> dict[str, Any]:
    return {
        "name": row.published.name,
        "gpu": row.published.gpu,
        "published_ms": row.published.milliseconds,
        "published_ms_at_most": row.published.at_most,
        "predicted_ms": round(row.predicted_ms, 2),
        "error_percent": round(100 * row.error, 2),
    }


def _seconds(row: Published) -> float:
    work = _traced(row.step)
    done = fusion.fuse(work, pads=row.pads) if row.compiled else work
    seconds = seconds_per_step(done, _rates(row), row.step.micro_batches, row.system)
    return seconds / row.step.micro_batches if row.of_a_micro_batch else seconds


@cache
def _traced(step: PlainStep) -> list[list[Operation]]:
    return trace_plain_step(step)


def _rates(row: Published) -> Rates:
    gpu = GPUS[row.gpu]
    rates = card_rates(gpu, max(gpu.fp16_tflops))
    if not row.tf32:
        return rates
    return replace(rates, single_tflops=TF32_TFLOPS[row.gpu], single_on_tensor_cores=True)
