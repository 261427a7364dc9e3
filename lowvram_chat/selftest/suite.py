"""Runs all checks of the self-test, keeps what they found for this machine, and returns it as a record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from lowvram_chat import __version__
from lowvram_chat.model import calibration
from lowvram_chat.model.calibration import SWITCHES, Calibration
from lowvram_chat.model.device import choose_device
from lowvram_chat.quiet import quiet_transformers
from lowvram_chat.results import machine
from lowvram_chat.results.processes import run_in_new_process
from lowvram_chat.results.record import CheckResult, Metric, Record
from lowvram_chat.selftest import exactness, rates, runs, steps
from lowvram_chat.selftest.check import Check, Outcome

log = logging.getLogger(__name__)

BENCHMARK = "selftest"
REINSTALL = "Reinstall the libraries with pip install -c constraints.txt -e ."

RATES = (
    Check("memory", "Free memory", rates.memory, "Restart the machine, and run the self-test again."),
    Check("launch", "Launch latency", rates.launch_latency, "Close other programs, and plug in the laptop."),
    Check("products", "Matrix products", rates.products, REINSTALL),
    Check("bandwidth", "Memory bandwidth", rates.bandwidth, REINSTALL),
    Check("transfer", "Copies from the host", rates.transfer, REINSTALL),
    Check("disk", "Disk", rates.disk, "Run it in a folder that can be written."),
)
EXACTNESS = (
    Check("fused_loss", "Fused loss", exactness.fused_loss, "Runs on this machine get model.fused_loss=false."),
    Check("fused_gelu", "Fused activation", exactness.fused_gelu, "Runs on this machine get model.fused_gelu=false."),
    Check("fused_lora", "Fused adapters", exactness.fused_lora, "Runs on this machine get adapter.fused=false."),
    Check("isolation", "Packed rows", exactness.packed_isolation, "Use data.rows=grouped instead of packed."),
    Check(
        "document_attention",
        "Attention by document",
        exactness.document_attention,
        "Runs on this machine get model.document_attention=false.",
    ),
)
STEPS = (
    Check("adamw_8bit", "8-bit AdamW", steps.eight_bit, "Use optimizer.name=adamw."),
    Check("paged_adamw_8bit", "Paged 8-bit AdamW", steps.paged, "Use optimizer.name=adamw_8bit."),
    Check("scaler", "Gradient scaler", steps.gradient_scaler, "Use train.precision=bf16 or fp32."),
    Check("cap", "Memory cap", runs.memory_cap, "Do not fill the card: set memory.limit_mib."),
    Check("compile", "torch.compile", steps.compiled, "Runs on this machine get train.compile=false."),
)
KILLED = (
    Check(
        "resume",
        "A run that is killed and resumed",
        runs.killed_and_resumed,
        "Do not rely on --resume here, and report it.",
    ),
)
GROUPS: Mapping[str, Sequence[Check]] = {"rates": RATES, "exactness": EXACTNESS, "steps": STEPS, "killed": KILLED}
"""Name -> checks that share a process, which a broken driver may end."""
DIFFERS = "Please report it: the difference is larger than it should be."


@dataclass(frozen=True)
class SelfTest:
    """Everything that a self-test found."""

    record: Record
    calibration: Calibration

    @property
    def good(self) -> bool:
        """Whether no check failed."""
        return self.record.status == "passed"


def run_selftest(on_result: Callable[[CheckResult], None], *, recipes: bool = True) -> SelfTest:
    """Run all checks on the card, or on the CPU without one, and keep what they found for this machine.

    `on_result` is called with each result. `recipes=False` leaves out the shipped recipes, which take most of the time.
    """
    device = choose_device("auto", lambda: 0)
    results: list[CheckResult] = []

    def take(found: Sequence[CheckResult]) -> None:
        for result in found:
            results.append(result)
            on_result(result)

    for group in GROUPS:
        take(_in_own_process(group, GROUPS[group], device))
    found = calibrated(device, results)
    _keep(found)  # before the recipes, whose predictions use it
    for check in _recipe_checks() if recipes else ():
        take([check.run(device)])
    return SelfTest(_record(results), found)


def _keep(found: Calibration) -> None:
    """Keep the figures for later runs and plans; a cache that cannot be written is no failure of the machine."""
    try:
        calibration.save(found)
    except OSError as error:
        log.warning(
            "%s: cannot be written (%s), so later runs do not know of this self-test", error.filename, error.strerror
        )


def run_group(group: str, device: str) -> list[CheckResult]:
    """Return the results of a group's checks, in a process of their own."""
    quiet_transformers()
    return [check.run(torch.device(device)) for check in GROUPS[group]]


def _in_own_process(group: str, checks: Sequence[Check], device: torch.device) -> list[CheckResult]:
    """Return the results of a group; a process that dies is a failure of all its checks."""
    try:
        return run_in_new_process(run_group, group, str(device))
    except BrokenProcessPool:
        meaning = "the process died, as it does with a broken driver or library"
        return [
            CheckResult(name=c.name, title=c.title, status="failed", meaning=f"{meaning}. {c.if_it_fails}", seconds=0)
            for c in checks
        ]


def _recipe_checks() -> Iterator[Check]:
    """Yield a check for each shipped recipe."""
    for file in runs.shipped_recipes():

        def work(device: torch.device, file: Path = file) -> Outcome:
            recipe = runs.measured_recipe(file, device)
            return runs.compared(
                file.stem, run_in_new_process(runs.measured_and_predicted, file.stem, recipe, str(device))
            )

        yield Check(file.stem, f"Recipe {file.stem}", work, DIFFERS)


def calibrated(device: torch.device, results: Sequence[CheckResult]) -> Calibration:
    """Return what later runs and plans on this machine use of the results."""
    figures = {f"{result.name}.{name}": metric.value for result in results for name, metric in result.figures.items()}
    context = figures.get("memory.context")
    failed = [result.name for result in results if result.status == "failed" and result.name in SWITCHES]
    single = figures.get("products.fp32")
    return Calibration(
        device=calibration.device_name(device),
        torch=torch.__version__,
        driver=calibration.present_driver(),
        date=machine.now(),
        half_tflops=figures.get("products.fp16", single),
        single_tflops=single,
        gb_per_second=figures.get("bandwidth.bandwidth"),
        launch_microseconds=figures.get("launch.launch"),
        context_mib=None if context is None else round(context),
        failed=tuple(failed),
    )


def _record(results: Sequence[CheckResult]) -> Record:
    """Return the results as a record, which `bench report` shows."""
    failed = [result.title for result in results if result.status == "failed"]
    metrics: dict[str, Metric] = {}
    for result in results:
        for name, metric in result.figures.items():
            metrics[name if ":" in name else f"{result.title}: {name}"] = metric
    here = machine.this_machine()
    return Record(
        benchmark=BENCHMARK,
        case=here.name,
        status="failed" if failed else "passed",
        reason=f"failed: {', '.join(failed)}" if failed else None,
        metrics=metrics,
        checks=tuple(results),
        machine=here,
        package=__version__,
        date=machine.now(),
    )
