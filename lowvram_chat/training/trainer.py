"""The one file that imports trl: a recipe's settings as an SFTConfig, and SFTTrainer with our rows and our loss.

TRL's own data preparation, loss and metrics are not used: its batches always carry a mask, its loss scores every
position on a CPU, and its metrics synchronise with the device three times a micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer

from lowvram_chat.data.rows import Collator
from lowvram_chat.model.scoring import row_lengths, score
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.training.run_dir import RunDir

if TYPE_CHECKING:
    from lowvram_chat.training.callbacks import TokenCounts


class GroupedSampler(LengthGroupedSampler):
    """transformers' batches of like length, the longest first, in an order that depends on seed and epoch alone."""

    def __init__(self, args: SFTConfig, lengths: list[int]) -> None:
        rows = args.train_batch_size * args.gradient_accumulation_steps
        super().__init__(rows, lengths=lengths, generator=torch.Generator())
        self.seed = args.data_seed or 0
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: a resumed run finds the order of the one it goes on with."""
        self.generator.manual_seed(self.seed + epoch)


class ChatTrainer(SFTTrainer):
    """SFTTrainer with the loss of `model.loss` and a held-out loss that is exact to the token."""

    control: Any
    loss_is_scaled_for_ga = True  # by `num_items_in_batch`, the labelled tokens of the whole accumulated batch

    def __init__(
        self,
        *args: Any,
        counts: TokenCounts,
        precision: str,
        held_out_collator: Collator,
        grouped: bool = False,
        **kwargs: Any,
    ) -> None:
        self.grouped = grouped
        self.held_out_collator = held_out_collator
        super().__init__(*args, **kwargs)
        self.counts = counts
        self.precision = precision
        self.model_accepts_loss_kwargs = True
        # SFTTrainer casts the adapter of a 4-bit base to bfloat16; what trains stays float32 here, since fp16's
        # gradient scaler and small updates need it.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the summed loss of a micro-batch over the labelled tokens of the whole step: () fp32."""
        self.counts.add(inputs.pop("real_tokens"), inputs["input_ids"].numel())
        loss = model(**inputs)["loss"]
        if num_items_in_batch is None:
            num_items_in_batch = inputs["loss_positions"].numel()
        # DistributedDataParallel averages over processes what `num_items_in_batch` already counted over all of them.
        return loss * self.accelerator.num_processes / num_items_in_batch  # type: ignore[no-any-return]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch; none where the checkpoint is of the last step, after which transformers would take one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the held-out loss of `eval_dataset` (default: the trainer's)."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        held_out = score(self.model, rows, self.held_out_collator, self.args.eval_batch_size, self.precision)
        metrics = {f"{metric_key_prefix}_loss": held_out.loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the order of rows: random, or in batches of like length."""
        if not self.grouped:
            return super()._get_train_sampler(train_dataset)
        return GroupedSampler(self.args, row_lengths(self.train_dataset))

    def gather_counts(self) -> None:
        """Sum the token counts over all processes."""
        mine = torch.tensor([self.counts.real_tokens, self.counts.padded_tokens], device=self.args.device)
        self.counts.real_tokens, self.counts.padded_tokens = self.accelerator.reduce(mine, "sum").tolist()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the run folder has a card of its own, and checkpoints need none."""


def sft_config(recipe: Recipe, run: RunDir, *, evaluate: bool) -> SFTConfig:
    """Return every setting of TRL and transformers that matters, none left to a default that could move."""
    train, optimizer = recipe.train, recipe.optimizer
    cuda = torch.cuda.is_available()
    workers = train.dataloader_num_workers if train.dataloader_num_workers is not None else 2 * cuda
    return SFTConfig(
        output_dir=str(run.checkpoints),
        use_cpu=not cuda,
        # data: rows come tokenised
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=recipe.data.max_length,
        packing=False,
        padding_free=False,
        assistant_only_loss=False,
        completion_only_loss=False,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=cuda,
        # Else a copy of pinned rows would wait for all that the card has to do.
        accelerator_config={"non_blocking": cuda},
        dataloader_drop_last=False,
        # the step
        per_device_train_batch_size=train.per_device_train_batch_size,
        per_device_eval_batch_size=train.per_device_eval_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        gradient_checkpointing=train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        fp16=train.precision == "fp16",
        bf16=train.precision == "bf16",
        tf32=None,
        torch_compile=False,
        activation_offloading=False,
        average_tokens_across_devices=True,
        # the optimizer
        optim=OPTIMIZERS[optimizer.name].optim,
        optim_args=f"momentum={optimizer.momentum}" if optimizer.name == "sgd" else None,
        learning_rate=train.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps,
        max_grad_norm=train.max_grad_norm,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_ratio,  # below 1: a share of the steps
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps if train.max_steps is not None else -1,
        seed=train.seed,
        data_seed=train.seed,
        # what is written
        logging_strategy="steps",
        logging_steps=train.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would synchronise with the device at every micro-batch
        eval_strategy="steps" if evaluate and train.eval_steps else "no",
        eval_steps=train.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps" if train.save_steps else "no",
        save_steps=train.save_steps or 500,
        save_total_limit=train.save_total_limit,
        save_only_model=False,
        report_to=list(recipe.output.report_to) or "none",
        disable_tqdm=True,
        push_to_hub=False,
    )
