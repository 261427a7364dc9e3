"""The model card (README.md) that is saved with every adapter and model."""

from __future__ import annotations

import yaml

from lowvram_chat import __version__
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import dump_recipe
from lowvram_chat.training.run_dir import Result, RunDir

RESULT_ROWS = {
    "held_out_loss_before": ("held-out loss before (nats per token)", ".4f"),
    "held_out_loss_after": ("held-out loss after (nats per token)", ".4f"),
    "training_loss": ("training loss, last logged", ".4f"),
    "steps": ("optimizer steps", ","),
    "real_tokens": ("tokens", ","),
    "seconds": ("seconds", ",.0f"),
    "trained_parameters": ("trained parameters", ","),
}
"""Key of result.json -> title and number format."""


def write_model_card(run: RunDir, result: Result) -> None:
    """Write the card of a finished run next to its adapter or model."""
    recipe = run.recipe()
    folder = run.model if recipe.adapter is None else run.adapter
    (folder / "README.md").write_text(model_card(recipe, result), encoding="utf-8")


def model_card(recipe: Recipe, result: Result, *, merged: bool = False) -> str:
    """Return the card of a trained adapter or model: hub metadata, figures, how to use it, the recipe."""
    is_adapter = recipe.adapter is not None and not merged
    names = [recipe.data.source] if isinstance(recipe.data.source, str) else recipe.data.source
    how = "a full fine-tune" if recipe.adapter is None else f"a {recipe.adapter.kind} adapter"
    title = f"{how} of" if is_adapter or recipe.adapter is None else f"{how}, merged into"
    return f"""---
{_metadata(recipe, names, is_adapter=is_adapter)}---

# {title[0].upper()}{title[1:]} {recipe.model.name}

Fine-tuned on {", ".join(names)} with lowvram_chat {__version__}.

| | |
|---|---|
{_rows(result)}

## Use

Conversations are rendered by the tokenizer's own chat template; each answer ends with the EOS token.

```python
{_usage(recipe.model.name, is_adapter=is_adapter)}
```

## Recipe

```yaml
{dump_recipe(recipe).rstrip()}
```
"""


def _metadata(recipe: Recipe, names: list[str], *, is_adapter: bool) -> str:
    """Return the hub's YAML metadata."""
    metadata: dict[str, str | list[str]] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    if not recipe.model.name.startswith("builtin:"):
        metadata["base_model"] = recipe.model.name
    datasets = [name for name in names if name.count("/") == 1]
    if datasets:
        metadata["datasets"] = datasets
    metadata["tags"] = ["lowvram_chat", "sft", *(["lora"] if is_adapter else [])]
    return str(yaml.safe_dump(metadata, sort_keys=False))


def _rows(result: Result) -> str:
    return "\n".join(
        f"| {title} | {result[key]:{form}} |"
        for key, (title, form) in RESULT_ROWS.items()
        if result.get(key) is not None
    )


def _usage(base: str, *, is_adapter: bool) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
    ]
    if is_adapter:
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
