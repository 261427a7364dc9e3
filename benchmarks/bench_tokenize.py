"""Measures how fast conversations become token rows, and in how much memory, compared with the tokenizer alone.

    python -m benchmarks.bench_tokenize                          200,000 conversations of ultrachat's lengths (long)
    python -m benchmarks.bench_tokenize --conversations 20000    two minutes

Each of the two runs in its own process on the same text, and is timed from the first conversation to the last, without
imports.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks import chats, processes
from benchmarks.suite import Keeper
from lowvram_chat.results.record import Metric, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH, BATCH = 1024, 1000
MIN_SHARE, MAX_MIB = 0.7, 1536
"""The share of the tokenizer's own speed and the peak memory that pass, whatever the number of conversations."""


def tokenize_only(path: Path) -> dict[str, float]:
    """Tokenise the texts in batches on all cores, discard the tokens, and return the figures."""
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


def make_rows(path: Path) -> dict[str, float]:
    """Turn the conversations into token rows on disk, as this package does before training, and return the figures."""
    from lowvram_chat.data.dataset import load_rows
    from lowvram_chat.recipe.schema import Data

    tokenizer = _tokenizer()
    import datasets  # noqa: F401  (so that the import is not timed)

    started = time.perf_counter()
    rows = load_rows(Data(source=str(path), max_length=LENGTH), tokenizer, 0)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "conversations": rows.facts.conversations, "megabytes": path.stat().st_size / 1e6}


def _tokenizer() -> PreTrainedTokenizerBase:
    from lowvram_chat.data.template import set_template
    from lowvram_chat.model.pretrained import load_tokenizer

    tokenizer = load_tokenizer("builtin:tiny-gpt2")
    set_template(tokenizer, "plain", "assistant")
    return tokenizer


KINDS: dict[str, Callable[[Path], dict[str, float]]] = {"tokenizer alone": tokenize_only, "token rows": make_rows}


def _process(kind: str, path: Path, cache: Path) -> dict[str, float]:
    """Run one of `KINDS` in its own process and return its figures, peak memory included."""
    code = "import json, sys; from benchmarks.bench_tokenize import *; print(json.dumps(KINDS[sys.argv[1]](Path(sys.argv[2]))))"
    environment = {"LOWVRAM_CHAT_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "true"}
    done = processes.run([sys.executable, "-c", code, kind, str(path)], environment)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures | {"peak_resident_mib": done.peak_resident_mib}


def main() -> None:
    """Generate conversations, run both kinds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=200_000)
    parser.add_argument("--store", action="store_true", help="write the result to benchmarks/results")
    args = parser.parse_args()
    keeper = Keeper.of_this_checkout(store=args.store)
    measure(keeper, args.conversations)


def measure(keeper: Keeper, conversations: int) -> Record:
    """Generate conversations, run both kinds and return the record."""
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-tokenize-") as folder:
        path = chats.write(chats.like_ultrachat(conversations), Path(folder) / "chats.jsonl")
        alone, whole = (_process(kind, path, Path(folder) / "cache") for kind in KINDS)
    share = alone["seconds"] / whole["seconds"]
    figures = {
        "conversations_per_second": _metric(whole["conversations"] / whole["seconds"], "1/s", "higher", 0.2),
        "megabytes_per_second": _metric(whole["megabytes"] / whole["seconds"], "MB/s", "higher", 0.2),
        "tokenizer_alone": _metric(alone["conversations"] / alone["seconds"], "1/s"),
        "share_of_the_tokenizer": _metric(share, "1", "higher", 0.2),
        "peak_resident": _metric(whole["peak_resident_mib"], "MiB", "lower", 0.1),
    }
    for metric, figure in figures.items():
        print(f"{metric.replace('_', ' ')}: {figure.value:,.4g} {figure.unit}")
    problem = (
        None if share >= MIN_SHARE else f"{share:.0%} of the tokenizer's own speed, at least {MIN_SHARE:.0%} expected"
    )
    if whole["peak_resident_mib"] > MAX_MIB:
        problem = f"{whole['peak_resident_mib']:,.0f} MiB, at most {MAX_MIB:,} expected"
    return keeper.keep("tokenize", f"{conversations} conversations", figures, problem=problem)


def _metric(value: float, unit: str, better: Literal["lower", "higher", "same"] = "same", noise: float = 0.0) -> Metric:
    return Metric(value=round(value, 4), unit=unit, kind="measured", better=better, tolerance=noise)


if __name__ == "__main__":
    main()
