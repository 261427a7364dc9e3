"""Runs training on the paper card and holds the planner against torch's allocator.

    make papercard

Each case is a process of its own: a few optimizer steps with rows of the maximum length, through the package's own trainer. The
allocator's peaks and the plan's for the same steps are written as JSON. No card is involved: the allocator is torch's own, the
kernels do nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.papercard.cases import Case, all_cases

ROOT = Path(__file__).parents[2]
STEPS = 1
"""Optimizer steps after the warm-up, in which the peak comes."""
MIXED_STEPS = 20
"""The same with rows of many lengths."""
CARD_MIB = 65536
"""Memory of the paper card: enough for every case."""
COMMON = ("train.dataloader_num_workers=0", "train.compile=false", "train.micro_batch=given")
SECONDS = 300
"""Time limit of a case."""


def main(words: list[str]) -> int:
    """Measure all cases, or those whose names contain one of the words, into the file that is the first word."""
    out, wanted = Path(words[0]), words[1:]
    cases = [case for case in all_cases() if not wanted or any(word in case.name for word in wanted)]
    import_everything()
    results = {}
    for case in cases:
        started = time.monotonic()
        results[case.name] = measured(case)
        print(f"{case.name:<48}{describe(results[case.name])}  ({time.monotonic() - started:.0f} s)", flush=True)
        out.write_text(json.dumps({"versions": versions(), "cases": results}, indent=1) + "\n", encoding="utf-8")
    return 0


def describe(result: dict[str, Any]) -> str:
    """Return a result in a line."""
    if "error" in result:
        return str(result["error"])
    return " ".join(
        f"{kind} {result['allocator'][kind]:,.1f} / {result['planned'][kind]:,.1f} MiB"
        f" ({100 * (result['planned'][kind] / result['allocator'][kind] - 1):+.2f} %)"
        for kind in ("allocated", "reserved")
    )


def import_everything() -> None:
    """Import what a run needs, before the processes are forked: CUDA is not started by it."""
    import bitsandbytes  # noqa: F401

    import lowvram_chat.planning.prediction
    import lowvram_chat.results.measure
    import lowvram_chat.training.trainer  # noqa: F401


def measured(case: Case) -> dict[str, Any]:
    """Return the peaks of a case by the allocator and by the plan, in MiB, or the error that ended it."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(case, sending))
    process.start()
    sending.close()
    result: dict[str, Any] = receiving.recv() if receiving.poll(SECONDS) else {"error": "no answer in time"}
    process.kill()
    process.join()
    return result


def run(case: Case, connection: Connection) -> None:
    """Send the result of a case, or its error."""
    os.environ |= {"PAPERCARD_MIB": str(CARD_MIB), "PAPERCARD_CAPABILITY": str(case.capability)}
    import torch

    import lowvram_chat.model.pretrained

    # Weights that are quantised on the card are leftovers, so they may not be finite.
    vars(lowvram_chat.model.pretrained)["check_finite"] = lambda *_: None
    # A library asked for the number of cards when it was imported. A real driver does not survive a fork; this one does.
    vars(torch.cuda)["_is_in_bad_fork"] = lambda: False
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    try:
        connection.send(peaks(case))
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).splitlines() or [""])[0]
        connection.send({"error": f"{type(error).__name__}: {first} ({Path(last.filename).name}:{last.lineno})"})


def peaks(case: Case) -> dict[str, Any]:
    """Return the peaks of a case by the allocator and by the plan, in MiB."""
    import torch

    from lowvram_chat.model.present_card import for_this_run
    from lowvram_chat.planning.prediction import longest_rows_run, make_plan
    from lowvram_chat.planning.replay import replay
    from lowvram_chat.recipe.yaml_file import load_recipe
    from lowvram_chat.results import measure
    from lowvram_chat.results.measure import measure_steps, training_steps_only

    recipe = load_recipe(ROOT / "recipes" / f"{case.recipe}.yaml", [*COMMON, *case.overrides])
    accumulated = min(2, recipe.train.gradient_accumulation_steps)
    train = recipe.train.model_copy(update={"gradient_accumulation_steps": accumulated})
    recipe = recipe.model_copy(update={"train": train})
    if case.mixed:
        vars(measure)["random_rows"] = mixed_rows
    steps = MIXED_STEPS if case.mixed else STEPS
    measurement = measure_steps(recipe, steps, "memory")
    if measurement["status"] != "passed":
        return {"error": measurement["reason"]}
    allocator = {
        "allocated": measurement["peak_allocated_bytes"] / 2**20,
        "reserved": measurement["peak_reserved_bytes"] / 2**20,
    }
    torch.cuda.empty_cache()
    only = for_this_run(training_steps_only(recipe, Path("-"), STEPS), torch.device("cuda", 0))
    planned = make_plan(only) if case.mixed else replay(longest_rows_run(only))
    return {
        "allocator": allocator,
        "planned": {
            "allocated": planned.peak_allocated_bytes / 2**20,
            "reserved": planned.peak_reserved_bytes / 2**20,
        },
    }


def mixed_rows(recipe: Any, steps: int) -> Any:
    """Return rows of random tokens with lengths from a quarter of the maximum on, and one of the maximum."""
    import datasets
    import torch

    from lowvram_chat.data.dataset import PreparedRows
    from lowvram_chat.data.facts import Facts
    from lowvram_chat.results.measure import IGNORED_LABEL, WARM_UP_STEPS

    longest, count = recipe.data.max_length, recipe.train.effective_batch_size * (steps + WARM_UP_STEPS)
    generator = torch.Generator().manual_seed(0)
    lengths = [longest, *torch.randint(longest // 4, longest + 1, (count - 1,), generator=generator).tolist()]
    tokens = [torch.randint(1000, (length,), generator=generator).tolist() for length in lengths]
    labels = [[IGNORED_LABEL, *row[1:]] for row in tokens]
    rows = datasets.Dataset.from_dict({"input_ids": tokens, "labels": labels, "length": lengths})
    facts = Facts(conversations=count, rows=count, tokens=sum(lengths), loss_tokens=sum(lengths) - count)
    return PreparedRows(train=rows, held_out=None, facts=facts)


def versions() -> dict[str, str]:
    """Return the versions that a result was found with."""
    from importlib import metadata

    names = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
    return {name: metadata.version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
