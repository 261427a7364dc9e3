"""`bench run`: a recipe measured on this machine, beside its prediction and the published baseline."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from lowvram_chat.memory.plan import plan
from lowvram_chat.memory.speed import predict
from lowvram_chat.recipe.gpus import GPUS, MIB
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.results import machine
from lowvram_chat.results.record import Metric, Record, spread
from lowvram_chat.results.suite_page import BASELINE_TOKENS_PER_SECOND

BENCHMARK = "run"
RATE_NOISE, MEMORY_NOISE = 0.05, 0.02
"""Relative change that counts as noise: of a rate, of a peak."""


def measured(recipe: Recipe, name: str, steps: int) -> Record:
    """Return the record of a recipe's `steps` steps on this machine; memory and speed each in a process of its own.

    Raises:
        LowVramError: as a run with this recipe.
    """
    here = machine.this_machine()
    passes = {of: _in_a_process(recipe, steps, of) for of in ("memory", "speed")}
    failed = next((figures for figures in passes.values() if figures["status"] != "passed"), None)
    metrics = _predictions(recipe, here.card, here.power_limit_watts)
    if failed is None:
        metrics = _memory(passes["memory"]) | _speed(passes["speed"]) | metrics
    return Record(
        benchmark=BENCHMARK,
        case=name,
        status="passed" if failed is None else failed["status"],
        reason=None if failed is None else failed["reason"],
        metrics=metrics,
        recipe=recipe.model_dump(mode="json", exclude_defaults=True),
        machine=here,
        date=machine.now(),
    )


def sentence(record: Record) -> str:
    """Return in a line how a measured run compares with the baseline and with its prediction."""
    if record.status != "passed":
        return f"{record.case}: {record.status.replace('_', ' ')} ({record.reason})"
    rate = record.metrics["tokens_per_second"]
    words = f"{record.case}: measured {rate.value:,.0f} tokens/s, {rate.value / BASELINE_TOKENS_PER_SECOND:.2g}x the baseline's "
    words += f"{BASELINE_TOKENS_PER_SECOND:,.0f}"
    words += _beside(rate, record.metrics.get("predicted_tokens_per_second"), "tokens/s")
    if "reserved" in record.metrics:
        reserved = record.metrics["reserved"]
        words += f"; peak reserved {reserved.value:,.0f} MiB measured"
        words += _beside(reserved, record.metrics.get("predicted_reserved"), "MiB")
    else:
        words += f"; {record.metrics['resident'].value:,.0f} MiB of this machine's memory (a card's is another figure)"
    return words


def _beside(found: Metric, predicted: Metric | None, unit: str) -> str:
    if predicted is None:
        return ""
    return f", predicted {predicted.value:,.0f} {unit} ({predicted.value / found.value - 1:+.1%})"


def _in_a_process(recipe: Recipe, steps: int, of: Literal["memory", "speed"]) -> dict[str, Any]:
    """Return what `train.measure.measure` gives in a new process; a process that was killed is out of memory too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, recipe, steps, of).result()
        except BrokenProcessPool:
            return {"status": "out_of_memory", "reason": "the system ended the process, as it does when memory is full"}


def _measure(recipe: Recipe, steps: int, of: Literal["memory", "speed"]) -> dict[str, Any]:
    from lowvram_chat.quiet import quiet_libraries, quiet_transformers
    from lowvram_chat.train.measure import measure

    quiet_libraries()
    quiet_transformers()
    return measure(recipe, steps, of)


def _memory(figures: dict[str, Any]) -> dict[str, Metric]:
    names = {
        "allocated": "peak_allocated_bytes",
        "reserved": "peak_reserved_bytes",
        "device": "device_bytes",
        "resident": "peak_resident_bytes",
    }
    return {
        name: Metric(
            value=round(figures[key] / MIB, 1), unit="MiB", kind="measured", better="lower", tolerance=MEMORY_NOISE
        )
        for name, key in names.items()
        if key in figures
    }


def _speed(figures: dict[str, Any]) -> dict[str, Metric]:
    rates = [figures["tokens_per_step"] / seconds for seconds in figures["seconds"]]
    return {
        "tokens_per_second": spread(rates, "tokens/s", better="higher", tolerance=RATE_NOISE),
        "step": spread([1000 * seconds for seconds in figures["seconds"]], "ms"),
    }


def _predictions(recipe: Recipe, card: str | None, watts: float | None) -> dict[str, Metric]:
    """Return what is predicted of the recipe on this card; of its speed only where the card is in the table."""
    planned = plan(recipe)
    found = {
        "predicted_reserved": Metric(value=round(planned.peak_reserved_bytes / MIB, 1), unit="MiB", kind="predicted")
    }
    known = _known_card(card)
    if known is not None:
        limits = GPUS[known].fp16_tflops
        nearest = max(limits) if watts is None else min(limits, key=lambda limit: abs(limit - watts))
        rate = predict(recipe, planned.work, known, nearest).tokens_per_second
        found["predicted_tokens_per_second"] = Metric(value=round(rate, 1), unit="tokens/s", kind="predicted")
    return found if card is not None else {}


def _known_card(card: str | None) -> str | None:
    """Return the row of the card table that a driver's name means: "NVIDIA GeForce RTX 3050 Laptop GPU" with 4 GB ..."""
    if card is None:
        return None
    import torch

    gib = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    return next((name for name in GPUS if set(_words_of(name, gib)) <= set(_words_of(card, gib))), None)


def _words_of(name: str, gib: int) -> list[str]:
    return [*name.lower().replace("-", " ").replace("gpu", "").split(), f"{gib}gb"]
