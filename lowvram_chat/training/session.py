"""One run from a checked recipe to a finished run folder.

Everything that can fail for a reason known beforehand (names, data, adapter, device) fails in `prepare`, while nothing
is written yet.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowvram_chat.data.dataset import PreparedRows, load_rows
from lowvram_chat.data.rows import Collator
from lowvram_chat.data.template import set_template
from lowvram_chat.errors import DeviceError, OutOfMemory
from lowvram_chat.files import write_json
from lowvram_chat.model.adapters import add_adapter, save_adapter
from lowvram_chat.model.compilation import compile_blocks, should_compile
from lowvram_chat.model.device import keep_freed_pages, set_fp16_accumulation
from lowvram_chat.model.isolation import check_causal, isolate_documents
from lowvram_chat.model.loss import attach_loss
from lowvram_chat.model.pretrained import check_positions, load_config, load_model, load_tokenizer
from lowvram_chat.model.scoring import score
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.training import budget, card, run_dir
from lowvram_chat.training.callbacks import MetricsCallback, TokenCounts, peak_memory
from lowvram_chat.training.metrics_file import drop_later_lines, last_loss
from lowvram_chat.training.oom import advice, halve, is_out_of_memory, micro_batch_overrides
from lowvram_chat.training.preflight import run_longest_batch
from lowvram_chat.training.resume import tell_changes
from lowvram_chat.training.run_dir import RunDir
from lowvram_chat.training.samples import SampleGenerator, take_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from lowvram_chat.planning.plan import Plan
    from lowvram_chat.training.trainer import ChatTrainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What a run needs, loaded and checked."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    rows: PreparedRows
    model: Any
    """The base model with its loss attached, under its adapter if there is one."""
    planned: Plan | None = None
    """The run's memory plan, where it was planned."""
    compiled: bool = False
    """Whether the blocks are compiled, which wants batches of one shape."""

    @classmethod
    def prepare(
        cls, recipe: Recipe, *, device: torch.device, rows: PreparedRows | None = None, planned: Plan | None = None
    ) -> Session:
        """Load tokenizer, rows (unless they are there) and model.

        Raises:
            LowVramError: one of its kinds; nothing is written but the token cache.
        """
        _check_trackers(recipe.output.report_to)
        base = recipe.model
        check_positions(load_config(base.name, base.revision), recipe.data.max_length, base.name)
        tokenizer = load_tokenizer(base.name, base.revision)
        set_template(tokenizer, recipe.data.chat_template, recipe.data.loss_on)
        compiled = should_compile(recipe.train, device)
        set_fp16_accumulation(wanted=recipe.train.fp16_accumulation)
        keep_freed_pages(device)
        rows = rows or load_rows(recipe.data, tokenizer, recipe.train.seed)
        torch.manual_seed(recipe.train.seed)  # the adapter's random half
        on_cpu = device.type == "cpu"
        model = build_model(recipe, device, on_cpu=on_cpu)
        check_causal(model, device, recipe.train.precision)
        if recipe.data.rows == "packed":
            by_document = (
                base.document_attention and on_cpu and not compiled
            )  # the shapes of what is compiled are fixed
            isolate_documents(model, device, recipe.train.precision, by_document=by_document)
        if compiled:
            compile_blocks(model)
        return cls(recipe, tokenizer, rows, model, planned, compiled)

    def run(self, *, resume: bool) -> dict[str, Any]:
        """Train, save, and return what `result.json` holds.

        Raises:
            RuntimeError: the device is full (`oom.is_out_of_memory`); the run folder is as it was at its last checkpoint.
        """
        if resume:
            tell_changes(RunDir(Path(self.recipe.output.dir)), self.recipe)
        run = run_dir.create(self.recipe, resume=resume)
        checkpoint = run.last_checkpoint() if resume else None
        counts = TokenCounts() if checkpoint is None else TokenCounts.of_checkpoint(checkpoint)
        if checkpoint is not None:
            drop_later_lines(run, checkpoint)
            log.info("resuming from %s", checkpoint)
        recorder = MetricsCallback(run, counts, budget.allocator_limit(self.planned))
        trainer = self._trainer(run, counts, recorder)
        self._rehearse(trainer)
        before = self._held_out_loss(trainer)  # a resumed run too: its checkpoint is loaded by `train`
        if before is not None:
            log.info("held-out loss before: %.4f", before)
        if checkpoint is None:
            self._take_samples(run, "before")
        try:
            with contextlib.closing(recorder.display):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            kept = run.last_checkpoint()
            log.info(
                "%s",
                f"--resume goes on from {kept}" if kept else "no checkpoint was written yet; --overwrite starts anew",
            )
            raise
        return self._finish(run, trainer, before, self._held_out_loss(trainer))

    def steps(self, run: RunDir, watch: TrainerCallback) -> None:
        """Train and keep nothing: what a measurement watches."""
        trainer = self._trainer(run, TokenCounts(), watch)
        self._rehearse(trainer)
        trainer.train()

    def _rehearse(self, trainer: ChatTrainer) -> None:
        train = self.recipe.train
        run_longest_batch(
            trainer.model, self.rows.train, trainer.data_collator, train.per_device_train_batch_size, train.precision
        )

    def _trainer(self, run: RunDir, counts: TokenCounts, watch: TrainerCallback) -> ChatTrainer:
        from transformers import PrinterCallback

        from lowvram_chat.training.trainer import ChatTrainer, sft_config

        trainer = ChatTrainer(
            model=self.model,
            args=sft_config(self.recipe, run, evaluate=self.rows.held_out is not None),
            train_dataset=self.rows.train,
            eval_dataset=self.rows.held_out,
            data_collator=self._collator(),
            held_out_collator=self._collator(training=False),
            processing_class=self.tokenizer,
            callbacks=[watch],
            counts=counts,
            precision=self.recipe.train.precision,
            grouped=self.recipe.data.rows == "grouped",
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _collator(self, *, training: bool = True) -> Collator:
        data = self.recipe.data
        fixed = training and (self.compiled or data.rows == "packed")
        pad = int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        return Collator(
            pad,
            length=data.max_length if fixed else None,
            rows=self.recipe.train.per_device_train_batch_size if training and self.compiled else None,
            attention_mask=data.attention_mask,
        )

    def _take_samples(self, run: RunDir, when: Literal["before", "after"]) -> None:
        prompts = self.recipe.output.sample_prompts
        if not (prompts and run_dir.is_main_process()):
            return
        try:
            take_samples(run, when, prompts, SampleGenerator(self.model, self.tokenizer, self.recipe.train.precision))
        except RuntimeError as error:  # a model whose loss is NaN cannot choose a word; the run goes on
            log.warning("output.sample_prompts: no answers %s the run (%s)", when, str(error).splitlines()[0])

    def _held_out_loss(self, trainer: ChatTrainer) -> float | None:
        if self.rows.held_out is None:
            return None
        batch_size, precision = self.recipe.train.per_device_eval_batch_size, self.recipe.train.precision
        return score(trainer.model, self.rows.held_out, trainer.held_out_collator, batch_size, precision).loss

    def _finish(self, run: RunDir, trainer: ChatTrainer, before: float | None, after: float | None) -> dict[str, Any]:
        """Save the adapter or model, its card and the result."""
        folder = run.model if self.recipe.adapter is None else run.adapter
        steps = trainer.state.global_step
        trainer.gather_counts()
        result = {
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            "training_loss": last_loss(run),
            "steps": steps,
            "epochs": round(trainer.state.epoch or 0.0, 4),
            **{name: round(value, 2) for name, value in asdict(trainer.counts).items()},
            **peak_memory(),
            **budget.compare_with_plan(self.planned),
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "data": asdict(self.rows.facts),
            "adapter" if self.recipe.adapter else "model": folder.as_posix(),
        }
        if trainer.is_world_process_zero():
            save(self.model, self.tokenizer, folder, self.recipe)
            (folder / "README.md").write_text(card.model_card(self.recipe, result), encoding="utf-8")
            write_json(run.result_file, result)
            self._take_samples(run, "after")
            _tell(run, result)
        return result


def train(recipe: Recipe, *, device: torch.device, resume: bool, force: bool = False) -> dict[str, Any]:
    """Run a recipe to its end and return what `result.json` holds; `memory.on_oom` says what a full device does.

    Raises:
        LowVramError: see `Session.prepare`.
        DoesNotFit: it is planned not to fit its card, and there is no `force`.
        OutOfMemory: the device is full and `memory.on_oom` says stop, or there is nothing left to halve.
    """
    recipe, planned = budget.plan_within_budget(recipe, device, force=force)
    rows = None
    while True:
        session = Session.prepare(recipe, device=device, rows=rows, planned=planned)
        try:
            return session.run(resume=resume)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            smaller = halve(recipe)
            if recipe.memory.on_oom == "stop" or smaller is None:
                raise OutOfMemory(advice(recipe, error)) from None
        # Outside of the handler, since the error holds the failed step's tensors.
        rows, recipe, resume = session.rows, smaller, RunDir(Path(recipe.output.dir)).last_checkpoint() is not None
        log.warning("out of memory: going on with %s", micro_batch_overrides(recipe))
        del session
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _check_trackers(names: list[str]) -> None:
    """Refuse a tracker that transformers does not know or whose package is missing.

    Raises:
        DeviceError: with the library's own words.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ValueError, RuntimeError, ImportError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        remedy = (
            "Leave it" if isinstance(error, ValueError) else "Install it, or leave it"
        )  # ValueError: no such tracker
        raise DeviceError(f"output.report_to: {reason}. {remedy} out of output.report_to.") from None


def build_model(recipe: Recipe, device: torch.device, *, on_cpu: bool = False) -> Any:
    """Return the recipe's model with its loss attached and its adapter on, as it will be trained on a card; `on_cpu`: as
    it is fastest there, which takes memory that no plan is about."""
    model = load_model(recipe.model, device=device)
    settings = recipe.model
    attach_loss(model, fused=settings.fused_loss, pad_vocabulary=settings.pad_vocabulary, on_cpu=on_cpu)
    if recipe.adapter is None:
        return model
    return add_adapter(model, recipe.adapter, on_cpu=on_cpu)


def save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, recipe: Recipe) -> None:
    """Write an adapter or model with its tokenizer and chat template."""
    if recipe.adapter is not None:
        save_adapter(model, folder, recipe.model.name)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tell(run: RunDir, result: dict[str, Any]) -> None:
    """Print the run's outcome, and what to do next, on stdout."""
    before, after = result["held_out_loss_before"], result["held_out_loss_after"]
    if before is not None and after is not None:
        print(f"held-out loss: {before:.4f} before, {after:.4f} after ({after - before:+.4f})")
    rate = result["real_tokens"] / max(result["seconds"], 1e-9)
    print(
        f"{result['steps']:,} steps, {result['real_tokens']:,} tokens in {result['seconds']:.0f} s, {rate:,.0f} tokens/s"
    )
    print(f"run folder: {run.path}")
    commands = [
        *(["merge"] if "adapter" in result else []),
        "chat",
        *(["evaluate"] if after is not None else []),  # else it has nothing to be evaluated on
    ]
    print("\n".join(f"next: python -m lowvram_chat.{command} {run.path}" for command in commands))
