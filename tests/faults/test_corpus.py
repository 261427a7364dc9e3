"""Every wrong input of the corpus ends with one message, in seconds, and leaves nothing behind."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.validation import __main__ as validation
from lowvram_chat import cli
from lowvram_chat.terminal import UNPRINTABLE
from tests.faults.corpus import Case, cases, write
from tests.samples import conversations, save_tiny_gpt2, write_jsonl

SECONDS = 10
LEAST_CASES = 400
PROGRESS = re.compile(
    r"tokenising|bad rows, |token rows |conversations (in|over) |no NVIDIA card|has no chat template|predicted|planned|fits"
)
"""Lines that a command prints before it meets what is wrong."""
ALL = list(cases())


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, conversations and a recipe that are right, and other things that are no run."""
    folder = tmp_path_factory.mktemp("ground")
    save_tiny_gpt2(folder / "model")
    write_jsonl(folder / "data.jsonl", conversations(8, seed=1))
    (folder / "norun").mkdir()
    (folder / "norun" / "mine.txt").write_text("mine", encoding="utf-8")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "good.yaml").write_text(
        f"model: {{name: '{folder / 'model'}'}}\n"
        f"data: {{source: '{folder / 'data.jsonl'}', max_length: 64}}\n"
        "train: {precision: fp32, max_steps: 1, save_steps: null}\n"
        "optimizer: {name: adamw}\n"
        "output: {sample_prompts: []}\n",
        encoding="utf-8",
    )
    return folder


def test_the_corpus_is_large() -> None:
    assert len(ALL) >= LEAST_CASES
    assert len({str(case) for case in ALL}) == len(ALL)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_wrong_input_is_one_message(
    case: Case,
    ground: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = write(case, tmp_path, ground / "model") | {
        "recipe": str(ground / "good.yaml"),
        "model": str(ground / "model"),
        "data": str(ground / "data.jsonl"),
        "run": str(ground / "norun"),
        "loop": str(ground / "loop"),
    }
    words = [re.sub(r"\{(\w+)\}", lambda match: names.get(match[1], match[0]), word) for word in case.words]
    before = {*tmp_path.rglob("*"), *ground.rglob("*")}
    started = time.monotonic()

    code = main(words)

    seconds = time.monotonic() - started
    out, err = capfd.readouterr()
    assert code == 2, (code, out[-2000:], err[-2000:])
    assert "Traceback" not in err
    assert not UNPRINTABLE.search(out + err), ascii(err)
    *progress, message = [line for line in err.splitlines() if line and not line.startswith("  ")]
    assert all(PROGRESS.search(line) for line in progress), err
    assert len(err) < 8_000
    assert re.search(r"\w[^.]*(: |\. )", message), "says where, or what to do"
    assert {*tmp_path.rglob("*"), *ground.rglob("*")} == before, "nothing was written"
    assert seconds < SECONDS


@pytest.fixture
def main() -> Callable[[list[str]], int]:
    """Return a call of the command line that returns its exit code."""

    def call(words: list[str]) -> int:
        def too_long(number: int, frame: object) -> None:
            raise AssertionError(f"no answer in {SECONDS} s")

        before = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        try:
            return validation.main(words[1:]) if words[0] == "validation" else cli.main(words)
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    return call
