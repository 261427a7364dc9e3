"""One attempt at a run: everything it needs, loaded and checked, then trained and saved.

Everything that can fail for a reason known beforehand (names, data, adapter, device) fails in `prepare`, before anything
is written.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowvram_chat import stopping
from lowvram_chat.data.dataset import PreparedRows, load_rows
from lowvram_chat.data.rows import Collator
from lowvram_chat.data.template import set_template
from lowvram_chat.errors import UsageError
from lowvram_chat.files import beside, delete_unfinished, replace_folder, sync_files, write_json, written
from lowvram_chat.model.adapters import base_model_of
from lowvram_chat.model.compilation import should_compile
from lowvram_chat.model.device import keep_freed_pages, set_fp16_accumulation
from lowvram_chat.model.generation_settings import prepare_generation_config
from lowvram_chat.model.out_of_memory import first_line, phase
from lowvram_chat.model.pretrained import check_positions, check_vocabulary, load_config, load_tokenizer
from lowvram_chat.model.scoring import score
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.training.budget import allocator_limit, compare_with_plan
from lowvram_chat.training.callbacks import MetricsCallback, TokenCounts, peak_memory
from lowvram_chat.training.checkpoint_fingerprint import CheckpointFingerprint
from lowvram_chat.training.checkpoints import MANIFEST, step_of
from lowvram_chat.training.finite import FiniteGuard
from lowvram_chat.training.halving import CHECKS, EVALUATION, LOADING, SAVING
from lowvram_chat.training.metrics_file import drop_later_lines, last_loss
from lowvram_chat.training.model_setup import build_checked_model, save_model
from lowvram_chat.training.new_run import created
from lowvram_chat.training.preflight import check_before_training, try_longest_batch
from lowvram_chat.training.resume import log_changes
from lowvram_chat.training.run_dir import RunDir, is_main_process
from lowvram_chat.training.samples import SampleGenerator, take_samples
from lowvram_chat.training.trackers import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from lowvram_chat.planning.plan import Plan
    from lowvram_chat.training.model_setup import BuiltModel, TrainedModel
    from lowvram_chat.training.trainer import ChatTrainer

log = logging.getLogger(__name__)


@dataclass
class Session:
    """What a run needs, loaded and checked."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    rows: PreparedRows
    built: BuiltModel
    """The model with its loss attached and its adapter, if the recipe has one, and its base's fingerprint."""
    plan: Plan | None = None
    """The run's memory plan, if it was planned."""
    compiled: bool = False
    """Whether the model is compiled, which needs batches of one shape."""
    started: bool = False
    """Whether the run folder is this run's; before, it is as an earlier run left it."""

    @property
    def model(self) -> TrainedModel:
        """The model that is trained."""
        return self.built.model

    @classmethod
    def prepare(
        cls, recipe: Recipe, *, device: torch.device, rows: PreparedRows | None = None, plan: Plan | None = None
    ) -> Session:
        """Load the tokenizer, the rows (unless they are given) and the model.

        Raises:
            LowVramError: something is missing or wrong; nothing is written but the token cache.
        """
        check_trackers(recipe.output.report_to)
        base = recipe.model
        config = load_config(base.name, base.revision)
        check_positions(config, recipe.data.max_length, base.name)
        tokenizer = load_tokenizer(base.name, base.revision)
        check_vocabulary(tokenizer, config, base.name)
        set_template(tokenizer, recipe.data.chat_template, recipe.data.loss_on)
        compiled = should_compile(recipe.train, device)
        set_fp16_accumulation(wanted=recipe.train.fp16_accumulation)
        keep_freed_pages(device)
        rows = rows or load_rows(recipe.data, tokenizer, recipe.train.seed)
        torch.manual_seed(recipe.train.seed)  # for the adapter's random initial weights
        with phase(LOADING):
            built = build_checked_model(recipe, device, compiled=compiled)
        prepare_generation_config(base_model_of(built.model), tokenizer, base.name)
        return cls(recipe, tokenizer, rows, built, plan, compiled)

    def run(self, *, resume: bool) -> dict[str, Any]:
        """Train, save, and return what `result.json` holds.

        Raises:
            RuntimeError: the device ran out of memory (`is_out_of_memory`); the run folder is as at its last checkpoint.
            LowVramError: a check before the first step failed; what was in the run folder is still there.
        """
        fingerprint = CheckpointFingerprint.of(self.built.base, self.tokenizer, self.rows, self.recipe)
        checkpoint = RunDir.of(self.recipe).last_checkpoint() if resume else None
        if checkpoint is not None:
            fingerprint.check(checkpoint)
            self._check_length(step_of(checkpoint))
            for damaged, reason in RunDir.of(self.recipe).damaged_checkpoints().items():
                log.warning("%s: %s, so it is not used", damaged, reason)
            if not (checkpoint / MANIFEST).is_file():
                log.warning("%s: has no %s, so only the lengths of its files were checked", checkpoint, MANIFEST)
            log_changes(RunDir.of(self.recipe), self.recipe)
        counts = TokenCounts() if checkpoint is None else TokenCounts.of_checkpoint(checkpoint)
        with created(self.recipe, resume=resume) as run:
            guard = FiniteGuard(self.recipe)
            metrics = MetricsCallback(run, counts, fingerprint, guard, allocator_limit(self.plan))
            with phase(CHECKS):
                trainer = self._trainer(run, counts, metrics, guard)
                check_before_training(self.built, self.tokenizer, trainer, run.path, self.recipe)
        self.started = True
        if checkpoint is not None:
            drop_later_lines(run, checkpoint)
            log.info("resuming from %s", checkpoint)
        before = self._held_out_loss(trainer)  # of a resumed run too: `train` loads its checkpoint
        if before is not None:
            log.info("held-out loss before: %.4f", before)
        if checkpoint is None:
            self._take_samples(run, "before")
        try:
            with contextlib.closing(metrics), stopping.deferred():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            stopping.raise_if_requested()
            guard.check(trainer.state.global_step, self.model)
            return self._finish(run, trainer, before, self._held_out_loss(trainer))
        except (KeyboardInterrupt, OSError):
            _log_interrupted(run)
            raise

    def _check_length(self, step: int) -> None:
        """Refuse to resume a run from a step after its last one.

        Raises:
            UsageError: `train.num_train_epochs` ends before that step.
        """
        train = self.recipe.train
        if train.max_steps is None:
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            steps = math.ceil(
                train.num_train_epochs * math.ceil(len(self.rows.train) / (processes * train.effective_batch_size))
            )
            if step > steps:
                raise UsageError(
                    f"train.num_train_epochs: {train.num_train_epochs:g} are {steps} steps, but the last checkpoint is from step "
                    f"{step}. Set more epochs."
                )

    def run_steps(self, run: RunDir, callback: TrainerCallback) -> None:
        """Train and save nothing, for a measurement that `callback` takes."""
        trainer = self._trainer(run, TokenCounts(), callback)
        try_longest_batch(trainer)
        trainer.train()

    def _trainer(
        self, run: RunDir, counts: TokenCounts, callback: TrainerCallback, guard: FiniteGuard | None = None
    ) -> ChatTrainer:
        from transformers import PrinterCallback

        from lowvram_chat.training.sft_settings import sft_config
        from lowvram_chat.training.trainer import ChatTrainer

        trainer = ChatTrainer(
            model=self.model,
            args=sft_config(self.recipe, run, evaluate=self.rows.held_out is not None),
            train_dataset=self.rows.train,
            eval_dataset=self.rows.held_out,
            data_collator=self._collator(),
            held_out_collator=self._collator(training=False),
            processing_class=self.tokenizer,
            callbacks=[callback],
            counts=counts,
            guard=guard or FiniteGuard(self.recipe),
            precision=self.recipe.train.precision,
            grouped=self.recipe.data.rows == "grouped",
            complete_checkpoint=callback.complete_checkpoint if isinstance(callback, MetricsCallback) else None,
            kept_checkpoints=self.recipe.train.save_total_limit,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _collator(self, *, training: bool = True) -> Collator:
        data = self.recipe.data
        fixed = training and (self.compiled or data.rows == "packed")
        return Collator(
            int(self.tokenizer.pad_token_id),
            length=data.max_length if fixed else None,
            rows=self.recipe.train.per_device_train_batch_size if training and self.compiled else None,
            attention_mask=data.attention_mask,
        )

    def _take_samples(self, run: RunDir, when: Literal["before", "after"]) -> None:
        prompts = self.recipe.output.sample_prompts
        if not (prompts and is_main_process()):
            return
        try:
            take_samples(run, when, prompts, SampleGenerator(self.model, self.tokenizer, self.recipe.train.precision))
        except (
            RuntimeError
        ) as error:  # no memory, or a loss that is NaN, with which no token can be chosen; the run continues
            log.warning("output.sample_prompts: no answers %s the run (%s)", when, first_line(error))

    def _held_out_loss(self, trainer: ChatTrainer) -> float | None:
        if self.rows.held_out is None:
            return None
        batch_size, precision = self.recipe.train.per_device_eval_batch_size, self.recipe.train.precision
        with phase(EVALUATION):
            return score(
                trainer.trained_model, self.rows.held_out, trainer.held_out_collator, batch_size, precision
            ).loss

    def _finish(self, run: RunDir, trainer: ChatTrainer, before: float | None, after: float | None) -> dict[str, Any]:
        """Save the adapter or model, and the result."""
        folder = run.model if self.recipe.adapter is None else run.adapter
        trainer.gather_counts()
        result = {
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            "training_loss": last_loss(run),
            "steps": trainer.state.global_step,
            "epochs": round(trainer.state.epoch or 0.0, 4),
            **{name: round(value, 2) for name, value in asdict(trainer.counts).items()},
            **peak_memory(),
            **compare_with_plan(self.plan),
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "data": asdict(self.rows.facts),
            "adapter" if self.recipe.adapter else "model": folder.as_posix(),
        }
        if trainer.is_world_process_zero():
            partial = beside(folder, "new")
            delete_unfinished(partial)  # of a run that was killed in this, and resumed
            with phase(SAVING), written(run.path):
                save_model(self.built, self.tokenizer, partial)
                sync_files(partial)
            replace_folder(partial, folder)
            write_json(run.result_file, result)
            self._take_samples(run, "after")
        return result


def _log_interrupted(run: RunDir) -> None:
    """Log how to continue after Ctrl-C or a full disk."""
    checkpoint = run.last_checkpoint()
    if checkpoint:
        log.info("--resume continues from %s", checkpoint)
    else:
        log.info("no checkpoint was written yet; --overwrite starts again")
