"""SFTTrainer with our rows and our loss.

TRL's data preparation, loss and metrics are not used. Its batches always carry an attention mask, its loss scores every
position on a CPU, and its metrics synchronise with the device three times per micro-batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer

from lowvram_chat.data.rows import Collator
from lowvram_chat.errors import DeviceError
from lowvram_chat.files import discard, written
from lowvram_chat.model.adapters import check_adapter_tensors
from lowvram_chat.model.out_of_memory import phase
from lowvram_chat.model.pretrained import load_weights
from lowvram_chat.model.scoring import row_lengths, score
from lowvram_chat.private_names import check_private_names
from lowvram_chat.training.bitsandbytes_states import forget_earlier_optimizers, states_stay_paged
from lowvram_chat.training.checkpoints import PARTIAL, put_in_place, read_as_tensors, seal
from lowvram_chat.training.halving import EVALUATION
from lowvram_chat.training.loss_check import check_trainer_loss
from lowvram_chat.training.save_check import checkpoint_bytes

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from torch.utils.data import Sampler

    from lowvram_chat.training.callbacks import TokenCounts
    from lowvram_chat.training.finite import FiniteGuard

log = logging.getLogger(__name__)

check_private_names(
    "transformers.Trainer._run_epoch",
    "transformers.Trainer._get_output_dir",
    "transformers.Trainer._save_checkpoint",
    "transformers.Trainer._get_train_sampler",
    "transformers.Trainer._load_from_checkpoint",
    "transformers.Trainer._load_optimizer_and_scheduler",
    "transformers.Trainer._load_scaler",
    "transformers.Trainer._load_rng_state",
)


def checkpoint_activations(model: Any) -> None:
    """Switch gradient checkpointing on, under the name that it has in this version of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class GroupedSampler(LengthGroupedSampler):
    """Batches of rows of similar length, the longest first, in an order that depends only on the seed and the epoch."""

    def __init__(self, args: SFTConfig, lengths: list[int]) -> None:
        rows = args.train_batch_size * args.gradient_accumulation_steps
        super().__init__(rows, lengths=lengths, generator=torch.Generator())
        self.seed = args.data_seed or 0
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch. A resumed run gets the order of the epoch that it continues."""
        self.generator.manual_seed(self.seed + epoch)


class ChatTrainer(SFTTrainer):
    """SFTTrainer with the loss of `model.loss` and a held-out loss that is exact to the token."""

    args: SFTConfig
    train_dataset: Dataset
    # `compute_loss` divides by `num_items_in_batch`, the labelled tokens of the whole accumulated batch.
    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # TRL assigns None without a type

    def __init__(
        self,
        *args: Any,
        counts: TokenCounts,
        guard: FiniteGuard,
        precision: str,
        held_out_collator: Collator,
        grouped: bool = False,
        complete_checkpoint: Callable[[Path], None] | None = None,
        kept_checkpoints: int = 1,
        **kwargs: Any,
    ) -> None:
        """Build the trainer and compare its loss with the model's logits.

        `counts` receives the tokens of every micro-batch, `guard` looks at what is saved, `precision` is the recipe's
        `train.precision`, and `grouped` selects `GroupedSampler`. `complete_checkpoint` adds files to a checkpoint that is
        being written, and the newest `kept_checkpoints` are kept. The other arguments are SFTTrainer's.

        Raises:
            SubstitutionError: the loss is not what the model's logits give.
            DeviceError: accelerate is set to another precision.
        """
        forget_earlier_optimizers()
        self.grouped = grouped
        self.complete_checkpoint = complete_checkpoint
        self.kept_checkpoints = kept_checkpoints
        self.partial_checkpoints: Path | None = None
        self.held_out_collator = held_out_collator
        super().__init__(*args, **kwargs)
        self.counts = counts
        self.guard = guard
        self.precision = precision
        self.model_accepts_loss_kwargs = True
        # SFTTrainer casts the adapter of a 4-bit base to bfloat16. Trained weights stay float32 here, because fp16's
        # gradient scaler and small updates need it.
        for parameter in self.trained_model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if self.args.gradient_checkpointing:  # the Trainer itself would do so after the longest batch has been tried
            checkpoint_activations(self.trained_model)
        self._check_precision()
        check_trainer_loss(self)

    @property
    def trained_model(self) -> nn.Module:
        """The model, under its adapter if there is one."""
        assert self.model is not None
        return self.model

    def _check_precision(self) -> None:
        """Refuse a precision that accelerate takes from its environment variable or its own configuration file.

        Raises:
            DeviceError: it is not the recipe's.
        """
        found = self.accelerator.mixed_precision.replace("no", "fp32")
        if found != self.precision:
            raise DeviceError(
                f"train.precision: {self.precision}, but accelerate is set to {found}. Unset ACCELERATE_MIXED_PRECISION, or "
                f"set train.precision={found}."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the summed loss of a micro-batch divided by the labelled tokens of the whole step: (), fp32."""
        self.counts.add(inputs.pop("real_tokens"), inputs["input_ids"].numel())
        self.guard.saw(inputs.pop("conversations", ()))
        # DistributedDataParallel averages the gradients over the processes, and `num_items_in_batch` is summed over them.
        loss: torch.Tensor = model(**inputs)["loss"] * self.accelerator.num_processes
        if num_items_in_batch is None:
            num_items_in_batch = inputs["loss_positions"].numel()
        return loss / num_items_in_batch

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint, all of them.

        The Trainer would load a full model's file without converting its keys to the module's and without requiring that
        they match, so that GPT-NeoX and Mixtral silently went on with the base weights.

        Raises:
            ModelError: weights are missing or damaged.
        """
        model = self.trained_model if model is None else model
        if isinstance(model, PeftModel):
            check_adapter_tensors(model, Path(resume_from_checkpoint))
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of a checkpoint, with the learning rate that the present schedule has at its step.

        The loaded rate is that of the schedule that the checkpoint was written under. After the last step of a run it is 0,
        and a longer run would take its first step at that rate.
        """
        names = f"{checkpoint}: optimizer.pt or scheduler.pt"
        with states_stay_paged(self._own_optimizer()), read_as_tensors(names):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.optimizer is None:
            return
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
        if not isinstance(schedule, LambdaLR):
            return
        step, before = schedule.last_epoch, self.optimizer.param_groups[0]["lr"]
        rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule.load_state_dict({**schedule.state_dict(), "_last_lr": rates})  # what is logged for the next step
        if not math.isclose(before, rates[0], rel_tol=1e-6, abs_tol=1e-15):
            log.warning(
                "the learning-rate schedule has changed with the recipe: after step %d the rate is %.3g instead of %.3g",
                step,
                rates[0],
                before,
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random states of a checkpoint.

        Raises:
            ModelError: the file holds more than states.
        """
        with read_as_tensors(f"{checkpoint}: rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _own_optimizer(self) -> object:
        """Return the optimizer that accelerate wraps."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load the gradient scaler of an fp16 checkpoint, unless the run goes on in another precision, which has none."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    def _get_output_dir(self, trial: Any = None) -> str:
        """Return the folder that the Trainer writes a checkpoint in."""
        return str(self.partial_checkpoints or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, complete and sync it, and move it into its place, before older ones are deleted.

        Raises:
            DivergedError: weights or optimizer states are NaN or infinite.
            StorageError: the disk is full. The last checkpoint is as it was.
        """
        self.guard.check(self.state.global_step, self.trained_model, self._own_optimizer())
        checkpoints, step = Path(str(self.args.output_dir)), self.state.global_step
        partial = checkpoints / PARTIAL / f"checkpoint-{step}"
        if self.is_world_process_zero():
            discard(partial.parent)  # what a killed process left
        self.accelerator.wait_for_everyone()
        checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            with written(checkpoints, checkpoint_bytes(self.trained_model, self.guard.recipe)):
                self._write_checkpoint(model, trial, partial)
        except OSError:
            if self.is_world_process_zero():
                discard(partial.parent)
            raise
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model: nn.Module, trial: Any, partial: Path) -> None:
        """Write a checkpoint aside, and let the process that writes move it into its place."""
        self.partial_checkpoints = partial.parent
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
        finally:
            self.partial_checkpoints = None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if self.complete_checkpoint is not None:
                self.complete_checkpoint(partial)
            seal(partial, self.state.global_step)
            put_in_place(partial, partial.parent.parent / partial.name, self.kept_checkpoints)
            discard(partial.parent)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, unless the last step is done already: a checkpoint of the last step would get one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]
        else:
            self.control.should_training_stop = True

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the held-out loss of `eval_dataset` (default: the trainer's)."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        with phase(EVALUATION):
            held_out = score(
                self.trained_model, rows, self.held_out_collator, self.args.eval_batch_size, self.precision
            )
        metrics = {f"{metric_key_prefix}_loss": held_out.loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        """Return the order of the rows: random, or in batches of similar length."""
        if not self.grouped:
            return super()._get_train_sampler(train_dataset)
        return GroupedSampler(self.args, row_lengths(self.train_dataset))

    def gather_counts(self) -> None:
        """Sum the token counts over all processes."""
        mine = torch.tensor([self.counts.real_tokens, self.counts.padded_tokens], device=self.args.device)
        self.counts.real_tokens, self.counts.padded_tokens = self.accelerator.reduce(mine, "sum").tolist()

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write nothing: the run folder has its own model card, and checkpoints need none."""
