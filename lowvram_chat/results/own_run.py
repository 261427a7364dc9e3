"""Measures a recipe on this machine, and compares it with its prediction and with the published baseline: `bench run`."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Literal

from lowvram_chat import __version__
from lowvram_chat.gpus import GPUS, known_gpu
from lowvram_chat.quiet import quiet_libraries, quiet_transformers
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.results import machine
from lowvram_chat.results.baseline import BASELINE_TOKENS_PER_SECOND
from lowvram_chat.results.processes import run_in_new_process
from lowvram_chat.results.record import Machine, Metric, Record, spread
from lowvram_chat.units import MIB

if TYPE_CHECKING:
    from lowvram_chat.planning.plan import Plan
    from lowvram_chat.results.measure import Measurement, Pass

BENCHMARK = "run"
RATE_NOISE, MEMORY_NOISE = 0.05, 0.02
"""Relative change that counts as noise, of a rate and of a memory peak."""
MEMORY_METRICS: dict[
    str, Literal["peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "peak_resident_bytes"]
] = {
    "allocated": "peak_allocated_bytes",
    "reserved": "peak_reserved_bytes",
    "device": "device_bytes",
    "resident": "peak_resident_bytes",
}
"""Metric -> key of a measurement."""


def measure_recipe(recipe: Recipe, name: str, steps: int) -> Record:
    """Measure `steps` optimizer steps of a recipe on this machine and return the record of the case `name`.

    Memory, speed and prediction each get a new process, so that no CUDA context of this process takes memory on the card.

    Raises:
        LowVramError: as in a run with this recipe.
    """
    here = machine.this_machine()
    recipe = run_in_new_process(_resolved, recipe)
    memory, speed = _measure_pass(recipe, steps, "memory"), _measure_pass(recipe, steps, "speed")
    failed = next((measurement for measurement in (memory, speed) if measurement["status"] != "passed"), None)
    measured = memory_metrics(memory) | speed_metrics(speed) if failed is None else {}
    predicted = run_in_new_process(_predicted_metrics, recipe, here) if here.card else {}
    return Record(
        benchmark=BENCHMARK,
        case=name,
        status="passed" if failed is None else failed["status"],
        reason=None if failed is None else failed["reason"],
        metrics=measured | predicted,
        recipe=recipe.model_dump(mode="json", exclude_defaults=True),
        machine=here,
        package=__version__,
        date=machine.now(),
    )


def summary_sentence(record: Record) -> str:
    """Return one line that compares a measured run with the baseline and with its prediction."""
    if record.status != "passed":
        return f"{record.case}: {record.status.replace('_', ' ')} ({record.reason})"
    return f"{record.case}: {_speed_words(record)}; {_memory_words(record)}"


def memory_metrics(measurement: Measurement) -> dict[str, Metric]:
    """Return the peaks of a memory pass as metrics, in MiB."""
    return {
        name: Metric(
            value=round(measurement[key] / MIB, 1), unit="MiB", kind="measured", better="lower", tolerance=MEMORY_NOISE
        )
        for name, key in MEMORY_METRICS.items()
        if key in measurement
    }


def speed_metrics(measurement: Measurement) -> dict[str, Metric]:
    """Return the tokens per second and the step times (ms) of a speed pass as metrics."""
    seconds = measurement["seconds"]
    rates = [measurement["tokens_per_step"] / step_seconds for step_seconds in seconds]
    return {
        "tokens_per_second": spread(rates, "tokens/s", better="higher", tolerance=RATE_NOISE),
        "step": spread([1000 * step_seconds for step_seconds in seconds], "ms"),
    }


def _speed_words(record: Record) -> str:
    rate = record.metrics["tokens_per_second"]
    words = (
        f"measured {rate.value:,.0f} tokens/s, {rate.value / BASELINE_TOKENS_PER_SECOND:.2g}x the baseline's "
        f"{BASELINE_TOKENS_PER_SECOND:,.0f}"
    )
    words += _prediction_words(rate, record.metrics.get("predicted_tokens_per_second"), "tokens/s")
    if "assumed_power_limit" in record.metrics:
        watts = record.metrics["assumed_power_limit"].value
        words += f" (predicted for {watts:.0f} W, because the driver does not report the power limit)"
    return words


def _memory_words(record: Record) -> str:
    if "reserved" not in record.metrics:
        resident = record.metrics["resident"].value
        return f"peak {resident:,.0f} MiB of this machine's main memory (not comparable with GPU memory)"
    reserved = record.metrics["reserved"]
    words = f"peak reserved {reserved.value:,.0f} MiB measured"
    return words + _prediction_words(reserved, record.metrics.get("predicted_reserved"), "MiB")


def _prediction_words(measured: Metric, predicted: Metric | None, unit: str) -> str:
    if predicted is None:
        return ""
    return f", predicted {predicted.value:,.0f} {unit} ({predicted.value / measured.value - 1:+.1%})"


def _resolved(recipe: Recipe) -> Recipe:
    """Return the recipe with the choices that this machine decides: the micro-batch, and whether to compile."""
    quiet_libraries()
    from lowvram_chat.model.compilation import should_compile
    from lowvram_chat.model.device import check_device
    from lowvram_chat.training.budget import with_planned_micro_batch

    device = check_device(recipe)
    recipe = with_planned_micro_batch(recipe, device)
    train = recipe.train.model_copy(update={"compile": should_compile(recipe.train, device)})
    return recipe.model_copy(update={"train": train})


def _gpu_of(here: Machine) -> str | None:
    return known_gpu(here.card or "", here.card_mib or 0)


def _measure_pass(recipe: Recipe, steps: int, of: Pass) -> Measurement:
    """Run `measure_steps` in a new process. A process that is killed has failed."""
    try:
        return run_in_new_process(_measure_quietly, recipe, steps, of)
    except BrokenProcessPool:
        reason = "the operating system ended the process, as it does when the main memory is full"
        return {"status": "failed", "reason": reason}


def _measure_quietly(recipe: Recipe, steps: int, of: Pass) -> Measurement:
    quiet_libraries()
    from lowvram_chat.results.measure import measure_steps

    quiet_transformers()
    return measure_steps(recipe, steps, of)


def _predicted_metrics(recipe: Recipe, here: Machine) -> dict[str, Metric]:
    """Return the predicted memory, and the predicted speed if the card is in the card table."""
    from lowvram_chat.planning.prediction import make_plan

    gpu = _gpu_of(here)
    if gpu is not None:
        recipe = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"gpu": gpu, "card": None})})
    plan = make_plan(recipe)
    reserved = Metric(value=round(plan.peak_reserved_bytes / MIB, 1), unit="MiB", kind="predicted")
    speed = {} if gpu is None else _predicted_speed_metrics(recipe, plan, gpu, here.power_limit_watts)
    return {"predicted_reserved": reserved, **speed}


def _predicted_speed_metrics(recipe: Recipe, plan: Plan, gpu: str, watts: float | None) -> dict[str, Metric]:
    """Return the predicted speed at the power limit that is closest to the card's; at the highest if it is unknown."""
    from lowvram_chat.timing.speed import predict_speed

    limits, nearest = GPUS[gpu].fp16_tflops, GPUS[gpu].nearest_limit(watts)
    rate = predict_speed(recipe, plan.work, gpu, nearest).tokens_per_second
    metrics = {"predicted_tokens_per_second": Metric(value=round(rate, 1), unit="tokens/s", kind="predicted")}
    if watts is None and len(limits) > 1:
        metrics["assumed_power_limit"] = Metric(value=nearest, unit="W", kind="predicted")
    return metrics
