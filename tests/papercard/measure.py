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
import tempfile
import time
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.papercard.cases import Case, Kind, all_cases
from tests.papercard.values import answer_for, ignore_values

if TYPE_CHECKING:
    import datasets

    from lowvram_chat.recipe.schema import Model, Recipe

ROOT = Path(__file__).parents[2]
STEPS = 1
"""Optimizer steps after the warm-up, in which the peak comes."""
CARD_MIB = 65536
"""Memory of the paper card: enough for every case."""
COMMON = ("train.dataloader_num_workers=0", "train.compile=false", "train.micro_batch=given")
CAPABILITY = int(os.environ.get("PAPERCARD_CAPABILITY", "86"))
"""Compute capability of the paper card, which a process cannot change."""
SECONDS = 300
"""Time limit of a case."""


def main(words: list[str]) -> int:
    """Measure all cases, or those whose names contain one of the words, into the file that is the first word."""
    out, wanted = Path(words[0]), words[1:]
    cases = [case for case in all_cases() if not wanted or any(word in case.name for word in wanted)]
    cases = [case for case in cases if case.capability == CAPABILITY]
    import_everything()
    folder = Path(tempfile.gettempdir(), "papercard-models")
    results = json.loads(out.read_text(encoding="utf-8"))["cases"] if out.is_file() else {}
    for case in cases:
        started = time.monotonic()
        results[case.name] = measured(case, folder)
        print(f"{case.name:<48}{describe(results[case.name])}  ({time.monotonic() - started:.0f} s)", flush=True)
        out.write_text(json.dumps({"versions": versions(), "cases": results}, indent=1) + "\n", encoding="utf-8")
    return 0


def describe(result: dict[str, Any]) -> str:
    """Return a result in a line."""
    if "error" in result:
        return str(result["error"])
    return " ".join(
        f"{kind} {result['allocator'][kind]:,.1f} / {result['planned'][kind]:,.1f} MiB"
        f" ({error_percent(result, kind):+.2f} %)"
        for kind in ("allocated", "reserved")
    )


def error_percent(result: dict[str, Any], kind: str) -> float:
    """Return by how much the plan differs from the allocator, in percent of the allocator's figure."""
    return 100 * (float(result["planned"][kind]) / float(result["allocator"][kind]) - 1)


def import_everything() -> None:
    """Import what a run needs, before the processes are forked: CUDA is not started by it."""
    import bitsandbytes  # noqa: F401

    import lowvram_chat.planning.prediction
    import lowvram_chat.results.measure
    import lowvram_chat.tracing.four_bit
    import lowvram_chat.training.trainer  # noqa: F401


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """Return the peaks of a case by the allocator and by the plan, in MiB, or the error that ended it."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(case, folder, sending))
    process.start()
    sending.close()
    try:
        result: dict[str, Any] = receiving.recv() if receiving.poll(SECONDS) else {"error": "no answer in time"}
    except EOFError:
        result = {"error": "the process died"}
    process.kill()
    process.join()
    return result


def run(case: Case, folder: Path, connection: Connection) -> None:
    """Send the result of a case, or its error."""
    os.environ["PAPERCARD_MIB"] = str(CARD_MIB)
    start_process()
    if not case.has_flash:
        leave_flash_out()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    try:
        connection.send(peaks(case, folder))
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).splitlines() or [""])[0]
        connection.send({"error": f"{type(error).__name__}: {first} ({Path(last.filename).name}:{last.lineno})"})


def start_process() -> None:
    """Let this process use the paper card."""
    import torch

    # A library asked for the number of cards when it was imported. A real driver does not survive a fork; this one does.
    torch.cuda._is_in_bad_fork = lambda: False
    ignore_values()


def leave_flash_out() -> None:
    """Let torch and the package take FlashAttention for missing, as in the builds for Windows."""
    import torch

    from lowvram_chat.model import flash_attention

    torch.backends.cuda.enable_flash_sdp(False)
    flash_attention.is_built = lambda system=None: False


def peaks(case: Case, folder: Path) -> dict[str, Any]:
    """Return the peaks of a case by the allocator and by the plan, in MiB."""
    import torch

    from lowvram_chat.model.present_card import for_this_run
    from lowvram_chat.planning.prediction import longest_rows_run, make_plan
    from lowvram_chat.planning.replay import replay

    recipe = recipe_of(case, folder)
    with tempfile.TemporaryDirectory() as name:
        train(recipe, Path(name), case.kind)
    allocator = {
        "allocated": torch.cuda.max_memory_allocated() / 2**20,
        "reserved": torch.cuda.max_memory_reserved() / 2**20,
    }
    torch.cuda.empty_cache()
    recipe = for_this_run(recipe, torch.device("cuda", 0))
    planned = replay(longest_rows_run(recipe)) if case.kind == "full rows" else make_plan(recipe)
    return {
        "kind": case.kind,
        "allocator": allocator,
        "planned": {
            "allocated": planned.peak_allocated_bytes / 2**20,
            "reserved": planned.peak_reserved_bytes / 2**20,
        },
    }


def recipe_of(case: Case, folder: Path) -> Recipe:
    """Return the recipe of a case: a few steps, at most two accumulated micro-batches, and the random weights of a folder."""
    from lowvram_chat.recipe.yaml_file import load_recipe
    from lowvram_chat.results.measure import training_steps_only

    recipe = load_recipe(ROOT / "recipes" / f"{case.recipe}.yaml", [*COMMON, *case.overrides])
    accumulated = min(2, recipe.train.gradient_accumulation_steps)
    train = recipe.train.model_copy(update={"gradient_accumulation_steps": accumulated})
    name = recipe.model.name
    if not name.startswith("builtin:"):
        name = str(random_weights(recipe.model, folder / name.rpartition("/")[2]))
    model = recipe.model.model_copy(update={"name": name, "revision": None})
    recipe = training_steps_only(recipe.model_copy(update={"train": train, "model": model}), folder, STEPS)
    held_out = {"eval_source": "-"} if case.kind == "evaluated" else {}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=held_out)})


def random_weights(model: Model, folder: Path) -> Path:
    """Return the folder of a model with random weights, which is written unless it is there."""
    from transformers import AutoModelForCausalLM

    from lowvram_chat.model.configs import config_for
    from lowvram_chat.model.pretrained import load_tokenizer

    if not folder.is_dir():
        AutoModelForCausalLM.from_config(config_for(model)).save_pretrained(folder)
        load_tokenizer("builtin:tiny-gpt2").save_pretrained(folder)
    return folder


def train(recipe: Recipe, folder: Path, kind: Kind = "full rows") -> None:
    """Train as `sft` does, on rows of random tokens. The peaks of torch's allocator are those of the last run."""
    import torch

    from lowvram_chat.results.measure import random_rows
    from lowvram_chat.training.run import release_memory
    from lowvram_chat.training.session import Session

    device = torch.device("cuda", 0)
    recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"dir": str(folder / "run")})})
    rows = random_rows(recipe, STEPS)
    packed = recipe.data.rows == "packed"
    if kind == "mixed rows" and packed:
        rows = replace(rows, train=packed_short_documents(recipe))
    elif kind == "mixed rows":
        rows = replace(rows, train=rows.train.map(shortened, with_indices=True))
    if kind == "evaluated":
        rows = replace(rows, held_out=rows.train.select(range(2 * recipe.train.per_device_eval_batch_size)))
    answer_for(packed=packed)
    if kind == "resumed":
        first = recipe.train.model_copy(update={"max_steps": 2, "save_steps": 2})
        Session.prepare(recipe.model_copy(update={"train": first}), device=device, rows=rows).run(resume=False)
        release_memory(device)
    Session.prepare(recipe, device=device, rows=rows).run(resume=kind == "resumed")


def shortened(row: dict[str, Any], place: int) -> dict[str, Any]:
    """Return a row cut to a length that looks random; every fifth keeps its own."""
    length = len(row["input_ids"])
    kept = length if place % 5 == 0 else 2 + (place * 7919) % (length - 2)
    return {"input_ids": row["input_ids"][:kept], "labels": row["labels"][:kept], "length": kept}


def packed_short_documents(recipe: Recipe) -> datasets.Dataset:
    """Return packed rows of random tokens in documents of 2 to 60 tokens: more than a batch computes attention over at once."""
    import datasets

    from lowvram_chat.data.packing import pack_rows
    from lowvram_chat.results.measure import random_rows

    plain = recipe.model_copy(update={"data": recipe.data.model_copy(update={"rows": "padded"})})
    documents: list[dict[str, Any]] = []
    for row in random_rows(plain, STEPS).train:
        start = 0
        while start < row["length"]:
            length = 2 + (len(documents) * 7919) % 59
            tokens = row["input_ids"][start : start + length]
            documents.append({"input_ids": tokens, "labels": [-100, *tokens[1:]], "length": len(tokens)})
            start += length
    return pack_rows(datasets.Dataset.from_list(documents), recipe.data.max_length)


def versions() -> dict[str, str]:
    """Return the versions that a result was found with."""
    from importlib import metadata

    names = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
    return {name: metadata.version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
