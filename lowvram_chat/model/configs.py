"""Model configurations by name. Well-known ones are listed here, so that planning them needs no network and no cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig

from lowvram_chat.hub import work_offline_if_unreachable
from lowvram_chat.model.pretrained import load_config
from lowvram_chat.recipe.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ConfigFields = Mapping[str, str | int | float | None]
"""Fields of a config.json; those that are left out take the defaults of the config class."""

GPT2: ConfigFields = {"model_type": "gpt2", "bos_token_id": 50256, "eos_token_id": 50256}
"""GPT-2 small. `GPT2Config` defaults to its shape: 12 layers of width 768, 12 heads, 50,257 tokens, 1,024 positions."""
SMOLLM2: ConfigFields = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

KNOWN_CONFIGS: Mapping[str, ConfigFields] = {
    "openai-community/gpt2": GPT2,
    "gpt2": GPT2,
    "openai-community/gpt2-medium": {**GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-medium": {**GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "openai-community/gpt2-large": {**GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-large": {**GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "openai-community/gpt2-xl": {**GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "gpt2-xl": {**GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "distilbert/distilgpt2": {**GPT2, "n_layer": 6},
    "distilgpt2": {**GPT2, "n_layer": 6},
    "HuggingFaceTB/SmolLM2-135M": {**SMOLLM2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None},
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
    "models/smollm2-135m-instruct": SMOLLM2,
}
"""Model name -> the fields of its config.json that define its shape. Source: config.json on the Hugging Face hub."""


def config_for(model: Model) -> PreTrainedConfig:
    """Return a new configuration of a recipe's model, which the caller may change.

    A local folder is read first, since training loads it too; then `KNOWN_CONFIGS`, then the cache or the hub.

    Raises:
        NotFoundError, ModelError: as `model.pretrained.load_config`, if the model is not in the table.
    """
    if model.name.startswith("builtin:") or Path(model.name).is_dir():
        return load_config(model.name, model.revision)
    if model.name in KNOWN_CONFIGS and model.revision is None:
        fields = dict(KNOWN_CONFIGS[model.name])
        config: PreTrainedConfig = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
        return config
    work_offline_if_unreachable()
    return load_config(model.name, model.revision)
