"""Two ways to train, step against step: both runs are there at once, and their optimizer steps take turns.

    python -m benchmarks.bench_turns            LoRA beside full on both models, packed beside padded: ten minutes
    python -m benchmarks.bench_turns --store    writes benchmarks/results/<machine>/turns/...

Whole runs on a shared machine differ by a fifth from one to the next, a ratio of steps that alternate by a twentieth at most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.suite import Keeper
from benchmarks.timed_runs import ROWS, WARM_UP, ours, packed_rows, prepare
from lowvram_chat.quiet import quiet_libraries
from lowvram_chat.results.record import Metric, Record, spread

STEP = "step took "
"""What a line begins with in which a run says a step's seconds; the first one, before any step, says 0."""
NOISE = 0.05
"""Relative change of a ratio from one run to the next: five runs of one match gave 1.206 to 1.258."""


@dataclass(frozen=True)
class Match:
    """Two ways to train, of which the first should be faster."""

    model: str
    ways: tuple[str, str]
    conversations: int
    """Of a step."""
    wanted: float
    """Times the second's real tokens a second, at least."""
    rounds: int
    """Steps of each that count."""


WORDS: Mapping[str, Sequence[str]] = {
    "padded": [],
    "packed": ["data.rows=packed"],
    "packed to 1,024": ["data.rows=packed", "data.max_length=1024"],
    "packed to 1,024, under a mask": ["data.rows=packed", "data.max_length=1024", "model.document_attention=false"],
    "packed, LoRA": ["data.rows=packed", "adapter.kind=lora"],
    "packed, LoRA of one layer": [
        "data.rows=packed", "adapter.kind=lora", "adapter.r=1", "adapter.target_modules=[h.0.attn.c_attn]",
    ],
    "packed, compiled": ["data.rows=packed", "train.compile=true"],
    "packed, compiled, LoRA": ["data.rows=packed", "train.compile=true", "adapter.kind=lora"],
}  # fmt: skip
"""Way -> its words. The adapter of one layer costs next to nothing: it shows what any adapter could reach."""
MATCHES: Mapping[str, Match] = {
    "tiny: LoRA beside full": Match("tiny", ("packed, LoRA", "packed"), ROWS, 1.3, 60),
    "tiny: LoRA of one layer beside full": Match("tiny", ("packed, LoRA of one layer", "packed"), ROWS, 1.3, 60),
    "tiny: LoRA beside full, compiled": Match("tiny", ("packed, compiled, LoRA", "packed, compiled"), ROWS, 1.3, 60),
    "gpt2: LoRA beside full": Match("gpt2", ("packed, LoRA", "packed"), ROWS, 1.3, 10),
    "tiny: packed beside padded, 1 conversation": Match("tiny", ("packed", "padded"), 1, 1.0, 200),
    "tiny: packed beside padded, 4 conversations": Match("tiny", ("packed", "padded"), 4, 1.0, 80),
    "tiny: packed beside padded, 16 conversations": Match("tiny", ("packed", "padded"), 16, 1.0, 30),
    "tiny: by document beside under a mask": Match(
        "tiny", ("packed to 1,024", "packed to 1,024, under a mask"), 2, 1.0, 40
    ),
}


def rates(match: Match) -> dict[str, list[tuple[float, float]]]:
    """Return way -> the real tokens and the seconds of each step after the warm-up."""
    steps = match.rounds + WARM_UP
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-turns-") as name, ExitStack() as running:
        folder = Path(name)
        prepare(folder, match.model)
        few = packed_rows(folder, match.conversations)
        children = {}
        for number, way in enumerate(match.ways):
            rows = few if "data.rows=packed" in WORDS[way] else match.conversations
            words = [*WORDS[way], f"train.max_steps={steps}", "output.sample_prompts=[]"]
            children[way] = running.enter_context(_begun(ours(folder, folder / str(number), words, rows), folder))
            _seconds(children[way])  # one loads after the other: two would share the cores
        taken: dict[str, list[float]] = {way: [] for way in children}
        for _ in range(steps):
            for way, child in children.items():
                taken[way].append(_go(child))
        for child in children.values():
            child.communicate()
        return {way: _counted(folder / str(number), taken[way]) for number, way in enumerate(match.ways)}


@contextmanager
def _begun(words: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that waits before its first step; it does not outlive the context, Ctrl-C included."""
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "-1", "LOWVRAM_CHAT_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "benchmarks.turn_clock", *words]
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=both, text=True, env=os.environ | quiet)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def _go(child: subprocess.Popen[str]) -> float:
    """Let a run take a step; return its seconds."""
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return _seconds(child)


def _seconds(child: subprocess.Popen[str]) -> float:
    assert child.stdout is not None
    said: deque[str] = deque(maxlen=20)
    for line in child.stdout:
        if line.startswith(STEP):
            return float(line.removeprefix(STEP))
        said.append(line)
    raise RuntimeError(f"a run ended before its last step:\n{''.join(said)}")


def _counted(out: Path, seconds: Sequence[float]) -> list[tuple[float, float]]:
    """Return the real tokens and the seconds of each step after the warm-up."""
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    totals = [0, *(line["real_tokens"] for line in logged if "real_tokens" in line)]
    tokens = [after - before for before, after in itertools.pairwise(totals)]
    return list(zip(tokens, seconds, strict=True))[WARM_UP:]


def play(keeper: Keeper, case: str) -> Record:
    """Measure and keep one match."""
    match = MATCHES[case]
    steps = rates(match)
    overall = {way: sum(tokens for tokens, _ in of) / sum(seconds for _, seconds in of) for way, of in steps.items()}
    first, second = match.ways
    ratio = overall[first] / overall[second]
    metrics = {
        way.replace(", ", "_"): spread([tokens / seconds for tokens, seconds in of], "tokens/s").model_copy(
            update={"value": round(overall[way], 1)}
        )
        for way, of in steps.items()
    }
    metrics["ratio"] = Metric(
        value=round(ratio, 3), unit="1", kind="measured", better="higher", tolerance=NOISE, samples=match.rounds
    )
    problem = None if ratio >= match.wanted else f"{first} is {ratio:.2f}x as fast as {second}, {match.wanted} wanted"
    print(
        f"{case}: {ratio:.3f}x ({', '.join(f'{way} {rate:,.0f}' for way, rate in overall.items())} tokens/s)",
        file=sys.stderr,
    )
    return keeper.keep("turns", case, metrics, problem=problem)


def main() -> None:
    """Play all matches and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=MATCHES, help="names of matches")
    parser.add_argument("--store", action="store_true", help="write the results to benchmarks/results")
    args = parser.parse_args()
    quiet_libraries()
    keeper = Keeper.of_this_checkout(store=args.store)
    for case in args.only or MATCHES:
        play(keeper, case)


if __name__ == "__main__":
    main()
