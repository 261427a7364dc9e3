"""Tiny random models of many families, for checks that must hold for any causal language model.

`make(name, folder)` writes a model folder that `AutoModelForCausalLM` and `AutoTokenizer` load: 2 layers, width 32 to 64, the
tokenizer of the built-in model. Every setting that lies between a family's blocks and its logits has a value that matters
(multipliers, soft caps, grouped heads, ALiBi, sliding windows), and biases and norms are random, so that a forgotten one
changes the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowvram_chat.model.pretrained import BUILTIN_MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WIDTH = 32
POSITIONS = 128
NOISE = 0.1
"""Standard deviation of what is added to biases and norm weights, which start as zeros and ones."""

Settings = Mapping[str, Any]

LAYERS: Settings = {"num_hidden_layers": 2, "num_attention_heads": 4}
SIZES: Settings = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    **LAYERS,
}
"""The names that most families share."""
GROUPED: Settings = {**SIZES, "num_key_value_heads": 2}
"""The same with two query heads for each key."""
GPT2_SIZES: Settings = {
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "initializer_range": 0.2,
}
EXPERTS: Settings = {"num_experts_per_tok": 2, "num_experts": 4}
FALCON: Settings = {
    "hidden_size": WIDTH,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    **LAYERS,
}
GRANITE: Settings = {
    "logits_scaling": 4.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
}
"""The multipliers of Granite, none of them 1."""
OPT: Settings = {
    "hidden_size": WIDTH,
    "ffn_dim": 2 * WIDTH,
    "max_position_embeddings": POSITIONS,
    "init_std": 0.2,
    "dropout": 0.0,
    **LAYERS,
}

FAMILIES: Mapping[str, tuple[str, Settings]] = {
    # name -> (model type, fields of the configuration)
    "gpt2": ("gpt2", {**GPT2_SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.2,
        },
    ),
    "gpt_neox": ("gpt_neox", SIZES),
    "gptj": ("gptj", {**GPT2_SIZES, "rotary_dim": 4}),
    # CodeGen splits its projection for 4 TPU cores, so its heads come in multiples of 4.
    "codegen": ("codegen", {**GPT2_SIZES, "rotary_dim": 4}),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("llama", GROUPED),
    "llama-tied": ("llama", {**GROUPED, "tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 16, "head_dim": 8}),
    "ministral": ("ministral", {**GROUPED, "sliding_window": 16, "head_dim": 8}),
    "qwen2": ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 16}),
    "gemma": ("gemma", {**GROUPED, "num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            **GROUPED,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 5.0,
            "initializer_range": 0.8,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **GROUPED,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma3_text-capped": (
        "gemma3_text",
        {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0},
    ),
    "phi": ("phi", {**SIZES, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {**GROUPED, "sliding_window": 16}),
    "stablelm": ("stablelm", {**GROUPED, "partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "olmo": ("olmo", {**GROUPED, "clip_qkv": 8.0}),
    "olmo2": ("olmo2", GROUPED),
    "olmo3": ("olmo3", {**GROUPED, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "smollm3": ("smollm3", {**GROUPED, "no_rope_layer_interval": 2}),
    "starcoder2": ("starcoder2", {**GROUPED, "sliding_window": 16}),
    "gpt_bigcode": ("gpt_bigcode", {**GPT2_SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "biogpt": ("biogpt", {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "xglm": (
        "xglm",
        {
            "d_model": WIDTH,
            "ffn_dim": 2 * WIDTH,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "init_std": 0.2,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "bloom": ("bloom", {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "falcon-parallel": ("falcon", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-new": (
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
    ),
    "falcon-alibi": ("falcon", {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "mpt": (
        "mpt",
        {"d_model": WIDTH, "n_heads": 4, "n_layers": 2, "max_seq_len": POSITIONS, "initializer_range": 0.2},
    ),
    "granite": ("granite", {**GROUPED, **GRANITE}),
    "cohere": ("cohere", {**GROUPED, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {**GROUPED, "logit_scale": 0.25, "sliding_window": 16}),
    "helium": ("helium", {**GROUPED, "head_dim": 8}),
    "nemotron": ("nemotron", {**GROUPED, "head_dim": 8}),
    "glm": ("glm", {**GROUPED, "head_dim": 8}),
    "glm4": ("glm4", {**GROUPED, "head_dim": 8}),
    "ernie4_5": ("ernie4_5", {**GROUPED, "head_dim": 8}),
    "exaone4": ("exaone4", {**GROUPED, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "hyperclovax": ("hyperclovax", {**GROUPED, "head_dim": 8, "logits_scaling": 0.25}),
    "nanochat": ("nanochat", {**GROUPED, "final_logit_softcapping": 5.0}),
    "persimmon": ("persimmon", SIZES),
    "openai-gpt": ("openai-gpt", {**GPT2_SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {**GROUPED, **EXPERTS, "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": WIDTH},
    ),
    "qwen3_moe": ("qwen3_moe", {**GROUPED, **EXPERTS, "moe_intermediate_size": WIDTH}),
    "olmoe": ("olmoe", {**GROUPED, **EXPERTS}),
    "granitemoe": ("granitemoe", {**GROUPED, **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "gpt_oss",
        {
            **GROUPED,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mamba": ("mamba", {"hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.2}),
    "arcee": ("arcee", {**GROUPED, "head_dim": 8}),
    "apertus": ("apertus", GROUPED),
    "seed_oss": ("seed_oss", {**GROUPED, "head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**GROUPED, "head_dim": 8}),
    "diffllama": ("diffllama", {**GROUPED, "head_dim": 8}),
    "bitnet": ("bitnet", GROUPED),
    "minicpm3": (
        "minicpm3",
        {
            **SIZES,
            "dim_model_base": 8,  # logits_scaling is hidden_size / dim_model_base
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **SIZES,
            "moe_intermediate_size": WIDTH,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "vaultgemma": (
        "vaultgemma",
        {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "final_logit_softcapping": 5.0},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {**GROUPED, **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": WIDTH},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **GROUPED,
            **GRANITE,
            "num_local_experts": 0,
            "shared_intermediate_size": WIDTH,
            "layer_types": ["attention", "attention"],
            "mamba_n_heads": 8,
        },
    ),
    "lfm2": ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "lru_width": WIDTH,
            "attention_window_size": 16,
            "logits_soft_cap": 1.0,
            "block_types": ["recurrent", "attention"],
            "head_dim": 8,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **GROUPED,
            "lm_head_multiplier": 0.25,
            "mamba_d_ssm": WIDTH,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
    "ctrl": (
        "ctrl",
        {
            "n_embd": WIDTH,
            "dff": 2 * WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": POSITIONS,
            "initializer_range": 0.2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
    ),
    "gpt_neox_japanese": (
        "gpt_neox_japanese",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.2,
        },
    ),
    "jetmoe": (
        "jetmoe",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": WIDTH,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.2,
        },
    ),
    "rwkv": (
        "rwkv",
        {"hidden_size": WIDTH, "attention_hidden_size": WIDTH, "num_hidden_layers": 2, "context_length": 128},
    ),
    "inkling_text": ("inkling_text", {**GROUPED, "head_dim": 8}),
}
"""Name of a family, or of a variant of one, -> its model type and its configuration's fields."""


def make(name: str, folder: Path) -> Path:
    """Write the model of this family, the same one each time, with its tokenizer, and return the folder."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny-gpt2"])
    model = random_model(config_of(name, tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return the configuration of this family, for this tokenizer."""
    model_type, settings = FAMILIES[name]
    config: PreTrainedConfig = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    return config


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model of this configuration with random weights, biases and norms, in float32."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    model.eval()
    return model
