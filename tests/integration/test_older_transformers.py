"""Saved models mean the same in transformers 4.57: the same logits, the same rendered chat, the same end of an answer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowvram_chat import api
from tests.families import make
from tests.runs import Bench

FAMILIES = (
    "gpt2",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma3_text",
    "phi",
    "phi3",
    "stablelm",
    "gpt_neox",
    "olmo2",
    "smollm3",
)
CHAT = [{"role": "user", "content": "Hi there"}]
READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
for line in sys.stdin:
    folder = line.strip()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.arange(5, 45)[None]).logits[0, -1, :50].tolist()
    text = tokenizer.apply_chat_template(json.loads(sys.argv[1]), tokenize=False, add_generation_prompt=True)
    eos, ids = model.generation_config.eos_token_id, tokenizer(text)["input_ids"]
    print(json.dumps({"logits": logits, "text": text, "eos": eos, "ids": ids}))
"""


def in_this_version(folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.arange(5, 45)[None]).logits[0, -1, :50].tolist()
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    return {
        "logits": logits,
        "text": text,
        "eos": model.generation_config.eos_token_id,
        "ids": tokenizer(text)["input_ids"],
    }


@pytest.mark.older
def test_saved_models_mean_the_same_in_transformers_4(bench: Bench, request: pytest.FixtureRequest) -> None:
    folders = []
    for name in FAMILIES:
        model = make(name, bench.folder / f"{name}-base")
        run = bench.run(name, model__name=str(model), adapter={"kind": "lora", "r": 4}, train__max_steps=1)
        folders.append(api.merge(run).path)
    done = subprocess.run(
        [request.config.getoption("--older"), "-c", READ, json.dumps(CHAT)],
        input="".join(f"{folder}\n" for folder in folders),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, folder, line in zip(FAMILIES, folders, done.stdout.splitlines(), strict=True):
        found, expected = json.loads(line), in_this_version(folder)
        assert found["logits"] == pytest.approx(expected["logits"], abs=2e-4), name
        assert {**found, "logits": None} == {**expected, "logits": None}, name
