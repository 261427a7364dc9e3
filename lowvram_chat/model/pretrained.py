"""Models and tokenizers by name: the built-in one, a folder, or a hub id; safetensors only, never remote code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lowvram_chat.errors import ModelError, NotFoundError, did_you_mean
from lowvram_chat.hub import explain
from lowvram_chat.model.substitutions import dropout_settings, fuse_gelu
from lowvram_chat.recipe.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUILTIN_MODELS = {"builtin:tiny-gpt2": Path(__file__).parent.parent / "assets" / "tiny-gpt2"}


def resolve(name: str, marker: str = "config.json") -> str:
    """Return what transformers is given for a model name; a folder must hold the `marker` file.

    Raises:
        NotFoundError: an unknown built-in, or what can only be a path is not there.
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
                f"{name}: this folder has no {marker}, so it holds no model. Give a model or run folder."
            )
        return name
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise NotFoundError(f"{name}: there is no such folder. Give a model folder, a hub id, or builtin:tiny-gpt2.")
    return name


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Return a model's configuration, without its weights.

    Raises:
        NotFoundError: nothing of that name is local, cached or on the hub.
        ModelError: it is no causal language model known to transformers.
    """
    return _from_pretrained(AutoConfig, name, revision)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer; raises as `load_config`."""
    tokenizer = _from_pretrained(AutoTokenizer, name, revision)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name}: has no fast tokenizer (tokenizer.json), so assistant tokens cannot be marked. Use another model."
        )
    return tokenizer  # type: ignore[no-any-return]


def load_model(settings: Model, *, device: torch.device | None = None) -> PreTrainedModel:
    """Return the base model of a recipe on the CPU (4-bit weights: on `device`), with its substitutions made.

    Raises:
        NotFoundError, ModelError: as `load_config`; also weights that are not safetensors.
    """
    config = load_config(settings.name, settings.revision)
    kwargs: dict[str, Any] = {}
    if settings.load_in == "4bit":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=False,
            bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        )
        kwargs["device_map"] = {"": str(device or "cpu")}
    if settings.dropout is not None:
        for name, value in dropout_settings(config, settings.dropout).items():
            setattr(config, name, value)
    model = _from_pretrained(
        AutoModelForCausalLM,
        settings.name,
        settings.revision,
        config=config,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=settings.attention,
        use_safetensors=True,
        **kwargs,
    )
    if settings.load_in == "4bit":
        _keep_trainable_layout(model)
    if settings.fused_gelu:
        fuse_gelu(model)
    return model  # type: ignore[no-any-return]


def _keep_trainable_layout(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    The repacked weights serve inference only: the next training step would fail ("view of a leaf Variable").
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def positions_of(config: PreTrainedConfig) -> int | None:
    """Return the tokens that a model can see at once; None where it sets no bound."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def check_positions(config: PreTrainedConfig, max_length: int, name: str) -> None:
    """Refuse rows longer than the model's positions: GPT-2 would fail deep inside, on CUDA without a readable word.

    Raises:
        ModelError: with the override to use.
    """
    positions = positions_of(config)
    if positions is not None and max_length > positions:
        raise ModelError(
            f"data.max_length: {max_length}, but {name} has {positions} positions. Set data.max_length={positions}."
        )


def _from_pretrained(kind: Any, name: str, revision: str | None, **kwargs: Any) -> Any:
    """Call `kind.from_pretrained` and put its failures into words.

    Raises:
        NotFoundError, ModelError: as `load_config`.
    """
    path = resolve(name, "tokenizer_config.json" if kind is AutoTokenizer else "config.json")
    try:
        return kind.from_pretrained(path, revision=revision or "main", trust_remote_code=False, **kwargs)
    except OSError as error:
        if "safetensors" in str(error) and Path(path).is_dir():
            raise ModelError(
                f"{name}: has no model.safetensors. Pickled weights (.bin) can run code and are not loaded; convert them first."
            ) from None
        if Path(path).is_dir():
            raise NotFoundError(
                f"{name}: this folder lacks a file ({str(error).splitlines()[0]}). Save the model anew."
            ) from None
        raise NotFoundError(explain("model", name, error)) from None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = "their shapes differ" if "mismatched" in str(error) else str(error).splitlines()[0]
        raise ModelError(f"{name}: its weights do not fit its config.json ({reason}). Fetch or save it anew.") from None
    except SafetensorError as error:
        raise ModelError(f"{name}: its weights are damaged ({error}). Fetch or save the model anew.") from None
    except (ValueError, KeyError, ImportError) as error:
        if "does not support an attention implementation" in str(error):
            raise ModelError(
                f"{name}: transformers has no {kwargs['attn_implementation']} attention for it. Set model.attention=eager."
            ) from None
        raise ModelError(
            f"{name}: cannot be loaded as {kind.__name__} ({str(error).splitlines()[0]}). Use another model."
        ) from None
