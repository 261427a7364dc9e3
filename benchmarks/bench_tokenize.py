"""How fast conversations become token rows, beside the tokenizer alone on the same text, and in how much memory.

    python -m benchmarks.bench_tokenize                          200,000 conversations of ultrachat's lengths (long)
    python -m benchmarks.bench_tokenize --conversations 20000    two minutes

Both are processes of their own, timed from the first conversation to the last, imports left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import chats

RESULTS = Path(__file__).parent / "results"
LENGTH, BATCH = 1024, 1000


def raw(path: Path) -> dict[str, float]:
    """Return the figures of the tokenizer alone: texts in batches on all cores, and nothing made of its tokens."""
    tokenizer = _tokenizer()
    seconds, characters, count = 0.0, 0, 0
    with path.open(encoding="utf-8") as file:
        while lines := list(itertools.islice(file, BATCH)):
            texts = ["".join(f"{m['role']}: {m['content']}\n" for m in json.loads(line)["messages"]) for line in lines]
            started = time.perf_counter()
            tokenizer(texts, add_special_tokens=False)
            seconds += time.perf_counter() - started
            characters, count = characters + sum(map(len, texts)), count + len(texts)
    return {"seconds": seconds, "conversations": count, "megabytes": characters / 1e6}


def rows(path: Path) -> dict[str, float]:
    """Return the figures of this package: read, checked, rendered, tokenised, labelled, cut, and written to disk."""
    from lowvram_chat.data.load import load_rows
    from lowvram_chat.recipe.schema import Data

    tokenizer = _tokenizer()
    import datasets  # noqa: F401  (imports are not what is timed)

    started = time.perf_counter()
    made = load_rows(Data(source=str(path), max_length=LENGTH), tokenizer, 0)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "conversations": made.facts.conversations, "megabytes": path.stat().st_size / 1e6}


def _tokenizer() -> Any:
    from lowvram_chat.data.template import set_template
    from lowvram_chat.model.load import load_tokenizer

    tokenizer = load_tokenizer("builtin:tiny-gpt2")
    set_template(tokenizer, "plain", "assistant")
    return tokenizer


KINDS: dict[str, Callable[[Path], dict[str, float]]] = {"tokenizer alone": raw, "token rows": rows}


def _process(kind: str, path: Path, cache: Path) -> dict[str, float]:
    """Run one kind in a process of its own; return its figures with its peak memory."""
    code = "import json, sys; from benchmarks.bench_tokenize import *; print(json.dumps(KINDS[sys.argv[1]](Path(sys.argv[2]))))"
    environment = {**os.environ, "LOWVRAM_CHAT_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", code, kind, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{kind} failed")
    figures: dict[str, float] = json.loads(said.splitlines()[-1])
    return figures | {"peak_resident_mib": usage.ru_maxrss / 1024}


def main() -> None:
    """Make conversations, run both kinds, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=200_000)
    parser.add_argument("--store", action="store_true", help="write the figures to benchmarks/results/tokenize.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-tokenize-") as name:
        path = chats.write(chats.like_ultrachat(args.conversations), Path(name) / "chats.jsonl")
        report: dict[str, Any] = {kind: _process(kind, path, Path(name) / "cache") for kind in KINDS}
    for figures in report.values():
        figures["conversations_per_second"] = figures["conversations"] / figures["seconds"]
        figures["megabytes_per_second"] = figures["megabytes"] / figures["seconds"]
    report["share_of_the_tokenizer"] = report["tokenizer alone"]["seconds"] / report["token rows"]["seconds"]
    print(json.dumps(report, indent=2))
    if args.store:
        (RESULTS / "tokenize.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
