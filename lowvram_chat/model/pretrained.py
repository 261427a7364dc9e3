"""Models and tokenizers by name: the built-in one, a folder or a hub id. Only safetensors are loaded, and never remote code."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lowvram_chat.errors import LowVramError, ModelError, NotFoundError, did_you_mean
from lowvram_chat.hub import explain
from lowvram_chat.model.substitutions import dropout_settings, fuse_gelu
from lowvram_chat.recipe.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

LOADING = threading.RLock()
"""Held while a model loads: transformers patches torch meanwhile, and two threads that load at once break each other."""

BUILTIN_MODELS = {"builtin:tiny-gpt2": Path(__file__).parent.parent / "assets" / "tiny-gpt2"}
"""Name -> folder of the models that come with the package."""


def resolve(name: str, marker: str = "config.json") -> str:
    """Return the folder or hub id of a model name; a folder must contain the file `marker`.

    Raises:
        NotFoundError: the name is an unknown built-in model, or a path that does not exist.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN_MODELS:
            raise NotFoundError(
                f"{name}: there is no such built-in model.{did_you_mean(name, BUILTIN_MODELS)} "
                f"Known: {', '.join(BUILTIN_MODELS)}."
            )
        return str(BUILTIN_MODELS[name])
    path = Path(name)
    if path.is_dir():
        if not (path / marker).is_file():
            raise NotFoundError(
                f"{name}: this folder has no {marker}, so it is not a model folder. Give a model folder or a run folder."
            )
        return name
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise NotFoundError(f"{name}: there is no such folder. Give a model folder, a hub id, or builtin:tiny-gpt2.")
    return name


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Return a model's configuration, without its weights.

    Raises:
        NotFoundError: no local folder, cached model or hub model has this name.
        ModelError: transformers does not know this kind of model.
    """
    path = resolve(name)
    with _errors_explained(name, path, "AutoConfig"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
        return config


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer.

    Raises:
        NotFoundError: as `load_config`.
        ModelError: the tokenizer cannot be loaded, or it is not a fast one.
    """
    path = resolve(name, "tokenizer_config.json")
    with _errors_explained(name, path, "AutoTokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name}: this model has no fast tokenizer (tokenizer.json), which is needed to mark assistant tokens. "
            "Use another model."
        )
    return tokenizer


def load_model(settings: Model, *, device: torch.device | None = None) -> PreTrainedModel:
    """Return a recipe's base model, with its substitutions made, on the CPU (4-bit weights: on `device`).

    Raises:
        NotFoundError: as `load_config`.
        ModelError: the weights are damaged, do not match the configuration or are not safetensors; or as `load_config`.
    """
    config = load_config(settings.name, settings.revision)
    if settings.dropout is not None:
        for name, value in dropout_settings(config, settings.dropout).items():
            setattr(config, name, value)
    four_bit = _four_bit_settings(settings, device) if settings.load_in == "4bit" else {}
    path = resolve(settings.name)
    with _errors_explained(settings.name, path, "AutoModelForCausalLM", attention=settings.attention):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            revision=settings.revision or "main",
            trust_remote_code=False,
            config=config,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=settings.attention,
            use_safetensors=True,
            **four_bit,
        )
    if four_bit:
        _keep_trainable_layout(model)
    if settings.fused_gelu:
        fuse_gelu(model)
    return model


def _four_bit_settings(settings: Model, device: torch.device | None) -> dict[str, object]:
    """Return the further arguments of `from_pretrained` that quantise the weights to NF4 on the device."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
    )
    return {"quantization_config": quantisation, "device_map": {"": str(device or "cpu")}}


def _keep_trainable_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    Repacked weights only serve inference: the next training step would fail ("view of a leaf Variable").
    """
    from bitsandbytes.nn.modules import Linear4bit

    for layer in model.modules():
        if not isinstance(layer, Linear4bit):
            continue
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            log.warning(
                "bitsandbytes %s: Linear4bit.support_avx512bf16_for_cpu is gone, so training on a CPU with AVX512-BF16 may fail "
                "after an evaluation. Install the version of bitsandbytes in constraints.txt.",
                metadata.version("bitsandbytes"),
            )
            return
        layer.support_avx512bf16_for_cpu = False


def positions_of(config: PreTrainedConfig) -> int | None:
    """Return the number of positions of a model, or None if it has no limit."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def check_positions(config: PreTrainedConfig, max_length: int, name: str) -> None:
    """Refuse rows longer than the model's positions. GPT-2 would fail inside a kernel, on CUDA with an unreadable message.

    Raises:
        ModelError: `max_length` is too large; with the override to use.
    """
    positions = positions_of(config)
    if positions is not None and max_length > positions:
        raise ModelError(
            f"data.max_length: {max_length}, but {name} has {positions} positions. Set data.max_length={positions}."
        )


@contextlib.contextmanager
def _errors_explained(name: str, path: str, loader: str, *, attention: str = "") -> Iterator[None]:
    """Turn errors of transformers' `loader`.from_pretrained(`path`) into errors with one readable sentence.

    Raises:
        NotFoundError, ModelError: as `load_model`.
    """
    try:
        with LOADING:
            yield
    except torch.OutOfMemoryError:
        raise
    except OSError as error:
        raise _file_error(error, name, path) from None
    except (RuntimeError, SafetensorError, ValueError, KeyError, ImportError) as error:
        raise _load_error(error, name, loader, attention) from None


def _file_error(error: OSError, name: str, path: str) -> LowVramError:
    """Return our error for a missing or unreadable file."""
    if not Path(path).is_dir():
        return NotFoundError(explain("model", name, error))
    if "safetensors" in str(error):
        return ModelError(
            f"{name}: this folder has no model.safetensors. Pickled weights (.bin) can run code, so they are not loaded. "
            "Convert them to safetensors first."
        )
    return NotFoundError(f"{name}: a file is missing in this folder ({_first_line(error)}). Save the model again.")


def _load_error(error: Exception, name: str, loader: str, attention: str) -> ModelError:
    """Return our error for a model that is present but cannot be loaded."""
    if isinstance(error, RuntimeError):
        reason = "their shapes differ" if "mismatched" in str(error) else _first_line(error)
        return ModelError(
            f"{name}: the weights do not match config.json ({reason}). Download the model again, or save it again."
        )
    if isinstance(error, SafetensorError):
        return ModelError(f"{name}: the weights are damaged ({error}). Download the model again, or save it again.")
    if "does not support an attention implementation" in str(error):
        return ModelError(f"{name}: transformers has no {attention} attention for it. Set model.attention=eager.")
    return ModelError(f"{name}: transformers' {loader} cannot load it ({_first_line(error)}). Use another model.")


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
