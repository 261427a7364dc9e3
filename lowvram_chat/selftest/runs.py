"""Whole runs on this device: one that is killed and resumed, the memory cap, and each shipped recipe against its prediction."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lowvram_chat.model import calibration
from lowvram_chat.model.present_card import for_this_machine
from lowvram_chat.planning.prediction import longest_rows_run, make_plan
from lowvram_chat.planning.replay import replay
from lowvram_chat.quiet import quiet_transformers
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import dump_recipe, load_recipe
from lowvram_chat.results.measure import StepTimer, random_rows, training_steps_only, with_random_weights
from lowvram_chat.results.record import Metric
from lowvram_chat.selftest.check import Outcome, figure, skipped
from lowvram_chat.timing.processor import ProcessorRates, predicted_seconds
from lowvram_chat.timing.speed import predict_speed
from lowvram_chat.training import budget
from lowvram_chat.training.callbacks import peak_memory
from lowvram_chat.training.run_dir import RunDir
from lowvram_chat.training.session import Session
from lowvram_chat.units import MIB, largest

STEPS, SAVE_STEPS, KILLED_AFTER = 30, 10, 15
"""Optimizer steps of the run that is killed, steps between its checkpoints, and the step from which it may be killed."""
RUN_SECONDS = 300
TIMED_STEPS = 5
MEMORY_TOLERANCE, SPEED_TOLERANCE = 0.05, 0.25
"""Largest relative error of predicted memory that passes, and of predicted speed that needs no remark."""
ON_A_CPU = (
    *("train.precision=fp32", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1"),
    *("data.max_length=256", "model.load_in=null", "train.compile=false", "model.dtype=float32"),
)
"""Settings of the shipped recipes on a CPU, where they would take hours."""
ON_A_CARD = ("train.gradient_accumulation_steps=2", "train.compile=false", "train.micro_batch=given")
RECIPES = ("full_fp16", "full_fp16_adamw", "lora_fp16", "qlora_nf4", "fast_fp16", "baseline_7h27m", "quickstart")


def killed_and_resumed(device: torch.device) -> Outcome:
    """Kill a run, resume it, and compare its weights with those of a run that was not killed."""
    precision = "fp16" if device.type == "cuda" else "fp32"
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-selftest-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        whole, broken = (_short_run(folder, run, precision) for run in ("whole", "broken"))
        if code := _exit_code(_sft(whole)):
            return Outcome(good=False, meaning=f"a short run ended with exit code {code}", is_claim=False)
        killed_at = _kill_after(_sft(broken), broken)
        if killed_at is None:
            return Outcome(good=False, meaning="the run ended before it could be killed", is_claim=False)
        if code := _exit_code(_sft(broken, "--resume")):
            return Outcome(good=False, meaning=f"the resumed run ended with exit code {code}", is_claim=False)
        difference = _largest_difference(whole.run, broken.run)
    if not math.isfinite(difference):
        return Outcome(good=False, meaning="the resumed run has other tensors, or NaN among them", is_claim=False)
    return Outcome(
        good=difference == 0,
        meaning="a run that is killed and resumed ends with the weights of one that was not",
        figures={"killed at": figure(killed_at, "steps"), "largest difference": figure(difference, "1")},
    )


@dataclass(frozen=True)
class _Run:
    """A recipe file and the folder of its run."""

    recipe: Path
    run: RunDir


def _short_run(folder: Path, name: str, precision: str) -> _Run:
    """Write the recipe of a short run on the built-in model and conversations."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": "builtin:tiny-gpt2"},
            "data": {"source": "builtin:chitchat", "max_length": 48, "limit": 200},
            "train": {
                "precision": precision,
                "max_steps": STEPS,
                "save_steps": SAVE_STEPS,
                "per_device_train_batch_size": 2,
                "logging_steps": 1,
                "learning_rate": 1e-4,
                "dataloader_num_workers": 0,
            },
            "optimizer": {"name": "adamw_8bit"},
            "output": {"dir": str(folder / name), "sample_prompts": []},
        }
    )
    file = folder / f"{name}.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    return _Run(file, RunDir(folder / name))


def _sft(run: _Run, *words: str) -> subprocess.Popen[bytes]:
    """Start a run in a process of its own."""
    command = [sys.executable, "-m", "lowvram_chat.sft", str(run.recipe), *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a run, which is killed if it takes too long."""
    try:
        return process.wait(RUN_SECONDS)
    except subprocess.TimeoutExpired:
        return 1
    finally:
        process.kill()
        process.wait()


def _kill_after(process: subprocess.Popen[bytes], run: _Run) -> int | None:
    """Kill a run once it has logged step `KILLED_AFTER`; return the steps that it had logged, or None if it ended before."""
    deadline = time.monotonic() + RUN_SECONDS
    try:
        while process.poll() is None and time.monotonic() < deadline:
            steps = _logged_steps(run.run)
            if steps >= KILLED_AFTER:
                return steps
            time.sleep(0.01)
        return None
    finally:
        process.kill()
        process.wait()


def _logged_steps(run: RunDir) -> int:
    return run.metrics_file.read_bytes().count(b'"loss"') if run.metrics_file.is_file() else 0


def _largest_difference(one: RunDir, other: RunDir) -> float:
    """Return the largest difference of two runs' weights; infinity if they do not have the same."""
    from safetensors.torch import load_file

    weights, others = (load_file(run.model / "model.safetensors") for run in (one, other))
    if weights.keys() != others.keys():
        return float("inf")
    return largest(float((weights[name] - others[name]).abs().max()) for name in weights)


def memory_cap(device: torch.device) -> Outcome:
    """Cap the process, allocate more, and look whether that fails and memory within the cap can still be had."""
    if device.type == "cpu":
        return skipped("there is no cap on a CPU")
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = torch.cuda.memory_reserved(device) + 256 * MIB
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    try:
        held = _allocates(device, 384 * MIB)
        usable = _allocates(device, 64 * MIB)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return Outcome(
        good=usable and not held,
        meaning="a run cannot take more of the card than its limit, so that it does not spill into the main memory",
        figures={"allowed": figure(allowed / MIB, "MiB")},
    )


def _allocates(device: torch.device, nbytes: int) -> bool:
    try:
        torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    return True


def shipped_recipes() -> list[Path]:
    """Return the files of the shipped recipes; none where they are not installed."""
    folder = Path(__file__).parents[2] / "recipes"
    return [file for name in RECIPES if (file := folder / f"{name}.yaml").is_file()]


def measured_recipe(file: Path, device: torch.device) -> Recipe:
    """Return a shipped recipe as it is measured on a device."""
    return load_recipe(file, ON_A_CARD if device.type == "cuda" else ON_A_CPU)


def measured_and_predicted(name: str, recipe: Recipe, device_name: str) -> Mapping[str, Metric]:
    """Run some steps of a recipe on random rows and weights, and return peak and speed, measured and predicted.

    It is called in a process of its own, so that the peaks are this recipe's.
    """
    quiet_transformers()
    device = torch.device(device_name)
    on_card = device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-selftest-", ignore_cleanup_errors=True) as folder:
        steps = training_steps_only(recipe, Path(folder), TIMED_STEPS)
        figures = dict(_predicted_on_card(for_this_machine(steps)) if on_card else _predicted_on_cpu(steps))
        budget.cap_process_memory(steps, device)
        timer = StepTimer()
        session = Session.prepare(
            with_random_weights(steps, Path(folder, "model")), device=device, rows=random_rows(steps, TIMED_STEPS)
        )
        session.run_steps(RunDir.of(steps), timer)
    tokens = recipe.train.effective_batch_size * recipe.data.max_length
    seconds = statistics.median(timer.seconds[-TIMED_STEPS:])
    figures[f"{name}: tokens/s"] = figure(tokens / seconds, "tokens/s")
    peaks = peak_memory()
    if "peak_reserved_bytes" in peaks:
        figures[f"{name}: reserved"] = figure(peaks["peak_reserved_bytes"] / MIB, "MiB")
    return {key if ":" in key else f"{name}: {key}": value for key, value in figures.items()}


def _predicted_on_card(recipe: Recipe) -> Iterator[tuple[str, Metric]]:
    """Yield the predicted reserved peak of rows of the maximum length, and the predicted speed."""
    reserved = replay(longest_rows_run(recipe)).peak_reserved_bytes / MIB
    yield "predicted reserved", Metric(value=round(reserved, 1), unit="MiB", kind="predicted")
    yield "predicted tokens/s", _predicted_rate(predict_speed(recipe, make_plan(recipe).work).tokens_per_second)


def _predicted_on_cpu(recipe: Recipe) -> Iterator[tuple[str, Metric]]:
    """Yield the predicted speed, if the rates of this processor were measured."""
    found = calibration.load(calibration.processor_name())
    if found is None or not (found.single_tflops and found.gb_per_second and found.launch_microseconds):
        return
    rates = ProcessorRates(
        single_tflops=found.single_tflops,
        gb_per_second=found.gb_per_second,
        launch_seconds=found.launch_microseconds / 1e6,
    )
    tokens = recipe.train.effective_batch_size * recipe.data.max_length
    yield "predicted tokens/s", _predicted_rate(tokens / predicted_seconds(recipe, rates))


def _predicted_rate(tokens_per_second: float) -> Metric:
    return Metric(value=round(tokens_per_second, 1), unit="tokens/s", kind="predicted")


def compared(name: str, figures: Mapping[str, Metric]) -> Outcome:
    """Return the outcome of a recipe's figures.

    A wrong prediction of memory is a failure, since a run may not fit. A wrong prediction of speed is only
    reported: runs are right at any speed, and heat or battery power can slow a card down.
    """
    errors = {}
    for kind in ("reserved", "tokens/s"):
        predicted, measured = figures.get(f"{name}: predicted {kind}"), figures.get(f"{name}: {kind}")
        if predicted is not None and measured is not None:
            errors[kind] = predicted.value / measured.value - 1
    words = ", ".join(f"{kind} predicted {error:+.1%}" for kind, error in errors.items())
    if abs(errors.get("tokens/s", 0)) > SPEED_TOLERANCE:
        words += (
            f" (off by more than {SPEED_TOLERANCE:.0%}: planned times are not reliable on this machine as it runs now)"
        )
    return Outcome(good=abs(errors.get("reserved", 0)) <= MEMORY_TOLERANCE, meaning=words, figures=figures)
