"""The configuration of a model by its name; the best-known ones stand here, so that planning needs neither network nor cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from lowvram_chat.hub import work_offline_if_unreachable
from lowvram_chat.model.pretrained import load_config
from lowvram_chat.recipe.schema import Model

GPT2: Mapping[str, Any] = {"model_type": "gpt2", "bos_token_id": 50256, "eos_token_id": 50256}
"""GPT-2 small is what `GPT2Config` defaults to: 12 layers of width 768, 12 heads, 50,257 tokens, 1,024 positions."""
SMOLLM2: Mapping[str, Any] = {
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

KNOWN_CONFIGS: Mapping[str, Mapping[str, Any]] = {
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
"""Name -> what its config.json says of its shape. Source: the models' config.json on the Hugging Face hub."""


def config_for(model: Model) -> Any:
    """Returns the configuration of a recipe's model, new, so that it can be changed.

    Raises:
        NotFoundError, ModelError: as `model.load.load_config`, for a model that is not in the table.
    """
    if model.name in KNOWN_CONFIGS and model.revision is None:
        settings = dict(KNOWN_CONFIGS[model.name])
        return CONFIG_MAPPING[settings.pop("model_type")](**settings)
    if not model.name.startswith("builtin:"):
        work_offline_if_unreachable()
    return load_config(model.name, model.revision)
