"""The trainer's loss is compared with the model's logits before training, and no setting that moves it is left to a default."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.validation.witness import profiled_peak_bytes
from lowvram_chat.errors import DeviceError
from lowvram_chat.model.compilation import missing_compiler
from lowvram_chat.training import loss_check, sft_settings
from lowvram_chat.training.callbacks import TokenCounts
from lowvram_chat.training.loss_check import check_trainer_loss
from lowvram_chat.training.run_dir import RunDir
from lowvram_chat.training.session import Session
from lowvram_chat.training.sft_settings import sft_config
from lowvram_chat.training.trainer import ChatTrainer
from tests.runs import Bench

UNNAMED = {
    "logging, trackers and the hub": (
        "log_level log_level_replica log_on_each_node run_name project trackio_space_id trackio_bucket_id "
        "trackio_static_space_id hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision debug "
        "skip_memory_metrics include_num_input_tokens_seen"
    ),
    "evaluation, which is ours": (
        "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
        "label_names metric_for_best_model greater_is_better"
    ),
    "saving": "save_on_each_node enable_jit_checkpoint",
    "actions of the example scripts": "do_train do_eval do_predict resume_from_checkpoint",
    "how processes and data loaders work, not what they compute": (
        "local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
        "dataloader_prefetch_factor dataloader_multiprocessing_context torch_empty_cache_steps fsdp_config"
    ),
    "data preparation, which is ours": "dataset_text_field dataset_num_proc length_column_name trust_remote_code pad_token",
}
"""Settings of TRL and transformers that cannot move the loss, by the reason."""

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"adapter": {"kind": "lora", "r": 8}},
    "LoRA with dropout": {"adapter": {"kind": "lora", "r": 8, "dropout": 0.5}},
    "4-bit base": {"adapter": {"kind": "dora", "r": 8}, "model__load_in": "4bit"},
    "bfloat16 base": {"adapter": {"kind": "lora"}, "model__dtype": "bfloat16", "train__precision": "bf16"},
    "packed": {"data__rows": "packed"},
    "packed, eager attention": {"data__rows": "packed", "model__attention": "eager"},
    "grouped": {"data__rows": "grouped"},
    "rows of 8 tokens": {"data__max_length": 8, "data__overflow": "split", "data__rows": "packed"},
    "one row": {"train__per_device_train_batch_size": 1},
    "attention mask": {"data__attention_mask": True},
    "stock loss": {"model__fused_loss": False},
    "bf16": {"train__precision": "bf16"},
}


def session(bench: Bench, **settings: Any) -> Session:
    model = {"name": str(bench.model)} | {
        key.partition("__")[2]: settings.pop(key) for key in list(settings) if key.startswith("model__")
    }
    return Session.prepare(bench.recipe("r", model=model, **settings), device=torch.device("cpu"))


def build(prepared: Session) -> ChatTrainer:
    return prepared._trainer(RunDir(Path(prepared.recipe.output.dir)), TokenCounts(), TrainerCallback())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_trainer_is_that_of_the_logits(kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_check, "FP32_TOLERANCE", 2e-6)  # ten times the measured noise
    monkeypatch.setattr(loss_check, "HALF_TOLERANCE", 1.2e-4)
    build(session(bench, **KINDS[kind]))


@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler and Python.h")
def test_a_compiled_model_is_compared_as_it_is_written(bench: Bench) -> None:
    build(session(bench, train__compile=True))


def mean_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """What TRL 1.10 to 1.14 do by default: their forward returns the mean of the micro-batch."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if "loss_positions" in kwargs:
            output["loss"] = output["loss"] / kwargs["loss_positions"].numel()
        return output

    return forward


@pytest.mark.parametrize("kind", ["full", "LoRA", "packed", "bf16"])
def test_a_forward_that_was_replaced_is_refused(kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original_init = SFTTrainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        base.forward = types.MethodType(mean_forward(base.forward), base)

    monkeypatch.setattr(SFTTrainer, "__init__", init)
    prepared = session(bench, **KINDS[kind])
    with pytest.raises(DeviceError) as refusal:
        build(prepared)
    message = str(refusal.value)
    assert f"trl {metadata.version('trl')}" in message
    numbers = [float(word) for word in message.replace(",", " ").split() if word.count(".") == 1 and word[0].isdigit()]
    actual, expected = (number for number in numbers if number < 20)
    assert expected == pytest.approx(9.0, abs=0.3)  # a random model: ln 8192
    assert actual < 1.0
    assert "constraints.txt" in message


def one_token_too_many(self: Any, *args: Any, **kwargs: Any) -> Any:
    batches, tokens = SFTTrainer.get_batch_samples(self, *args, **kwargs)
    assert tokens is not None
    return batches, tokens + 1


def loss_that_is_nan(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.tensor(float("nan"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "method, broken", [("get_batch_samples", one_token_too_many), ("compute_loss", loss_that_is_nan)]
)
def test_a_wrong_divisor_and_a_loss_that_is_nan_are_refused(
    method: str, broken: Callable[..., Any], precision: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = session(bench, train__precision=precision)
    monkeypatch.setattr(ChatTrainer, method, broken)
    with pytest.raises(DeviceError, match="train on a wrong loss"):
        build(prepared)


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 1.0002), ("bf16", 1.006)])
def test_a_loss_that_differs_by_little_more_than_the_tolerance_is_refused(
    precision: str, factor: float, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ChatTrainer.compute_loss
    monkeypatch.setattr(ChatTrainer, "compute_loss", lambda *args, **kwargs: factor * original(*args, **kwargs))
    with pytest.raises(DeviceError, match="train on a wrong loss"):
        build(session(bench, train__precision=precision))


def test_nothing_is_changed_by_the_comparison(bench: Bench) -> None:
    built = build(session(bench, adapter={"kind": "lora", "r": 8, "dropout": 0.5}))
    model = built.trained_model
    model.train()
    next(model.modules()).training = False  # a mixture of modes
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained[0].grad = torch.ones_like(trained[0])
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    built.counts.add(3, 5)
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    check_trainer_loss(built)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert (built.counts.real_tokens, built.counts.padded_tokens) == (3, 5)
    assert trained[0].grad.eq(1).all()
    assert all(parameter.grad is None for parameter in trained[1:])
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_the_comparison_takes_less_memory_than_a_training_step(kind: str, bench: Bench) -> None:
    built = build(session(bench, **KINDS[kind]))
    batch = built.data_collator([built.train_dataset[row] for row in range(4)])

    def step() -> None:
        built.compute_loss(built.trained_model, dict(batch)).backward()

    of_the_check = profiled_peak_bytes(lambda: check_trainer_loss(built))
    assert of_the_check < profiled_peak_bytes(step)


def test_every_setting_that_can_move_the_loss_is_named(bench: Bench) -> None:
    """A setting that a new version of TRL or transformers adds is named in `sft_config`, or listed above with a reason."""
    fields = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    recipe = bench.recipe("r")
    named: set[str] = set()

    def config(**settings: Any) -> None:
        named.update(settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_settings, "_known_settings", lambda: fields)
        patch.setattr(sft_settings, "SFTConfig", config)
        sft_config(recipe, RunDir(Path(recipe.output.dir)), evaluate=True)
    unnamed = {name for names in UNNAMED.values() for name in names.split()}
    assert fields - named - unnamed == set()
    assert named & unnamed == set()


def test_a_setting_that_a_version_lacks_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    known = sft_settings._known_settings()
    monkeypatch.setattr(sft_settings, "_known_settings", lambda: known - {"loss_type", "neftune_noise_alpha"})
    recipe = bench.recipe("r")
    with pytest.raises(DeviceError, match=r"trl .*no setting named loss_type, neftune_noise_alpha\. Install"):
        sft_config(recipe, RunDir(Path(recipe.output.dir)), evaluate=True)


def test_a_precision_from_accelerate_s_environment_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = session(bench)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(DeviceError, match=r"train.precision: fp32, but accelerate is set to bf16\. Unset"):
        build(prepared)
