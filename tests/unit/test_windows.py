"""What Windows does otherwise, emulated: files that other programs hold, spawned workers, line ends, and names it lacks."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowvram_chat.errors import UsageError
from lowvram_chat.files import replace_folder, write_text
from lowvram_chat.model import device as device_module
from lowvram_chat.model.device import default_workers
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.training import spill
from lowvram_chat.units import MIB
from tests.runs import Bench, curve
from tests.samples import ROOT

MISSING_ON_WINDOWS = {
    "os": {
        *("fork", "forkpty", "wait4", "wait3", "killpg", "setsid", "getuid", "geteuid", "getpgid", "setpgid", "uname"),
        *("mkfifo", "sched_getaffinity", "sysconf", "getloadavg", "statvfs", "chown", "nice", "posix_fadvise"),
    },
    "signal": {"SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGSTOP", "SIGCONT", "alarm", "setitimer"},
}
"""Module -> attributes that it lacks there."""
MODULES_MISSING_ON_WINDOWS = {"fcntl", "grp", "pwd", "pty", "resource", "termios", "tty"}
GUARDS = ("hasattr", "sys.platform", "os.name", "platform.system", "ImportError", "AttributeError")
"""What a function that uses such a name anyway must look at."""


def winerror(number: int) -> PermissionError:
    """Return the error of Windows for a file that another program has open."""
    error = PermissionError(13, "The process cannot access the file because it is being used by another process")
    error.winerror = number  # type: ignore[attr-defined, unused-ignore]
    return error


def hold(monkeypatch: pytest.MonkeyPatch, name: str, times: int, *, held: Callable[[Path], bool]) -> list[float]:
    """Let `Path.name` of held paths fail so many times, and return the waits."""
    original, left = getattr(Path, name), [times]
    waits: list[float] = []

    def move(self: Path, target: Path) -> Path:
        if held(self) and left[0] > 0:
            left[0] -= 1
            raise winerror(32)
        moved: Path = original(self, target)
        return moved

    monkeypatch.setattr(Path, name, move)
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


def test_a_file_that_a_scanner_holds_for_a_moment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = hold(monkeypatch, "replace", 3, held=lambda path: path.name.endswith(".partial"))
    write_text(tmp_path / "result.json", "{}\n")
    assert (tmp_path / "result.json").read_text() == "{}\n"
    assert len(waits) == 3


def test_a_file_that_stays_held_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "result.json", "earlier\n")
    hold(monkeypatch, "replace", 99, held=lambda path: path.name.endswith(".partial"))
    with pytest.raises(PermissionError):
        write_text(tmp_path / "result.json", "{}\n")
    assert (tmp_path / "result.json").read_text() == "earlier\n"


def test_a_lack_of_permission_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = hold(monkeypatch, "replace", 0, held=lambda _: False)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(PermissionError):
        write_text(tmp_path / "result.json", "{}\n")
    assert not waits


@pytest.mark.parametrize("held", ["earlier", "new"])
def test_a_folder_that_another_program_holds_loses_nothing(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, target = tmp_path / "m.partial", tmp_path / "m"
    for folder, text in ((new, "new"), (target, "earlier")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    hold(monkeypatch, "rename", 99, held=lambda path: path == (target if held == "earlier" else new))
    with pytest.raises(UsageError, match="Close the programs that use it") as caught:
        replace_folder(new, target)
    assert "m.partial" in str(caught.value)
    assert (target / "config.json").read_text() == "earlier"
    assert (new / "config.json").read_text() == "new"


@pytest.mark.parametrize(("gib", "workers"), [(8, 0), (16, 1)])
def test_windows_gets_few_workers_and_is_told_why(
    gib: int, workers: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = SimpleNamespace(total=gib << 30)
    monkeypatch.setattr(device_module, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    caplog.set_level("INFO")
    assert default_workers(cuda=True) == workers
    assert "import torch again" in caplog.text


@pytest.mark.parametrize(
    ("rates", "free_mib", "warned"),
    [
        ([50, 1000, 1010, 990, 1000, 100], 20, True),
        ([50, 1000, 1010, 990, 1000, 100], 900, False),  # slow for another reason, such as a laptop that got hot
        ([50, 1000, 1010, 990, 1000, 700], 20, False),
        ([50, 1000, 100], 20, False),  # too early to say
    ],
)
def test_a_run_that_spills_into_the_main_memory_is_told_once(
    rates: list[float],
    free_mib: int,
    warned: bool,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(spill, "can_spill", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free_mib * MIB, 4096 * MIB))
    watch = spill.SpillWatch()
    for rate in [*rates, rates[-1]]:
        spill.look_for_spill(watch, rate)
    assert caplog.text.count("CUDA - Sysmem Fallback Policy") == warned


def test_linux_itself_does_not_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr("platform.release", lambda: "6.8.0-generic")
    assert not spill.can_spill()
    monkeypatch.setattr("platform.release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    assert spill.can_spill()
    monkeypatch.setattr(spill, "sys", SimpleNamespace(platform="win32"))
    assert spill.can_spill()


def test_elsewhere_two_workers_prepare_batches_on_cuda() -> None:
    assert default_workers(cuda=False) == 0
    if sys.platform != "win32":
        assert default_workers(cuda=True) == 2


def test_spawned_workers_prepare_the_same_batches(bench: Bench) -> None:
    expected = curve(bench.run("own", train__max_steps=3))
    file = bench.file("spawned", train__max_steps=3, train__dataloader_num_workers=1)
    script = bench.folder / "run.py"
    script.write_text(
        "import multiprocessing\n"
        "from lowvram_chat import sft\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        f"    raise SystemExit(sft.main([{str(file)!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert curve(bench.folder / "spawned") == pytest.approx(expected, rel=1e-5)


def test_recipes_and_data_with_windows_line_ends_are_the_same(bench: Bench) -> None:
    file = bench.file("r", train__max_steps=2)
    plain, expected = load_recipe(file), curve(bench.run("r", train__max_steps=2))
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert load_recipe(file) == plain
    data = bench.folder / "crlf.jsonl"
    data.write_bytes(bench.train_file.read_bytes().replace(b"\n", b"\r\n"))
    tree = {"source": str(data), "eval_source": str(bench.held_out_file), "max_length": 64}
    assert curve(bench.run("crlf", train__max_steps=2, data=tree)) == expected


def test_nothing_that_windows_lacks_is_used_unguarded() -> None:
    found = []
    for folder in ("lowvram_chat", "benchmarks", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            found += [f"{path.relative_to(ROOT)}: {name}" for name in missing_names(text)]
    assert not found


def missing_names(text: str) -> Iterator[str]:
    """Yield the names that Windows lacks, outside functions that look at the system or catch what is missing."""
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.attr if node.attr in MISSING_ON_WINDOWS.get(node.value.id, ()) else None
        elif isinstance(node, ast.Import):
            name = next((alias.name for alias in node.names if alias.name in MODULES_MISSING_ON_WINDOWS), None)
        if name is None:
            continue
        line = int(vars(node)["lineno"])
        around = [one for one in functions if one.lineno <= line <= (one.end_lineno or 0)]
        source = "".join(ast.get_source_segment(text, one) or "" for one in around)
        if not any(guard in source for guard in GUARDS):
            yield name


def test_the_check_for_missing_names_finds_one() -> None:
    assert list(missing_names("import os, resource\n\ndef f():\n    os.fork()\n")) == ["resource", "fork"]
    assert not list(
        missing_names("def f():\n    try:\n        import resource\n    except ImportError:\n        pass\n")
    )
