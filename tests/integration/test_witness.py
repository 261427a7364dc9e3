"""An independent check of the trace: by the CPU's rules, its peak is within 1 % of a real step's peak on the CPU.

PyTorch's profiler counts the memory of the real step. The same loop runs on real and on fake tensors; the last test checks
that it is the Trainer's loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (registers its operations)
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from benchmarks.validation.witness import profiled_peak_bytes, traced_peak_bytes
from lowvram_chat.model.adapters import ChatModel
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.tracing import model as recipe_model
from lowvram_chat.tracing import optimizer as recipe_optimizer
from lowvram_chat.tracing.dispatch import Operator
from lowvram_chat.tracing.rules import DeviceRules
from lowvram_chat.tracing.run import trace_run
from lowvram_chat.tracing.training_loop import MicroBatchShape, TracedRun
from lowvram_chat.training import model_setup, run_dir
from lowvram_chat.training.callbacks import TokenCounts
from lowvram_chat.training.model_setup import build_model
from lowvram_chat.training.session import Session
from tests.runs import Bench
from tests.samples import save_tiny_gpt2, write_jsonl

bnb = torch.ops.bitsandbytes

pytestmark = pytest.mark.filterwarnings("ignore")


class CpuRules(DeviceRules):
    """The CPU, with two kinds of temporary buffers that a trace cannot see.

    - bitsandbytes' CPU kernels are written in Python and hold buffers while they run.
    - An exp with a bf16 result has an fp32 result first; CUDA casts while it writes.

    Source: bitsandbytes/backends/cpu/ops.py, `_optimizer_update_8bit_blockwise_cpu`, `_optimizer_update_32bit_cpu`;
    backends/default/ops.py, `_gemm_4bit_default_impl`; aten/src/ATen/TensorIterator.cpp, `cast_common_dtype_to_outputs`.
    """

    def temporaries(self, func: Operator, args: tuple[Any, ...], result: Any) -> Iterable[int]:
        if func is bnb.optimizer_update_8bit_blockwise.default:
            return [4 * args[1].numel()] * 5
        if func is bnb.optimizer_update_32bit.default:
            return [4 * args[1].numel()] * 3
        if func is bnb.gemm_4bit.default:
            rows, columns = args[2]
            return [rows * columns * args[0].element_size()]
        if func is torch.ops.aten.exp.out and result.dtype != args[0].dtype:
            return [args[0].nbytes]
        return ()


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"r": 8}},
    "rslora": {"adapter": {"kind": "rslora", "r": 8}},
    "dora": {"adapter": {"kind": "dora", "r": 8}},
    "pissa": {"adapter": {"kind": "pissa", "r": 8}},
    "lora with dropout": {"adapter": {"r": 8, "dropout": 0.1}},
    "qlora": {"adapter": {"r": 8}, "model": {"load_in": "4bit"}},
    "qlora, dora": {"adapter": {"kind": "dora", "r": 8}, "model": {"load_in": "4bit"}},
    "adamw unfused": {"optimizer": {"name": "adamw_unfused"}},
    "adamw 8-bit": {"optimizer": {"name": "adamw_8bit"}},
    "lora, adamw 8-bit": {"adapter": {"r": 8}, "optimizer": {"name": "adamw_8bit"}},
    "sgd": {"optimizer": {"name": "sgd"}},
    "adafactor": {"optimizer": {"name": "adafactor"}},
    "checkpointed": {"train": {"gradient_checkpointing": True}},
    "lora, checkpointed": {"adapter": {"r": 8}, "train": {"gradient_checkpointing": True}},
    "accumulated": {"train": {"gradient_accumulation_steps": 3}},
    "bf16": {"train": {"precision": "bf16"}},
    "eager": {"model": {"attention": "eager"}},
    "gelu_new": {"model": {"fused_gelu": False}},
}


def _recipe(folder: Path | str, **sections: dict[str, Any]) -> Recipe:
    model = {"name": str(folder), "dropout": 0.0, **sections.get("model", {})}
    train = {"precision": "fp32", "per_device_train_batch_size": 4, **sections.get("train", {})}
    return Recipe.model_validate(
        {
            "model": model,
            "train": train,
            "optimizer": sections.get("optimizer", {"name": "adamw"}),
            "adapter": sections.get("adapter"),
            "data": {"max_length": 96},
        }
    )


@pytest.fixture(scope="module")
def small_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small-gpt2")
    config = GPT2Config(
        vocab_size=3001, n_positions=128, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def _model_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model: parameters, buffers, and the scales of 4-bit weights."""
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    scales = [state.absmax for state in states if state is not None]
    return sum(tensor.nbytes for tensor in [*{*model.parameters(), *model.buffers()}, *scales])


def _real_peak(recipe: Recipe, model: ChatModel, steps: list[list[MicroBatchShape]]) -> int:
    """Return the peak of a real run, in bytes."""
    run = TracedRun(recipe, model, recipe_optimizer.prepare_optimizer(recipe, model)({}))
    return _model_bytes(model) + profiled_peak_bytes(lambda: run.train(steps))


def _traced_peak(recipe: Recipe, steps: list[list[MicroBatchShape]]) -> int:
    """Return the peak of a traced run, in bytes."""
    plain_rows = not any(shape.packed for step in steps for shape in step)
    return traced_peak_bytes(trace_run(recipe, CpuRules(plain_rows=plain_rows), steps).events)


def _steps(recipe: Recipe, *, packed: bool = False) -> list[list[MicroBatchShape]]:
    """Return two optimizer steps, the second one with a shorter micro-batch if gradients are accumulated."""
    length, count = recipe.data.max_length, recipe.train.gradient_accumulation_steps
    return [
        [MicroBatchShape(length, packed=packed)] * count,
        [MicroBatchShape(length // 2, packed=packed), MicroBatchShape(length, packed=packed)][-count:],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_s_trace_has_the_peak_of_a_real_cpu_step(kind: str, small_gpt2: Path) -> None:
    recipe = _recipe(small_gpt2, **KINDS[kind])
    model = recipe_model.prepare_for_training(build_model(recipe, torch.device("cpu")).model, recipe)
    steps = _steps(recipe)
    assert _traced_peak(recipe, steps) == pytest.approx(_real_peak(recipe, model, steps), rel=0.01)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_peak_of_a_real_cpu_step(attention: str, small_gpt2: Path) -> None:
    recipe = _recipe(small_gpt2, model={"attention": attention})
    model = recipe_model.prepare_for_training(build_model(recipe, torch.device("cpu")).model, recipe)
    steps = _steps(recipe, packed=True)
    assert _traced_peak(recipe, steps) == pytest.approx(_real_peak(recipe, model, steps), rel=0.01)


@pytest.fixture(scope="module")
def gpt2_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 small with random weights."""
    folder = tmp_path_factory.mktemp("gpt2-small")
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    return folder


SMALL_KINDS = ["full", "lora", "dora", "qlora", "adamw unfused", "adamw 8-bit", "checkpointed", "accumulated", "packed"]


@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_the_trace_of_gpt2_small_has_the_peak_of_a_real_cpu_step(kind: str, gpt2_small: Path) -> None:
    settings = KINDS.get(kind, {})
    train = {"per_device_train_batch_size": 1, **settings.get("train", {})}
    recipe = _recipe(gpt2_small, **{**settings, "train": train})
    model = recipe_model.prepare_for_training(build_model(recipe, torch.device("cpu")).model, recipe)
    steps = _steps(recipe, packed=kind == "packed")[:1]
    assert _traced_peak(recipe, steps) == pytest.approx(_real_peak(recipe, model, steps), rel=0.01)


TRAINER_KINDS = {
    "full, accumulated": {"train__gradient_accumulation_steps": 2},
    "checkpointed": {"train__gradient_checkpointing": True},
    "adamw 8-bit": {"optimizer__name": "adamw_8bit"},
    "lora": {"adapter__r": 8},
    "lora, checkpointed": {"adapter__r": 8, "train__gradient_checkpointing": True},
    "qlora": {"adapter__r": 8, "model__load_in": "4bit"},
}


@pytest.mark.parametrize("kind", TRAINER_KINDS)
def test_the_traced_loop_has_the_peak_of_the_trainer_s_own(
    kind: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The settings that are fastest on a CPU take memory that no plan describes.
    monkeypatch.setattr(model_setup, "build_model", lambda recipe, device, **_: build_model(recipe, device))
    length, rows = 96, 8
    recipe = bench.recipe(
        "run",
        model__name=str(save_tiny_gpt2(tmp_path / "wide", width=128, layers=4)),
        data={"source": str(_long_texts(tmp_path / "long.jsonl")), "loss_on": "all", "max_length": length},
        train__per_device_train_batch_size=rows,
        train__max_steps=2,
        **TRAINER_KINDS[kind],  # type: ignore[arg-type]
    )
    prepared = Session.prepare(recipe, device=torch.device("cpu"))
    trainer = prepared._trainer(run_dir.RunDir.of(recipe), TokenCounts(), TrainerCallback())
    real = _model_bytes(prepared.model) + profiled_peak_bytes(trainer.train)
    steps = [[MicroBatchShape(length)] * recipe.train.gradient_accumulation_steps] * 2
    assert _traced_peak(recipe, steps) == pytest.approx(real, rel=0.01)


def _long_texts(path: Path) -> Path:
    """Write rows that all have the maximum length, so that the Trainer's batches are the traced ones. Return the path."""
    return write_jsonl(path, [{"text": f"{number} is a number and there are more. " * 40} for number in range(64)])
