"""Training runs that other people measured, traced: stock transformers models, torch optimizers, full logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from lowvram_chat.errors import UsageError, did_you_mean
from lowvram_chat.tracing.materialise import materialise
from lowvram_chat.tracing.recorder import Event, TraceRecorder
from lowvram_chat.tracing.rules import DeviceRules

PLACES_OF_ZERO_GRAD = ("loop_top", "after_forward", "after_step")
"""Where in the loop the gradients are freed; with `after_forward`, the last step's gradients live through the forward pass."""
PUBLISHED_SETTINGS = frozenset(
    {"n_ctx", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct", "task_specific_params", "torch_dtype"}
)
"""Settings in published config.json files that transformers 5 still reads or may ignore, but does not declare."""
MAX_SETTING = 10_000_000
"""The largest number in a configuration: more than the largest vocabulary, so it is a mistake."""
MAX_LAYERS = 1_000
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Settings that are at least 1 in every model that has them."""


@dataclass(frozen=True, kw_only=True)
class StockRun:
    """One run, as a row of `vram_measured.csv` states it."""

    model_type: str
    """transformers' name of the model class: gpt2, gpt_neo, opt, ..."""
    config: Mapping[str, object]
    """The model's configuration."""
    batch: int
    """Rows per step."""
    seq_len: int
    """Tokens per row."""
    optimizer: str
    """A class of `torch.optim`; its arguments are the defaults, except for the learning rate."""
    attention: str = "sdpa"
    mask: bool = True
    """Whether the batch has an attention mask."""
    zero_grad: str = "after_step"
    """One of `PLACES_OF_ZERO_GRAD`."""
    steps: int = 2
    learning_rate: float = 1e-3


def model_config(model_type: str, settings: Mapping[str, object]) -> PretrainedConfig:
    """Return a model's configuration.

    Raises:
        UsageError: a setting is unknown, out of range, or refused by transformers.
    """
    config_class = transformers.CONFIG_MAPPING[model_type]
    make_config: Callable[..., PretrainedConfig] = config_class
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map, *PUBLISHED_SETTINGS}
    try:
        known |= config_class().to_dict().keys()
    except Exception as error:  # whatever transformers raises
        raise UsageError(
            f"{model_type} has no default configuration ({_one_line(error)}). Use another model."
        ) from error
    for name, value in settings.items():
        if name not in known:
            raise UsageError(
                f"'{name}' is not a setting of {model_type}.{did_you_mean(name, known)} Remove or rename it."
            )
        if not all(-MAX_SETTING <= number <= MAX_SETTING for number in _numbers(value)):
            raise UsageError(f"'{name}' is out of range. Use a number of at most {MAX_SETTING:,}.")
    try:
        config = make_config(**settings)
        sizes = {name: getattr(config, name, 1) for name in SIZES}
    except Exception as error:  # whatever transformers raises for a wrong setting
        raise UsageError(f"transformers refuses it ({_one_line(error)}). Correct it.") from error
    for name, size in sizes.items():
        most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SETTING
        if not (isinstance(size, int) and 1 <= size <= most):
            raise UsageError(
                f"'{config_class.attribute_map.get(name, name)}' is not a whole number from 1 to {most:,}. Correct it."
            )
    return config


def build_stock_model(model_type: str, settings: Mapping[str, object], attention: str) -> PreTrainedModel:
    """Return a model with a language-modelling head on the meta device: it has shapes but no memory.

    Raises:
        UsageError: transformers cannot build the model.
    """
    config = model_config(model_type, settings)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except Exception as error:  # whatever transformers raises for settings that contradict each other
        raise UsageError(f"transformers cannot build this {model_type} ({_one_line(error)}). Correct it.") from error
    assert isinstance(model, PreTrainedModel)
    return model


def trace_stock_run(run: StockRun, rules: DeviceRules) -> list[Event]:
    """Return every allocation and free of a storage in the whole run, starting with the loading of the model."""
    model = build_stock_model(run.model_type, run.config, run.attention)
    model.train()
    with TraceRecorder(rules) as recorder:
        materialise(model, recorder)
        run_stock_training(run, model, recorder)
    return recorder.events


def run_stock_training(run: StockRun, model: torch.nn.Module, recorder: TraceRecorder) -> None:
    """Run the training loop. Its variables live exactly as long as in the scripts that were measured.

    `outputs` (logits, cached keys and values) is freed only after the next forward pass has returned.
    """
    optimizer = getattr(torch.optim, run.optimizer)(model.parameters(), lr=run.learning_rate)
    for _ in range(run.steps):
        batch = _batch(run)
        recorder.label(batch.values(), "batch")
        _zero_grad_at("loop_top", run, optimizer)
        with recorder.phase("forward"):
            outputs = model(**batch)
        _zero_grad_at("after_forward", run, optimizer)
        with recorder.phase("backward"):
            outputs.loss.backward()
            recorder.label((parameter.grad for parameter in model.parameters()), "gradients")
        with recorder.phase("optimizer"):
            optimizer.step()
            recorder.label((value for state in optimizer.state.values() for value in state.values()), "optimizer state")
        _zero_grad_at("after_step", run, optimizer)


def _zero_grad_at(place: str, run: StockRun, optimizer: torch.optim.Optimizer) -> None:
    if run.zero_grad == place:
        optimizer.zero_grad(set_to_none=True)


def _batch(run: StockRun) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask", "labels") if run.mask else ("input_ids", "labels")
    return {name: torch.empty(run.batch, run.seq_len, dtype=torch.int64) for name in names}


def _numbers(value: object) -> Iterator[float]:
    """Yield the numbers in a JSON value."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _one_line(error: Exception) -> str:
    """Return the kind and the message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
