"""The rows of a CSV file of published training speeds, and the training step that each specifies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.validation.card_rates import find_card
from benchmarks.validation.csv_rows import MeasuredRow, choose, count, shown
from benchmarks.validation.measured_runs import MAX_BATCH, MAX_SEQ_LEN, causal_model_type, checked_config
from benchmarks.validation.plain_gpt import PlainGptConfig
from benchmarks.validation.plain_step import PlainStep
from benchmarks.validation.published_runs import plain_gpt, stock_model
from lowvram_chat.timing.roofline import Rates

REQUIRED_COLUMNS = (
    "id",
    "gpu",
    "model_type",
    "config",
    "batch",
    "seq_len",
    "precision",
    "optimizer",
    "attention",
    "loss",
    "mask",
    "adapter",
    "compiled",
    "checkpointing",
    "measured_tokens_per_second",
    "note",
)
OWN_CODE = re.compile(r"own code \(GPT-2 (?:124 M|163 M untied)(?:, V=(?P<vocabulary>\d{1,6}))?\)")
"""The hand-written models that are traced: 12 layers of width 768, with a tied (124 M) or a separate (163 M) head."""
ACCUMULATION = re.compile(r"\baccumulation (\d{1,4})\b")
"""How a row's note states the micro-batches of an optimizer step."""
PRECISIONS = {
    "fp32": ("fp32", torch.float32),
    "tf32": ("fp32", torch.float32),
    "fp16 autocast": ("fp16", torch.float32),
    "bf16 autocast": ("bf16", torch.float32),
    "fp16 weights": ("fp32", torch.float16),
    "bf16 weights": ("fp32", torch.bfloat16),
}
"""First part of a row's precision -> autocast type ("fp32": none) and type of the weights."""
OPTIMIZERS = ("none", "AdamW", "AdamW fused")


class CannotTrace(Exception):
    """A row that is right but outside of what is traced; the message is the reason."""


class Run(NamedTuple):
    """What a row specifies."""

    step: PlainStep
    rates: Rates
    compiled: bool


def published_run(row: MeasuredRow) -> Run:
    """Return the step and the card of a row.

    Raises:
        CannotTrace: the row is right but cannot be predicted.
        UsageError: a cell is wrong; the message names the row and the column.
    """
    if row["adapter"].strip():
        raise CannotTrace(f"adapters are not traced here ({shown(row['adapter'])})")
    if row["checkpointing"].strip() not in ("", "no"):
        raise CannotTrace("gradient checkpointing is not traced here")
    if row["seq_len"].startswith("<"):
        raise CannotTrace(f"its rows vary in length ({shown(row['seq_len'])})")
    card = find_card(row["gpu"])
    if card is None:
        raise CannotTrace(f"no rates are known for the card {shown(row['gpu'])}")
    precision, tf32 = _precision(row)
    step = _step(row, count(row, "batch", MAX_BATCH), count(row, "seq_len", MAX_SEQ_LEN), precision)
    return Run(step, card.rates(tf32=tf32), choose(row, "compiled", ("", "no", "yes")) == "yes")


def _precision(row: MeasuredRow) -> tuple[tuple[str, torch.dtype], bool]:
    """Return the autocast type and the type of the weights, and whether fp32 products run as TF32."""
    first, *more = (part.strip() for part in row["precision"].split(","))
    kind = first.casefold()
    if kind not in PRECISIONS or any(part.casefold() != "tf32" for part in more):
        raise CannotTrace(f"the precision {shown(row['precision'])} is not traced")
    return PRECISIONS[kind], kind == "tf32" or bool(more)


def _step(row: MeasuredRow, rows: int, length: int, precision: tuple[str, torch.dtype]) -> PlainStep:
    optimizer, *clipping = (part.strip() for part in row["optimizer"].split(","))
    if optimizer not in OPTIMIZERS or clipping not in ([], ["clip 1.0"]):
        raise CannotTrace(f"the optimizer {shown(row['optimizer'])} is not traced")
    accumulated = ACCUMULATION.search(row["note"])
    autocast_type, weights = precision
    return PlainStep(
        build=_model(row, length),
        rows=rows,
        length=length,
        precision=autocast_type,
        weights=weights,
        micro_batches=max(1, int(accumulated.group(1))) if accumulated else 1,
        optimizer=optimizer != "none",
        fused=optimizer == "AdamW fused",
        clip=bool(clipping),
        sums_logits=_sums_logits(row),
        extra=("attention_mask",) if choose(row, "mask", ("ones", "none")) == "ones" else (),
    )


def _model(row: MeasuredRow, length: int) -> Callable[[], torch.nn.Module]:
    """Return what builds a row's model."""
    if row["model_type"].startswith("own code"):
        return plain_gpt(_own_code(row, length))
    model_type = causal_model_type(row)
    checked_config(row)
    return stock_model(model_type, row["config"], choose(row, "attention", ("eager", "sdpa")))


def _own_code(row: MeasuredRow, length: int) -> PlainGptConfig:
    """Return the shape of a hand-written GPT-2.

    The 163 M one is that of Raschka's LLMs-from-scratch: dropout 0.1, GELU by formula and, at first, attention by formula.
    """
    code = OWN_CODE.fullmatch(row["model_type"])
    if code is None:
        raise CannotTrace(f"the model {shown(row['model_type'])} is not described well enough")
    if row["mask"] != "none" or row["loss"] != "logits":
        raise CannotTrace("hand-written models are traced without a mask and with their own loss")
    is_untied = "untied" in row["model_type"]
    default = PlainGptConfig()
    return PlainGptConfig(
        vocabulary=max(1, int(code["vocabulary"] or default.vocabulary)),
        positions=max(length, default.positions),
        dropout=0.1 if is_untied else 0.0,
        tied=not is_untied,
        fused_attention=choose(row, "attention", ("own", "eager", "sdpa")) == "sdpa",
        fused_gelu=not is_untied,
    )


def _sums_logits(row: MeasuredRow) -> bool:
    if row["loss"] not in ("logits", "logits.sum()"):
        raise CannotTrace(f"the loss {shown(row['loss'])} is not traced")
    return row["loss"] == "logits.sum()"
