"""SFTTrainer with our rows and our loss, and a recipe's settings as an SFTConfig. No other file imports trl.

TRL's data preparation, loss and metrics are not used. Its batches always carry an attention mask, its loss scores every
position on a CPU, and its metrics synchronise with the device three times per micro-batch.
"""

from __future__ import annotations

import dataclasses
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer

from lowvram_chat.data.rows import Collator
from lowvram_chat.errors import DeviceError
from lowvram_chat.model.scoring import row_lengths, score
from lowvram_chat.private_names import check_private_names
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.training.loss_check import check_trainer_loss
from lowvram_chat.training.run_dir import RunDir

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from torch.utils.data import Sampler

    from lowvram_chat.training.callbacks import TokenCounts

check_private_names("transformers.Trainer._run_epoch", "transformers.Trainer._get_train_sampler")


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
        precision: str,
        held_out_collator: Collator,
        grouped: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build the trainer and compare its loss with the model's logits.

        `counts` receives the tokens of every micro-batch, `precision` is the recipe's `train.precision`, and `grouped`
        selects `GroupedSampler`. The other arguments are SFTTrainer's.

        Raises:
            DeviceError: the loss is not what the model's logits give, or accelerate is set to another precision.
        """
        self.grouped = grouped
        self.held_out_collator = held_out_collator
        super().__init__(*args, **kwargs)
        self.counts = counts
        self.precision = precision
        self.model_accepts_loss_kwargs = True
        # SFTTrainer casts the adapter of a 4-bit base to bfloat16. Trained weights stay float32 here, because fp16's
        # gradient scaler and small updates need it.
        for parameter in self.trained_model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
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
        # DistributedDataParallel averages the gradients over the processes, and `num_items_in_batch` is summed over them.
        loss: torch.Tensor = model(**inputs)["loss"] * self.accelerator.num_processes
        if num_items_in_batch is None:
            num_items_in_batch = inputs["loss_positions"].numel()
        return loss / num_items_in_batch

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
        held_out = score(self.trained_model, rows, self.held_out_collator, self.args.eval_batch_size, self.precision)
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


def sft_config(recipe: Recipe, run: RunDir, *, evaluate: bool) -> SFTConfig:
    """Return a recipe's settings for TRL and transformers.

    Every setting that can change the loss, the order of the rows or the weights is named, because defaults differ between
    versions (`tests/integration/test_trainer_loss.py` lists the settings that are left out).

    Raises:
        DeviceError: the installed versions lack a setting.
    """
    settings: dict[str, Any] = {
        **_loss_settings(),
        **_data_settings(recipe),
        **_step_settings(recipe),
        **_checkpointing_settings(enabled=recipe.train.gradient_checkpointing),
        **_optimizer_settings(recipe),
        **_output_settings(recipe, run, evaluate=evaluate),
    }
    missing = sorted(settings.keys() - _known_settings())
    if missing:
        raise DeviceError(
            f"trl {metadata.version('trl')}, transformers {metadata.version('transformers')}: SFTConfig has no setting named "
            f"{', '.join(missing)}. Install the versions in constraints.txt (pip install -c constraints.txt -e .)."
        )
    return SFTConfig(**settings)


def _known_settings() -> set[str]:
    return {field.name for field in dataclasses.fields(SFTConfig)}


def _loss_settings() -> dict[str, Any]:
    """Return the settings that switch off every loss but ours, and everything that replaces or extends the model."""
    return {
        # "chunked_nll", the default of TRL 1.10 to 1.14, replaces model.forward and divides the loss by its tokens twice.
        "loss_type": "nll",
        "label_smoothing_factor": 0.0,
        "router_aux_loss_coef": 0.0,  # of mixtures of experts: 0.001 in TRL 1.13, the model's own since 1.14
        "average_tokens_across_devices": True,
        "use_liger_kernel": False,
        "liger_kernel_config": None,
        "neftune_noise_alpha": None,
        "use_cache": False,
        "torch_compile": False,
        "torch_compile_backend": None,
        "torch_compile_mode": None,
        "activation_offloading": False,
        # The model and the tokenizer come loaded; an end-of-text token or a template would change them.
        "model_init_kwargs": None,
        "eos_token": None,
        "chat_template_path": None,
        "parallelism_config": None,
        "fsdp": None,
        "deepspeed": None,
    }


def _data_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of rows that come tokenised, and of their order."""
    train, cuda = recipe.train, torch.cuda.is_available()
    workers = train.dataloader_num_workers if train.dataloader_num_workers is not None else 2 * cuda
    return {
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "max_length": recipe.data.max_length,
        "truncation_mode": "keep_start",
        "packing": False,
        "packing_strategy": "bfd",
        "eval_packing": False,
        "padding_free": False,
        "pad_to_multiple_of": None,
        "assistant_only_loss": False,
        "completion_only_loss": False,
        "shuffle_dataset": False,
        "train_sampling_strategy": "random",
        "ignore_data_skip": False,
        "seed": train.seed,
        "data_seed": train.seed,
        "dataloader_drop_last": False,
        "dataloader_in_order": True,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "dataloader_pin_memory": cuda,
        "accelerator_config": {
            "split_batches": False,
            "dispatch_batches": None,
            "even_batches": True,
            "use_seedable_sampler": True,
            "gradient_accumulation_kwargs": None,
            # Otherwise a copy of pinned rows waits until the device has finished all its work.
            "non_blocking": cuda,
        },
    }


def _step_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of batches and number formats."""
    train = recipe.train
    return {
        "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "per_device_eval_batch_size": train.per_device_eval_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "auto_find_batch_size": False,
        "fp16": train.precision == "fp16",
        "bf16": train.precision == "bf16",
        "tf32": None,
        "fp16_full_eval": False,
        "bf16_full_eval": False,
        "full_determinism": False,
    }


def _checkpointing_settings(*, enabled: bool) -> dict[str, Any]:
    """Return the settings of activation checkpointing, which transformers renames in 5.23 and TRL switches on by default."""
    kwargs = {"use_reentrant": False} if enabled else None
    settings: dict[str, Any] = {"gradient_checkpointing": enabled, "gradient_checkpointing_kwargs": kwargs}
    if "activation_checkpointing" in _known_settings():
        settings |= {"activation_checkpointing": enabled, "activation_checkpointing_kwargs": kwargs}
    return settings


def _optimizer_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of the optimizer, its learning rate and the length of the run."""
    train, optimizer = recipe.train, recipe.optimizer
    return {
        "optim": OPTIMIZERS[optimizer.name].optim,
        "optim_args": f"momentum={optimizer.momentum}" if optimizer.name == "sgd" else None,
        "optim_target_modules": None,
        "learning_rate": train.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": optimizer.eps,
        "max_grad_norm": train.max_grad_norm,
        "lr_scheduler_type": train.lr_scheduler_type,
        "lr_scheduler_kwargs": None,
        "warmup_steps": train.warmup_ratio,  # below 1: a share of the steps
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps if train.max_steps is not None else -1,
    }


def _output_settings(recipe: Recipe, run: RunDir, *, evaluate: bool) -> dict[str, Any]:
    """Return the settings of logging, evaluation and checkpoints."""
    train = recipe.train
    return {
        "output_dir": str(run.checkpoints),
        "logging_strategy": "steps",
        "logging_steps": train.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would synchronise with the device at every micro-batch
        "eval_strategy": "steps" if evaluate and train.eval_steps else "no",
        "eval_steps": train.eval_steps,
        "eval_delay": 0,
        "eval_on_start": False,
        "prediction_loss_only": True,
        "save_strategy": "steps" if train.save_steps else "no",
        "save_steps": train.save_steps or 500,
        "save_total_limit": train.save_total_limit,
        "save_only_model": False,
        "load_best_model_at_end": False,
        "restore_callback_states_from_checkpoint": False,
        "report_to": list(recipe.output.report_to) or "none",
        "disable_tqdm": True,
        "push_to_hub": False,
    }
