"""Models and tokenizers by name: the built-in one, a folder or a hub id. Only safetensors are loaded, and never remote code."""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lowvram_chat.errors import ModelError, NotFoundError, did_you_mean
from lowvram_chat.model.loading_errors import errors_explained, with_supported_attention
from lowvram_chat.model.loading_report import LoadingReport, check_finite, check_loading_report, check_tied_head
from lowvram_chat.model.saved_form import with_marks
from lowvram_chat.model.substitutions import fuse_gelu, set_dropout
from lowvram_chat.model.weight_files import check_index, check_layers, check_size
from lowvram_chat.recipe.schema import Model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BUILTIN_MODELS = {"builtin:tiny-gpt2": Path(__file__).parent.parent / "assets" / "tiny-gpt2"}
"""Name -> folder of the models that come with the package."""


VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Files of which a tokenizer's folder has at least one."""


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


def absolute_name(name: str) -> str:
    """Return a hub id, or the absolute path of a folder or a built-in model.

    Raises:
        NotFoundError: as `resolve`.
    """
    path = Path(resolve(name))
    return str(path.absolute()) if path.is_dir() else name


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Return a model's configuration, without its weights.

    Raises:
        NotFoundError: no local folder, cached model or hub model has this name.
        ModelError: transformers does not know this kind of model.
    """
    path = resolve(name)
    if revision is not None and Path(path).is_dir():
        raise ModelError(f"model.revision: {revision}, but {name} is a folder, which has no revisions. Leave it out.")
    with errors_explained(name, path, "AutoConfig"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
        check_layers(config, name)
        return config


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer.

    Raises:
        NotFoundError: as `load_config`.
        ModelError: the tokenizer cannot be loaded, or it is not a fast one.
    """
    path = resolve(name, "tokenizer_config.json")
    if Path(path).is_dir() and not any((Path(path) / file).is_file() for file in VOCABULARY_FILES):
        raise ModelError(  # transformers would make a tokenizer without words
            f"{name}: this folder has no vocabulary ({', '.join(VOCABULARY_FILES)}). Copy the tokenizer's files again."
        )
    with errors_explained(name, path, "AutoTokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name}: this model has no fast tokenizer (tokenizer.json), which is needed to mark assistant tokens. "
            "Use another model."
        )
    tokenizer.backend_tokenizer.no_truncation()  # a tokenizer.json may say to cut every text
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.chat_template = with_marks(Path(path), tokenizer.chat_template)
    return tokenizer


def load_model(settings: Model, *, device: torch.device | None = None) -> PreTrainedModel:
    """Return a recipe's base model, with its substitutions made, on the CPU (4-bit weights: on `device`).

    A model without SDPA attention gets eager attention, and the log says so.

    Raises:
        NotFoundError: as `load_config`.
        ModelError: the weights are damaged, incomplete, not finite, do not match the configuration or are not safetensors; or
            as `load_config`.
    """
    config = load_config(settings.name, settings.revision)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{settings.name}: these weights are quantised already. Name the base in full precision, and set model.load_in=4bit "
            "for QLoRA."
        )
    if settings.dropout is not None:
        set_dropout(config, settings.dropout)
    four_bit = _four_bit_settings(settings, device) if settings.load_in == "4bit" else {}
    path = resolve(settings.name)
    check_index(Path(path), settings.name)
    if Path(path).is_dir() and not four_bit:
        with errors_explained(settings.name, path, "AutoModelForCausalLM"):
            check_size(config, Path(path), settings.name)

    def load(attention: str) -> PreTrainedModel:
        with errors_explained(settings.name, path, "AutoModelForCausalLM", attention=attention):
            loaded = AutoModelForCausalLM.from_pretrained(
                path,
                revision=settings.revision or "main",
                trust_remote_code=False,
                config=config,
                dtype=getattr(torch, settings.dtype),
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
                **four_bit,
            )
        model, report = cast("tuple[PreTrainedModel, LoadingReport]", loaded)
        check_loading_report(report, settings.name)
        return model

    model = with_supported_attention(load, settings.attention, settings.name)
    check_finite(model, settings.name)
    check_tied_head(model, settings.name)
    if four_bit:
        _keep_trainable_layout(model)
    if settings.fused_gelu:
        fuse_gelu(model)
    return model


def load_weights(model: nn.Module, folder: str) -> None:
    """Replace a model's weights by those of a saved model of the same class.

    Raises:
        ModelError: the file is damaged, or its weights are not exactly those of the model.
    """
    check_index(Path(folder), folder)
    with errors_explained(folder, folder, "from_pretrained"):
        loaded = type(model).from_pretrained(  # type: ignore[attr-defined]  # a PreTrainedModel
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    saved, report = cast("tuple[PreTrainedModel, LoadingReport]", loaded)
    check_loading_report(report, folder)
    check_finite(saved, folder)
    model.load_state_dict(saved.state_dict(), strict=True)


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
    text_config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return next((value for name in names if (value := getattr(text_config, name, None))), None)


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


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    """Refuse a tokenizer whose tokens the model has no embeddings for. The first such token would fail inside a kernel.

    Raises:
        ModelError: the tokenizer has more tokens than the model.
    """
    embeddings = config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values(), default=0)
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
    largest = max([largest, *(token for token in special if token is not None)])
    if largest >= embeddings:
        raise ModelError(
            f"{name}: the tokenizer makes tokens up to {largest}, but the model has embeddings for {embeddings} tokens. Use the "
            "model's own tokenizer, or resize the model's embeddings."
        )


def check_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Refuse gradient checkpointing for a model that does not have it.

    Raises:
        ModelError: with the setting to change.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"train.gradient_checkpointing: {model.config.model_type} does not support it. Set "
            "train.gradient_checkpointing=false."
        )
