"""Show that a change leaves plans and losses as they were.

    python tools/same_results.py COMMIT

Compares the working tree with another commit, which is checked out into a temporary folder and run with the same Python:

- `plan --json` of every recipe: equal byte for byte (settings that were renamed are renamed before they are compared);
- the golden loss curves in tests/golden/curves.json: unchanged, and reproduced to 1e-6;
- the quickstart's held-out losses and its logged training losses: equal to 1e-6.

Exit code 0: all equal. 1: something differs, and what. It takes some minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-6


def run(tree: Path, *words: str) -> str:
    """Run a module in a tree and return its standard output; exit codes 0 and 1 are answers."""
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"{' '.join(words)} in {tree.name}: {done.stderr}")
    return done.stdout


def last_line(text: str) -> str:
    """Return the last line of a text: the JSON document of a command."""
    return text.rstrip().splitlines()[-1]


def plans(tree: Path) -> dict[str, str]:
    """Return recipe -> `plan --json`."""
    return {
        path.stem: last_line(run(tree, "lowvram_chat.plan", str(path.relative_to(tree)), "--json"))
        for path in sorted((tree / "recipes").glob("*.yaml"))
    }


def quickstart(tree: Path, folder: Path) -> dict[str, Any]:
    """Return the quickstart's held-out losses and logged training losses."""
    words = ["recipes/quickstart.yaml", f"output.dir={folder}", "output.sample_prompts=[]", "--overwrite", "--json"]
    result = json.loads(last_line(run(tree, "lowvram_chat.sft", *words)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = {name: result[name] for name in ("held_out_loss_before", "held_out_loss_after")}
    return held_out | {f"loss of step {line['step']}": line["loss"] for line in lines if "loss" in line}


def golden(tree: Path) -> dict[str, float]:
    """Return the losses of every golden curve, measured now."""
    code = (
        "import json, tempfile, pathlib\n"
        "from tests.golden import test_curve as t\n"
        "from tests.runs import Bench\n"
        "from tests.samples import conversations, save_tiny_gpt2, write_jsonl\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "train = write_jsonl(folder / 'train.jsonl', conversations(64, seed=1))\n"
        "held_out = write_jsonl(folder / 'held_out.jsonl', conversations(16, seed=2))\n"
        "bench = Bench(folder, save_tiny_gpt2(folder / 'tiny'), train, held_out)\n"
        "print(json.dumps({case: t.measure(bench, case)['loss'] for case in t.CASES}))"
    )
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True, check=True
    )
    curves = json.loads(last_line(done.stdout))
    return {f"{case}, step {n}": loss for case, losses in curves.items() for n, loss in enumerate(losses, start=1)}


def differing(old: dict[str, float], new: dict[str, float]) -> list[str]:
    """Return the figures that differ by more than the tolerance, or that only one side has."""
    problems = [f"{name}: only one side has it" for name in old.keys() ^ new.keys()]
    return problems + [
        f"{name}: {old[name]} before, {new[name]} now"
        for name in old.keys() & new.keys()
        if abs(old[name] - new[name]) > TOLERANCE
    ]


def main() -> int:
    """Compare, print, and return the exit code."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/same_results.py COMMIT")
    problems = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        base = folder / "base"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(base)], check=True)
        subprocess.run(["git", "checkout", "-q", sys.argv[1]], cwd=base, check=True)
        old_plans, new_plans = plans(base), plans(ROOT)
        for recipe, old in old_plans.items():
            same = new_plans.get(recipe) == old
            print(f"plan {recipe}: {'equal byte for byte' if same else 'DIFFERS'}")
            problems += [] if same else [f"plan {recipe}"]
        for title, old_losses, new_losses in (
            ("golden curves", golden(base), golden(ROOT)),
            ("quickstart", quickstart(base, folder / "old"), quickstart(ROOT, folder / "new")),
        ):
            found = differing(old_losses, new_losses)
            print(f"{title}: {len(new_losses)} losses, {len(found)} differ by more than {TOLERANCE:g}")
            problems += found
        curves = "tests/golden/curves.json"
        same = (base / curves).read_bytes() == (ROOT / curves).read_bytes()
        print(f"{curves}: {'unchanged' if same else 'CHANGED'}")
        problems += [] if same else [curves]
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
