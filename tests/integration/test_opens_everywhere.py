"""What a run leaves opens with plain transformers and PEFT, from any directory, and names nothing of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowvram_chat import api
from lowvram_chat.exporting.model_card import model_card
from lowvram_chat.model.generation import encode_messages, stop_token_ids
from lowvram_chat.model.saved import open_model
from tests.runs import Bench
from tests.samples import save_tiny_gpt2, write_jsonl

LORA = {"kind": "lora", "r": 4}
CHAT = [{"role": "user", "content": "Hi"}]


def save_llama(folder: Path, tiny: Path, **settings: Any) -> Path:
    """Save a random Llama with a rope_theta of its own, and the built-in tokenizer."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        rope_theta=123456.0,
        bos_token_id=0,
        eos_token_id=0,
        **settings,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def metadata(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_saved_model_is_plain(adapter: dict[str, Any] | None, bench: Bench, tiny: Path) -> None:
    base = save_llama(bench.folder / "llama", tiny)
    run = bench.run("r", model__name=str(base), adapter=adapter, train__max_steps=2)
    folder = run / "model" if adapter is None else api.merge(run).path
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == 123456.0
    assert config["use_cache"] is True
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "{%- generation -%}" not in str(tokenizer.chat_template)
    assert "{%- generation -%}" in (folder / "chat_template_training.jinja").read_text(encoding="utf-8")
    ours = open_model(str(folder))
    tokens = torch.arange(10)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(ours.model(tokens).logits, plain(tokens).logits)
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert text == ours.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("base", ["builtin:tiny-gpt2", "a relative path"])
def test_an_adapter_opens_from_another_directory(
    base: str, bench: Bench, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    run = bench.run("r", model__name=tiny.name if base == "a relative path" else base, adapter=LORA, train__max_steps=1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    model = AutoPeftModelForCausalLM.from_pretrained(str(run / "adapter"))
    assert model(torch.arange(5)[None]).logits.shape[-1] == 8192
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "merge it first" in card
    assert "base_model" not in metadata(card)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_card_names_no_local_path(adapter: dict[str, Any] | None, bench: Bench) -> None:
    run = bench.run("r", adapter=adapter, train__max_steps=1)
    cards = [path.read_text(encoding="utf-8") for path in run.glob("*/README.md")]
    if adapter:
        cards.append((api.merge(run).path / "README.md").read_text(encoding="utf-8"))
    for card in cards:
        assert str(bench.folder) not in card
        assert str(bench.model.parent) not in card
        assert bench.train_file.name in card
        assert metadata(card).keys() <= {"library_name", "pipeline_tag", "tags"}


def test_a_card_has_the_metadata_that_the_hub_knows(bench: Bench) -> None:
    recipe = bench.recipe(
        "r",
        model__name="openai-community/gpt2",
        adapter=LORA,
        data={"source": ["HuggingFaceH4/ultrachat_200k", "data/train.jsonl"], "chat_template": "plain"},
    )
    found = metadata(model_card(recipe, {}))
    assert found == {
        "library_name": "peft",
        "license": "mit",
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "base_model": "openai-community/gpt2",
        "base_model_relation": "adapter",
        "datasets": ["HuggingFaceH4/ultrachat_200k"],
        "tags": ["lowvram_chat", "sft", "lora"],
    }
    assert metadata(model_card(recipe, {}, merged=True))["base_model_relation"] == "finetune"


def test_a_chatml_model_whose_eos_is_another_stops_where_it_learned_to(
    bench: Bench, tiny: Path, tmp_path: Path
) -> None:
    base = save_tiny_gpt2(tmp_path / "base", unused=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [{"messages": [*CHAT, {"role": "assistant", "content": "Hello."}]}] * 32
    )
    run = bench.run(
        "r",
        model__name=str(base),
        data={"source": str(rows), "chat_template": "chatml", "max_length": 64},
        train__max_steps=60,
    )
    session = api.open_chat(run, temperature=0, max_new_tokens=40)
    assert session.ask("Hi") == "Hello."
    end = session.opened.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in stop_token_ids(session.opened.model, session.opened.tokenizer)
    folder = run / "model"
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert plain.generation_config.eos_token_id == [end, tokenizer.eos_token_id]
    prompt = torch.tensor([encode_messages(session.opened.tokenizer, CHAT)])
    answer = plain.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == "Hello.<|im_end|>"
