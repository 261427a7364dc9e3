"""The model card that is saved with every adapter and model."""

from __future__ import annotations

from typing import Any

import yaml

from lowvram_chat import __version__
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import dump_recipe


def model_card(recipe: Recipe, result: dict[str, Any], *, merged: bool = False) -> str:
    """Return the README.md of a trained adapter, merged or whole model: hub metadata, numbers, use, the recipe."""
    adapter = recipe.adapter is not None and not merged
    source = recipe.data.source
    datasets = [name for name in ([source] if isinstance(source, str) else source) if name.count("/") == 1]
    metadata: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    if not recipe.model.name.startswith("builtin:"):
        metadata["base_model"] = recipe.model.name
    if datasets:
        metadata["datasets"] = datasets
    metadata["tags"] = ["lowvram_chat", "sft", *(["lora"] if adapter else [])]
    how = "a full fine-tune" if recipe.adapter is None else f"a {recipe.adapter.kind} adapter"
    title = f"{how} of" if adapter or recipe.adapter is None else f"{how}, merged into"
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False)}---

# {title[0].upper()}{title[1:]} {recipe.model.name}

Fine-tuned on {source if isinstance(source, str) else ", ".join(source)} with lowvram_chat {__version__}.

| | |
|---|---|
{_rows(result)}

## Use

Conversations are rendered by the tokenizer's own chat template; each answer ends with the EOS token.

```python
{_usage(recipe.model.name, adapter)}
```

## Recipe

```yaml
{dump_recipe(recipe).rstrip()}
```
"""


def _rows(result: dict[str, Any]) -> str:
    known = {
        "held-out loss before (nats a token)": ("held_out_loss_before", ".4f"),
        "held-out loss after": ("held_out_loss_after", ".4f"),
        "training loss, last logged": ("training_loss", ".4f"),
        "optimizer steps": ("steps", ","),
        "tokens": ("real_tokens", ","),
        "seconds": ("seconds", ",.0f"),
        "trained parameters": ("trained_parameters", ","),
    }
    return "\n".join(
        f"| {name} | {result[key]:{form}} |" for name, (key, form) in known.items() if result.get(key) is not None
    )


def _usage(base: str, adapter: bool) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
    ]
    if adapter:
        lines.insert(0, "from peft import PeftModel")
        lines += [
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        ]
    else:
        lines.append('model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")')
    lines += [
        'messages = [{"role": "user", "content": "Hello, who are you?"}]',
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]))",
    ]
    return "\n".join(lines)
