"""Compares the speed of two ways to train: both runs are alive at once, and their optimizer steps alternate.

    python -m benchmarks.bench_turns            LoRA and full fine-tuning, packed and padded rows: ten minutes
    python -m benchmarks.bench_turns --store    writes benchmarks/results/<machine>/turns/...

On a shared machine, the speed of a whole run varies by up to 20 % from run to run; the ratio of alternating steps varies by
at most 5 %.
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
"""Prefix of the line in which a run prints the seconds of a step; the first such line, before any step, has 0."""
NOISE = 0.05
"""Relative change of a ratio from run to run: five runs of one match gave 1.206 to 1.258."""


@dataclass(frozen=True)
class Match:
    """Two ways to train; the first should be faster."""

    model: str
    ways: tuple[str, str]
    conversations: int
    """Conversations in a step."""
    min_ratio: float
    """The first way's real tokens per second must be at least this many times the second's."""
    rounds: int
    """Measured steps of each."""


OVERRIDES: Mapping[str, Sequence[str]] = {
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
"""Way -> its overrides of the recipe. The adapter of one layer costs next to nothing: no adapter can be faster."""
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
    """Return, for each way, the real tokens and the seconds of each step after the warm-up."""
    steps = match.rounds + WARM_UP
    with tempfile.TemporaryDirectory(prefix="lowvram-chat-turns-") as folder_name, ExitStack() as running:
        folder = Path(folder_name)
        prepare(folder, match.model)
        packed = packed_rows(folder, match.conversations)
        children = {}
        for number, way in enumerate(match.ways):
            rows = packed if "data.rows=packed" in OVERRIDES[way] else match.conversations
            words = [*OVERRIDES[way], f"train.max_steps={steps}", "output.sample_prompts=[]"]
            children[way] = running.enter_context(_started(ours(folder, folder / str(number), words, rows), folder))
            _seconds(children[way])  # the runs load one after the other, so that they do not share the cores
        taken: dict[str, list[float]] = {way: [] for way in children}
        for _ in range(steps):
            for way, child in children.items():
                taken[way].append(_take_step(child))
        for child in children.values():
            child.communicate()
        return {way: _counted(folder / str(number), taken[way]) for number, way in enumerate(match.ways)}


@contextmanager
def _started(words: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a run that waits before its first step, and end it with the context, even on Ctrl-C."""
    variables = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "-1", "LOWVRAM_CHAT_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "benchmarks.turn_clock", *words]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | variables,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def _take_step(child: subprocess.Popen[str]) -> float:
    """Let a run take one step and return its seconds."""
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return _seconds(child)


def _seconds(child: subprocess.Popen[str]) -> float:
    """Return the seconds of the step that a run reports next.

    Raises:
        RuntimeError: the run ended; with its last lines.
    """
    assert child.stdout is not None
    last_lines: deque[str] = deque(maxlen=20)
    for line in child.stdout:
        if line.startswith(STEP):
            return float(line.removeprefix(STEP))
        last_lines.append(line)
    raise RuntimeError(f"a run ended before its last step:\n{''.join(last_lines)}")


def _counted(out: Path, seconds: Sequence[float]) -> list[tuple[float, float]]:
    """Return the real tokens and the seconds of each step after the warm-up, from a run's metrics file."""
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    totals = [0, *(line["real_tokens"] for line in logged if "real_tokens" in line)]
    tokens = [after - before for before, after in itertools.pairwise(totals)]
    return list(zip(tokens, seconds, strict=True))[WARM_UP:]


def run_match(keeper: Keeper, case: str) -> Record:
    """Measure one match and return its record."""
    match = MATCHES[case]
    steps = rates(match)
    overall = {
        way: sum(tokens for tokens, _ in taken) / sum(seconds for _, seconds in taken) for way, taken in steps.items()
    }
    first, second = match.ways
    ratio = overall[first] / overall[second]
    metrics = {
        way.replace(", ", "_"): spread([tokens / seconds for tokens, seconds in taken], "tokens/s").model_copy(
            update={"value": round(overall[way], 1)}
        )
        for way, taken in steps.items()
    }
    metrics["ratio"] = Metric(
        value=round(ratio, 3), unit="1", kind="measured", better="higher", tolerance=NOISE, samples=match.rounds
    )
    problem = (
        None
        if ratio >= match.min_ratio
        else f"{first} is {ratio:.2f}x as fast as {second}, at least {match.min_ratio} expected"
    )
    print(
        f"{case}: {ratio:.3f}x ({', '.join(f'{way} {rate:,.0f}' for way, rate in overall.items())} tokens/s)",
        file=sys.stderr,
    )
    return keeper.keep("turns", case, metrics, problem=problem)


def main() -> None:
    """Measure all matches and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=MATCHES, help="names of matches")
    parser.add_argument("--store", action="store_true", help="write the results to benchmarks/results")
    args = parser.parse_args()
    quiet_libraries()
    keeper = Keeper.of_this_checkout(store=args.store)
    for case in args.only or MATCHES:
        run_match(keeper, case)


if __name__ == "__main__":
    main()
