"""The package from Python: what a notebook or a script imports.

    from lowvram_chat import api

    recipe = api.load_recipe("recipes/quickstart.yaml", "train.max_steps=100")
    api.preview("chats.jsonl", recipe)  # the rows, with the tokens that carry loss
    api.plan(recipe)                    # predicted GPU memory; shown as a table in a notebook
    api.train(recipe)
    api.merge("runs/quickstart")
    api.open_chat("runs/quickstart").ask("Hello, how are you?")

Importing this module is cheap: torch and the other libraries are imported by the first call that needs them. Progress goes
to the logger "lowvram_chat"; `logging.basicConfig(level=logging.INFO, format="%(message)s")` shows it.

Every function raises a subclass of `lowvram_chat.errors.LowVramError` for whatever its caller can correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowvram_chat.arguments import as_list, check_device_name, check_path, checked_recipe, look_for_hub

if TYPE_CHECKING:
    from lowvram_chat.data.preview import Preview
    from lowvram_chat.exporting.merge import Merged
    from lowvram_chat.model.chat_session import ChatSession
    from lowvram_chat.model.scoring import Score
    from lowvram_chat.planning.plan import Plan
    from lowvram_chat.planning.search import Suggestion
    from lowvram_chat.recipe.schema import Recipe

SAVED_DTYPES = ("float32", "float16", "bfloat16")
"""Types that `merge` can save in."""

__all__ = [
    "evaluate",
    "load_recipe",
    "merge",
    "open_chat",
    "plan",
    "preview",
    "search",
    "train",
]


def load_recipe(path: str | Path, *overrides: str) -> Recipe:
    """Return the recipe in a YAML file, with `section.key=value` overrides applied.

    Raises:
        NotFoundError: there is no such file.
        UsageError: an override is not of that form.
        RecipeError: a setting is wrong; the message lists every problem.
    """
    from lowvram_chat.errors import UsageError
    from lowvram_chat.recipe.yaml_file import load_recipe

    if not all(isinstance(word, str) for word in overrides):
        raise UsageError(
            "load_recipe: an override is not a text. Write 'section.key=value', such as 'train.max_steps=100'."
        )
    check_path("path", path)
    return load_recipe(path, overrides)


def preview(source: str | Path | Sequence[str | Path], recipe: Recipe | None = None, *, rows: int = 3) -> Preview:
    """Return what would be trained: the first `rows` rows of a source, and what the source holds.

    The recipe gives the tokenizer and the data settings (default: the built-in model). A hub dataset is read only as far as
    its first rows. `Preview.rows` holds the rows, `Preview.facts` the counts.

    Raises:
        UsageError: `rows` is not a whole number from 0.
        NotFoundError, DataError: the source as a whole cannot be read. Rows that cannot be used are counted.
        ModelError: the tokenizer cannot be loaded.
    """
    from lowvram_chat.errors import UsageError
    from lowvram_chat.quiet import quiet_transformers
    from lowvram_chat.recipe.yaml_file import build_recipe

    if not isinstance(rows, int) or rows < 0:
        raise UsageError(f"rows: {rows!r} is not a whole number from 0. Give the number of rows to show.")
    recipe = checked_recipe(recipe or build_recipe({"model": {"name": "builtin:tiny-gpt2"}}, (), "preview"))
    names = as_list(source)
    data = recipe.data.model_copy(update={"source": names[0] if len(names) == 1 else names})
    look_for_hub(recipe.model.name, *names, *as_list(data.eval_source))
    quiet_transformers()

    from lowvram_chat.data.preview import make_preview
    from lowvram_chat.data.template import set_template
    from lowvram_chat.model.pretrained import load_tokenizer

    tokenizer = load_tokenizer(recipe.model.name, recipe.model.revision)
    set_template(tokenizer, data.chat_template, data.loss_on)
    return make_preview(data, tokenizer, recipe.train.seed, rows)


def plan(recipe: Recipe) -> Plan:
    """Return the predicted peak GPU memory of a recipe, without GPU, weights or data. It takes seconds.

    `memory.gpu: auto` is the card of this machine with what is free on it now, or an RTX 3050 Laptop 4 GB if there is none.

    `Plan.fits` is the verdict for this operating system, `Plan.on_card_bytes` the peak; a notebook shows a plan as HTML.
    Where the recipe says `train.micro_batch: planned`, the plan is that of the micro-batch decided on.

    Raises:
        NotFoundError, ModelError: the model's configuration or its adapter cannot be loaded.
    """
    from lowvram_chat.quiet import quiet_transformers

    recipe = checked_recipe(recipe)
    quiet_transformers()

    from lowvram_chat.model.present_card import for_this_machine
    from lowvram_chat.planning.changes import apply_change
    from lowvram_chat.planning.prediction import make_plan
    from lowvram_chat.planning.search import planned_micro_batch

    recipe = for_this_machine(recipe)
    return make_plan(apply_change(recipe, planned_micro_batch(recipe, make_plan)))


def search(recipe: Recipe, *, goal: Literal["fit", "speed"] = "fit") -> list[Suggestion]:
    """Return changes to a recipe whose result is predicted to fit, fastest first; about 3 s per candidate.

    `goal="fit"`: the smallest changes that make the recipe fit; empty if there are none. A recipe that fits already gets
    changes that need less memory. `goal="speed"`: all ways to take the same optimizer step, with the largest micro-batch
    that fits.

    Raises:
        UsageError: `goal` is neither.
        NotFoundError, ModelError: the model's configuration or its adapter cannot be loaded.
    """
    from lowvram_chat.errors import UsageError
    from lowvram_chat.quiet import quiet_transformers

    recipe = checked_recipe(recipe)
    if goal not in ("fit", "speed"):
        raise UsageError(f"search: the goal {goal!r} is not known. Give 'fit' or 'speed'.")
    quiet_transformers()

    from lowvram_chat.model.present_card import for_this_machine
    from lowvram_chat.planning.changes import apply_change
    from lowvram_chat.planning.search import advise, fastest, planned_micro_batch
    from lowvram_chat.timing.planner import PLANNER

    recipe = for_this_machine(recipe)
    recipe = apply_change(recipe, planned_micro_batch(recipe, PLANNER.plan))
    return advise(recipe, PLANNER) if goal == "fit" else fastest(recipe, PLANNER)


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, force: bool = False) -> dict[str, Any]:
    """Train by a recipe, write the run folder `recipe.output.dir`, and return what its `result.json` holds.

    `resume` continues from the last complete checkpoint, `overwrite` replaces an earlier run, and `force` starts a run that
    is predicted not to fit.

    Raises:
        LowVramError: for everything that can be known before the first step, with nothing written.
        OutOfMemory: the device ran out of memory; the run folder is as it was at the last checkpoint.
        DivergedError: weights became NaN or infinite; the run folder is as it was at the last checkpoint.
        KeyboardInterrupt: Ctrl-C or another signal ended the run, after a checkpoint.
    """
    from lowvram_chat.errors import DivergedError, UsageError
    from lowvram_chat.stopping import signals_answered
    from lowvram_chat.training.run_dir import is_main_process
    from lowvram_chat.training.start import check_start, finished_result, owned_run

    recipe = checked_recipe(recipe)
    if resume and overwrite:
        raise UsageError("train: resume and overwrite exclude each other. Give one of them.")
    with signals_answered(), owned_run(recipe):
        run = check_start(recipe, resume=resume, overwrite=overwrite)
        if resume and (finished := finished_result(run, recipe)):
            return finished
        look_for_hub(recipe.model.name, *as_list(recipe.data.source), *as_list(recipe.data.eval_source))

        from lowvram_chat.model.device import check_device
        from lowvram_chat.quiet import quiet_transformers

        device = check_device(recipe)
        quiet_transformers()

        from lowvram_chat.exporting.model_card import write_model_card
        from lowvram_chat.reporting.run_page import write_run_page
        from lowvram_chat.training.run import train

        try:
            result = train(recipe, device=device, resume=resume, force=force)
        except (KeyboardInterrupt, DivergedError):
            if run.metrics_file.is_file() and is_main_process():
                write_run_page(run)
            raise
        if is_main_process():
            write_model_card(run, result)
            write_run_page(run)
        return result


def merge(
    run: str | Path,
    *,
    out: str | Path | None = None,
    base: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    device: str = "auto",
) -> Merged:
    """Merge a run's adapter into its base model; return the model's folder and the proof that it is the same function.

    `out` is the target folder (default: `merged` in the run folder), `base` another place of the same base model, `dtype`
    the type to save in, and `overwrite` replaces an earlier merge. `device` "auto" is the CPU, unless only the graphics card has
    room for the model.

    Raises:
        NotFoundError, ModelError, UsageError: no run, no adapter, another base, or a target in use.
        ProofError: the logits differ; nothing is kept.
        OutOfMemory: the model does not fit the device; nothing is kept.
    """
    from lowvram_chat.errors import UsageError
    from lowvram_chat.exporting.merge_target import check_merge, owned_target
    from lowvram_chat.quiet import quiet_transformers

    if dtype not in SAVED_DTYPES:
        raise UsageError(f"merge: the type {dtype!r} is not known. Give one of {', '.join(SAVED_DTYPES)}.")
    check_device_name(device)
    check_path("run", run)
    if out is not None:
        check_path("out", out)
    with owned_target(run, None if out is None else Path(out)):
        folder, target = check_merge(run, None if out is None else Path(out), base=base, overwrite=overwrite)
        look_for_hub(base or folder.recipe().model.name)
        quiet_transformers()

        from lowvram_chat.exporting.merge import merge_run

        return merge_run(folder, target, base=base, dtype=dtype, device=device)


def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path] = (),
    *,
    split: str = "train",
    format: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    max_bad_rows: float = 0,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Score]:
    """Return the held-out loss of a run or model under "assistant" and "all"; data without roles has "all" only.

    `data` names files, globs or a hub dataset (default: what the run held out), `split` a hub dataset's split, `format` the
    row format (default: detected), `limit` the conversations to use, `max_length` the tokens per row, `max_bad_rows` the
    unusable rows to skip or their share, `batch_size` the rows per batch, and `device` one of `DEVICES`.

    Raises:
        UsageError: there is nothing to score on, or a setting is wrong.
        NotFoundError, ModelError, DataError: the model or the data cannot be loaded.
        OutOfMemory: a single row does not fit the device.
    """
    from lowvram_chat.errors import UsageError
    from lowvram_chat.quiet import quiet_transformers
    from lowvram_chat.training.evaluation_data import evaluation_data

    names = as_list(data)
    check_device_name(device)
    check_path("model", model)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch_size: {batch_size!r} is not a whole number above 0. Give the rows per batch.")
    given = {"split": split, "format": format, "eval_limit": limit, "max_length": max_length}
    settings = {name: value for name, value in given.items() if value is not None}
    section, fit_length = evaluation_data(str(model), names, settings | {"max_bad_rows": max_bad_rows})
    look_for_hub(str(model), *names)
    quiet_transformers()

    from lowvram_chat.training.evaluation import evaluate_model

    return evaluate_model(str(model), section, batch_size=batch_size, fit_length=fit_length, device=device)


def open_chat(
    model: str | Path,
    *,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    max_new_tokens: int = 200,
    seed: int | None = None,
    device: str = "auto",
) -> ChatSession:
    """Return a conversation with a run, a model folder, a hub model or `builtin:tiny-gpt2`.

    `ChatSession.ask` returns an answer and `ChatSession.reset` starts again. `system` is a system message. `temperature` 0
    is greedy decoding, `top_p` is nucleus sampling, `max_new_tokens` limits an answer, `seed` makes answers repeatable, and
    `device` is one of `DEVICES`.

    Raises:
        UsageError: a sampling setting is out of range.
        NotFoundError, ModelError: the model cannot be loaded.
        OutOfMemory: the model does not fit the device.
    """
    from lowvram_chat.errors import UsageError
    from lowvram_chat.model.sampling import Sampling, check_seed
    from lowvram_chat.quiet import quiet_transformers

    if not (system is None or isinstance(system, str)):
        raise UsageError(f"system: {system!r} is not a text. Give the system message.")
    check_seed(seed)
    check_device_name(device)
    check_path("model", model)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    look_for_hub(str(model))
    quiet_transformers()

    from lowvram_chat.model.chat_session import ChatSession, open_for_chat

    return ChatSession(open_for_chat(str(model), device), system=system, sampling=sampling, seed=seed)
