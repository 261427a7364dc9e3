"""What is saved is read as it is meant by other programs and by older libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import trl
from transformers import AutoConfig, AutoTokenizer

from lowvram_chat.data.template import SHIPPED_TEMPLATES, read_template, set_template
from lowvram_chat.data.template_text import render_text
from lowvram_chat.model.pretrained import load_tokenizer
from lowvram_chat.model.saved_form import (
    MARKED_TEMPLATE_FILE,
    complete_config,
    legacy_tokenizer_config,
    save_tokenizer,
    without_marks,
)

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello.\n "},
    {"role": "user", "content": "  Well?"},
]
MARKED = sorted(Path(trl.__file__).parent.glob("chat_templates/*_training.jinja"))


@pytest.mark.parametrize("name", SHIPPED_TEMPLATES)
def test_a_saved_template_is_plain_jinja_and_the_marked_one_is_beside_it(name: str, tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    set_template(tokenizer, name, "assistant")
    save_tokenizer(tokenizer, tmp_path)
    assert tokenizer.chat_template == read_template(name)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert "generation -%}" not in str(saved.chat_template)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(str(saved.chat_template)).render(
        messages=CHAT, add_generation_prompt=True, eos_token=tokenizer.eos_token
    )
    assert rendered == render_text(tokenizer, CHAT, add_generation_prompt=True)
    assert load_tokenizer(str(tmp_path)).chat_template == tokenizer.chat_template
    assert (tmp_path / MARKED_TEMPLATE_FILE).read_text(encoding="utf-8") == tokenizer.chat_template


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.stem)
def test_a_template_without_its_marks_renders_the_same_text(path: Path, tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    template = path.read_text(encoding="utf-8")
    texts = []
    for tokenizer.chat_template in (template, without_marks(template)):
        try:
            texts.append(render_text(tokenizer, CHAT, add_generation_prompt=True))
        except ValueError as error:  # a template that wants other content
            texts.append(str(error))
    assert texts[0] == texts[1]
    assert "generation" not in " ".join(part.split("%}")[0] for part in without_marks(template).split("{%")[1:]).split()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a {%- generation -%} b {%- endgeneration %}\nc", "a {#- -#} b {#- #}\nc"),
        ("{# {% generation %} #}x", "{# generation #}x"),
        ("{{ '{% generation %}' }}", "{{ '{% generation %}' }}"),
        ("{% raw %}{% generation %}{% endraw %}", "{% raw %}{% generation %}{% endraw %}"),
        ("{% if '%}' %}{% generation %}y{% endgeneration %}{% endif %}", "{% if '%}' %}{# #}y{# #}{% endif %}"),
    ],
)
def test_only_marks_are_taken_out(template: str, expected: str) -> None:
    assert without_marks(template) == expected


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0}
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 100000.0}, {"rope_theta": 100000.0}),
    "llama, scaled": (
        "llama",
        {"rope_parameters": SCALED},
        {"rope_theta": 50000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "qwen2": ("qwen2", {"rope_theta": 1e6}, {"rope_theta": 1e6}),
    "gpt_neox": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
        {"rotary_emb_base": 10000.0, "rotary_pct": 0.25},
    ),
    "phi": (
        "phi",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "gemma3_text": ("gemma3_text", {}, {"rope_theta": 1e6, "rope_local_base_freq": 10000.0}),
    "gpt2": ("gpt2", {}, {}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_config_has_the_keys_of_transformers_4_and_means_the_same_in_5(name: str, tmp_path: Path) -> None:
    kind, settings, expected = CONFIGS[name]
    config = AutoConfig.for_model(kind, **settings)
    config.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    complete_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert {key: saved[key] for key in expected} == expected
    assert {key: saved[key] for key in before} == before
    assert saved.keys() - before.keys() == expected.keys() - before.keys()
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert getattr(reloaded, "rope_parameters", None) == getattr(config, "rope_parameters", None)


def test_a_tokenizer_is_configured_so_that_transformers_4_can_load_it() -> None:
    config = {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<|a|>"],
        "is_local": True,
        "backend": "tokenizers",
        "eos_token": "<|e|>",
    }
    assert legacy_tokenizer_config(config, adds_bos=True) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|a|>"],
        "eos_token": "<|e|>",
    }
    llama = legacy_tokenizer_config({"tokenizer_class": "LlamaTokenizer"}, adds_bos=True)
    assert llama == {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
