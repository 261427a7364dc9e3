"""The model card (README.md) that is saved with every adapter and model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from lowvram_chat import __version__
from lowvram_chat.data.sources import is_remote
from lowvram_chat.data.template import KNOWN_TEMPLATES
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


HUB_ID = re.compile(r"(?=.{1,96}$)(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
"""Form of ids on the hub."""

LICENSES: Mapping[str, str] = {
    "builtin:tiny-gpt2": "apache-2.0",
    "distilbert/distilgpt2": "apache-2.0",
    "distilgpt2": "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M": "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    **{f"{owner}gpt2{size}": "mit" for owner in ("openai-community/", "") for size in ("", "-medium", "-large", "-xl")},
}
"""Base model -> licence of its weights, which a model made from it keeps. Source: the models' cards on the hub."""


def model_card(recipe: Recipe, result: Result, *, merged: bool = False) -> str:
    """Return the card of a trained adapter or model: hub metadata, figures, how to use it, the recipe. It names no local path."""
    is_adapter = recipe.adapter is not None and not merged
    names = [recipe.data.source] if isinstance(recipe.data.source, str) else recipe.data.source
    how = "a full fine-tune" if recipe.adapter is None else f"a {recipe.adapter.kind} adapter"
    title = f"{how} of" if is_adapter or recipe.adapter is None else f"{how}, merged into"
    return f"""---
{_metadata(recipe, names, is_adapter=is_adapter)}---

# {title[0].upper()}{title[1:]} {_shown(recipe.model.name)}

Fine-tuned on {", ".join(map(_shown, names))} with lowvram_chat {__version__}.

| | |
|---|---|
{_rows(result)}

## Use

Conversations are rendered by the tokenizer's own chat template, which ends each answer with a token of its own.
{_merge_first(recipe.model.name) if is_adapter else ""}
```python
{_usage(is_adapter=is_adapter)}
```

## Recipe

```yaml
{dump_recipe(_without_paths(recipe)).rstrip()}
```
"""


def _shown(name: str) -> str:
    """Return a model's or dataset's name without the folders of this machine."""
    if name.startswith("builtin:") or _is_hub_id(name):
        return name
    return Path(name).expanduser().name or "a local folder"


def _is_hub_id(name: str) -> bool:
    """Return whether a name can only be that of a model or dataset on the hub."""
    return HUB_ID.fullmatch(name) is not None and is_remote(name)


def _without_paths(recipe: Recipe) -> Recipe:
    """Return a recipe whose local paths are cut to the last part."""
    data = recipe.data
    sources = {
        field: _shown(value) if isinstance(value, str) else [*map(_shown, value)]
        for field in ("source", "eval_source")
        if (value := getattr(data, field)) is not None
    }
    template = {} if data.chat_template in KNOWN_TEMPLATES else {"chat_template": Path(data.chat_template).name}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"name": _shown(recipe.model.name)}),
            "data": data.model_copy(update={**sources, **template}),
            "output": recipe.output.model_copy(update={"dir": Path(recipe.output.dir).expanduser().name}),
        }
    )


def _merge_first(base: str) -> str:
    """Return the advice to merge an adapter whose base other machines do not have; empty for a base on the hub."""
    if _is_hub_id(base):
        return ""
    return (
        f"\nThe base, {_shown(base)}, is not on the hub. To use the adapter on another machine, merge it first: "
        "`python -m lowvram_chat.merge RUN_FOLDER`.\n"
    )


def _metadata(recipe: Recipe, names: list[str], *, is_adapter: bool) -> str:
    """Return the hub's YAML metadata: only ids that the hub can have, and a licence only where it is known."""
    base = recipe.model.name
    metadata: dict[str, str | list[str]] = {"library_name": "peft" if is_adapter else "transformers"}
    if base in LICENSES:
        metadata |= {"license": LICENSES[base], "language": ["en"]}
    metadata["pipeline_tag"] = "text-generation"
    if _is_hub_id(base):
        metadata |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    datasets = [name for name in names if _is_hub_id(name)]
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


def _usage(*, is_adapter: bool) -> str:
    lines = [
        f"from transformers import AutoTokenizer{'' if is_adapter else ', AutoModelForCausalLM'}",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
    ]
    if is_adapter:
        lines.insert(0, "from peft import AutoPeftModelForCausalLM")
        lines.append('model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")')
    else:
        lines.append('model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")')
    lines += [
        'messages = [{"role": "user", "content": "Hello, who are you?"}]',
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]))",
    ]
    return "\n".join(lines)
