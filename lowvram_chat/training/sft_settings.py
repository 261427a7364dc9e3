"""A recipe's settings as an SFTConfig of TRL."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from typing import Any

import torch
from trl import SFTConfig

from lowvram_chat.errors import DeviceError
from lowvram_chat.model.device import default_workers
from lowvram_chat.recipe.optimizers import OPTIMIZERS
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.training.run_dir import RunDir


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
    workers = default_workers(cuda=cuda) if train.dataloader_num_workers is None else train.dataloader_num_workers
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
        "save_total_limit": None,  # `training.checkpoints` deletes them
        "save_only_model": False,
        "load_best_model_at_end": False,
        "restore_callback_states_from_checkpoint": False,
        "report_to": list(recipe.output.report_to) or "none",
        "disable_tqdm": True,
        "push_to_hub": False,
    }
