"""Two processes on one folder: the second is refused, whatever it wants; a process that dies owns nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowvram_chat import api
from lowvram_chat.errors import UsageError
from lowvram_chat.locks import owned
from tests.faults.processes import finished, start, steps_of, wait_until
from tests.runs import Bench, result

MANY_STEPS = 100_000


@pytest.fixture
def running(bench: Bench) -> Iterator[Path]:
    """A run folder that a process trains in; the process is killed at the end."""
    run = bench.folder / "r"
    recipe = bench.file("r", adapter={}, train__max_steps=MANY_STEPS, train__save_steps=5)
    process = start(["sft", str(recipe)], bench.folder)
    try:
        wait_until(lambda: steps_of(run) > 6, process)
        yield run
        assert process.poll() is None, process.communicate()[0]
    finally:
        process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        process.communicate()


def test_a_second_process_is_refused(running: Path, bench: Bench) -> None:
    recipe = str(bench.folder / "r.yaml")
    for words in (["sft", recipe, "--overwrite"], ["sft", recipe, "--resume"], ["merge", str(running)]):
        code, output = finished(words, bench.folder)
        assert code == 2, output
        assert "another process is writing to this folder" in output
        assert "Traceback" not in output
    with pytest.raises(UsageError, match="another process"):
        api.train(bench.recipe("r"), overwrite=True)


def test_a_link_to_the_folder_is_the_folder(running: Path, bench: Bench) -> None:
    (bench.folder / "link").symlink_to(running, target_is_directory=True)
    with pytest.raises(UsageError, match="another process"):
        api.train(bench.recipe("link"), overwrite=True)


def test_a_process_that_was_killed_owns_nothing(bench: Bench) -> None:
    run = bench.folder / "r"
    process = start(["sft", str(bench.file("r", train__max_steps=MANY_STEPS, train__save_steps=5))], bench.folder)
    wait_until(lambda: steps_of(run) > 12, process)
    process.kill()
    process.communicate()
    recipe = bench.recipe("r", train__max_steps=20, train__save_steps=5)
    assert api.train(recipe, resume=True)["steps"] == 20
    assert result(run)["steps"] == 20


def test_two_merges_do_not_mix(lora_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    with owned(out, ""), pytest.raises(UsageError, match="another process"):
        api.merge(lora_run, out=out)
    assert not out.exists()
    assert api.merge(lora_run, out=out).path == out


def test_an_owner_that_fails_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), owned(tmp_path / "x", ""):
        raise ZeroDivisionError
    with owned(tmp_path / "x", ""):
        pass
