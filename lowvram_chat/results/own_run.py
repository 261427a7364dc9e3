"""`bench run`: a recipe measured on this machine, beside its prediction and the published baseline."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from lowvram_chat import __version__
from lowvram_chat.gpus import GPUS
from lowvram_chat.quiet import quiet_libraries, quiet_transformers
from lowvram_chat.recipe.schema import Memory, Recipe
from lowvram_chat.results import machine
from lowvram_chat.results.baseline import BASELINE_TOKENS_PER_SECOND
from lowvram_chat.results.record import Machine, Metric, Record, spread
from lowvram_chat.units import MIB

BENCHMARK = "run"
GPU_VARIANT_SUFFIXES = {"ti", "super", "max", "ada"}
"""Words that make another card of a name."""
SHARED_WITH_DESKTOP = {"3050"}
"""Names that a desktop card with other figures has too, where drivers do say "laptop"."""
RATE_NOISE, MEMORY_NOISE = 0.05, 0.02
"""Relative change that counts as noise: of a rate, of a peak."""


def measure_recipe(recipe: Recipe, name: str, steps: int) -> Record:
    """Return the record of a recipe's `steps` steps on this machine, under this name; memory and speed each in a process of
    its own.

    Raises:
        LowVramError: as a run with this recipe.
    """
    here = machine.this_machine()
    recipe = machine.in_a_process(_resolved, recipe, here)
    passes = {of: _pass(recipe, steps, of) for of in ("memory", "speed")}
    failed = next((figures for figures in passes.values() if figures["status"] != "passed"), None)
    # In a process of its own too: this one must never hold a CUDA context, which would take its share of the card.
    metrics = machine.in_a_process(_predictions, recipe, here) if here.card else {}
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
        package=__version__,
        date=machine.now(),
    )


def summary_sentence(record: Record) -> str:
    """Return in a line how a measured run compares with the baseline and with its prediction."""
    if record.status != "passed":
        return f"{record.case}: {record.status.replace('_', ' ')} ({record.reason})"
    rate = record.metrics["tokens_per_second"]
    words = f"{record.case}: measured {rate.value:,.0f} tokens/s, {rate.value / BASELINE_TOKENS_PER_SECOND:.2g}x the baseline's "
    words += f"{BASELINE_TOKENS_PER_SECOND:,.0f}"
    words += _beside(rate, record.metrics.get("predicted_tokens_per_second"), "tokens/s")
    if "assumed_power_limit" in record.metrics:
        words += f" (predicted for {record.metrics['assumed_power_limit'].value:.0f} W: the driver tells no limit)"
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


def _resolved(recipe: Recipe, here: Machine) -> Recipe:
    """Return the recipe as it is run on this machine: its micro-batch planned, compiled or not, its card named."""
    quiet_libraries()
    from lowvram_chat.model.compilation import should_compile
    from lowvram_chat.model.device import check_device
    from lowvram_chat.training.budget import with_planned_micro_batch

    device = check_device(recipe)
    known = known_gpu(here.card or "", here.card_mib or 0)
    if known is not None and "gpu" not in recipe.memory.model_fields_set:
        recipe = recipe.model_copy(update={"memory": Memory(**recipe.memory.model_dump() | {"gpu": known})})
    recipe = with_planned_micro_batch(recipe, device)
    train = recipe.train.model_copy(update={"compile": should_compile(recipe.train, device)})
    return recipe.model_copy(update={"train": train})


def _pass(recipe: Recipe, steps: int, of: Literal["memory", "speed"]) -> dict[str, Any]:
    """Return what `train.measure.measure` gives in a new process; a process that was killed has failed."""
    try:
        return machine.in_a_process(_measure, recipe, steps, of)
    except BrokenProcessPool:
        return {
            "status": "failed",
            "reason": "the system ended the process, as it does when the machine's memory is full",
        }


def _measure(recipe: Recipe, steps: int, of: Literal["memory", "speed"]) -> dict[str, Any]:
    quiet_libraries()
    from lowvram_chat.results.measure import measure_steps

    quiet_transformers()
    return measure_steps(recipe, steps, of)


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


def _predictions(recipe: Recipe, here: Machine) -> dict[str, Metric]:
    """Return what is predicted of the recipe on this card; of its speed only where the card is in the table."""
    from lowvram_chat.planning.prediction import make_plan
    from lowvram_chat.timing.speed import predict_speed

    known = known_gpu(here.card or "", here.card_mib or 0)
    if known is not None:
        recipe = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"gpu": known})})
    planned = make_plan(recipe)
    found = {
        "predicted_reserved": Metric(value=round(planned.peak_reserved_bytes / MIB, 1), unit="MiB", kind="predicted")
    }
    if known is not None:
        limits, watts = GPUS[known].fp16_tflops, here.power_limit_watts
        nearest = max(limits) if watts is None else min(limits, key=lambda limit: abs(limit - watts))
        rate = predict_speed(recipe, planned.work, known, nearest).tokens_per_second
        found["predicted_tokens_per_second"] = Metric(value=round(rate, 1), unit="tokens/s", kind="predicted")
        if watts is None and len(limits) > 1:
            found["assumed_power_limit"] = Metric(value=nearest, unit="W", kind="predicted")
    return found


def known_gpu(card: str, mib: int) -> str | None:
    """Return the row of the card table that a driver's name and memory mean; None where there is none.

    "NVIDIA GeForce RTX 3050 Laptop GPU" of 4,096 MiB is rtx-3050-laptop-4gb: the words of the row's name are said, no variant
    that is another chip is, and its memory is that within a tenth. Of most laptops' cards drivers do not say "laptop".
    """
    said = {*card.lower().replace("-", " ").split()}
    said |= set() if SHARED_WITH_DESKTOP & said else {"laptop"}

    def is_it(words: set[str], mib_of_row: int) -> bool:
        return words <= said and not (GPU_VARIANT_SUFFIXES & said) - words and abs(mib - mib_of_row) < mib / 10

    return next((name for name, gpu in GPUS.items() if is_it({*name.split("-")[:-1]}, gpu.total_mib)), None)
