"""The command line: exit codes, one-line error messages, fast answers, and which warnings are silenced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from lowvram_chat import __version__, cli, doctor
from lowvram_chat.errors import DoesNotFit, LowVramError, OutOfMemory, ProofError, RecipeError
from lowvram_chat.files import json_text
from lowvram_chat.quiet import quiet_libraries
from tests.samples import ROOT


def test_without_words_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mergee"]) == 2
    assert "Did you mean 'merge'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"python -m lowvram_chat.{command}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["sft"], ["merge", "x", "--dtype", "int3"], ["chat", "m", "--top-p", "high"]])
def test_a_wrong_word_is_one_line_with_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (RecipeError("r: wrong."), 2),
        (LowVramError("x"), 2),
        (OutOfMemory("full"), 2),
        (ProofError("no"), 1),
        (DoesNotFit("no"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_a_sentence_and_an_exit_code(
    raised: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise raised

    assert cli.guarded(work) == code
    assert "Traceback" not in capsys.readouterr().err


def test_our_own_mistakes_keep_their_traceback() -> None:
    def work() -> int:
        raise AssertionError("ours")

    with pytest.raises(AssertionError):
        cli.guarded(work)


def test_a_missing_package_is_a_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nosuch_package", None)

    def work() -> int:
        import nosuch_package  # type: ignore[import-not-found]  # noqa: F401

        return 0

    assert cli.guarded(work) == 2
    assert "nosuch_package: this Python has no such package. Run pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "category", "message", "shown"),
    [
        ("transformers.training_args", FutureWarning, "`gradient_checkpointing` is deprecated and", False),
        ("transformers.modeling_utils", FutureWarning, "`is_gradient_checkpointing` is deprecated and", False),
        (
            "peft.tuners.lora.layer",
            UserWarning,
            "fan_in_fan_out is set to False but the target module is `Conv1D`.",
            False,
        ),
        ("transformers.training_args", FutureWarning, "`warmup_ratio` is deprecated", True),
        ("bitsandbytes.optim.optimizer", UserWarning, "Paged optimizers are not supported on CPU.", False),
        ("bitsandbytes.optim.optimizer", UserWarning, "Another warning", True),
        ("torch.nn", UserWarning, "`gradient_checkpointing` is deprecated and", True),
    ],
)
def test_only_the_listed_warnings_are_silenced(module: str, category: type[Warning], message: str, shown: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        quiet_libraries()
        warnings.warn_explicit(message, category, f"{module}.py", 1, module)
    assert bool(caught) is shown


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'torch'"), OSError("[WinError 126] c10.dll.\n")]
)
def test_doctor_continues_where_a_library_is_broken(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gpu() -> doctor.Finding:
        raise error

    monkeypatch.setattr(doctor, "CHECKS", (gpu, doctor.disk))
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"gpu           cannot be checked: {str(error).strip().rstrip('.')}\n" in printed
    assert "-> Run pip install" in printed
    assert "Disk" in printed


def test_doctor_checks_everything_and_advises(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])["findings"]
    names = [finding["name"] for finding in found]
    assert names == ["Python", "Libraries", "torch build", "GPU", "bitsandbytes", "Triton", "Hub", "Disk", "CPU"]
    assert len(found) == len(doctor.CHECKS)
    for finding in found:
        assert finding["found"]
        assert finding["good"] or finding["advice"], f"{finding['name']}: missing, without advice"
        assert any(finding["name"] in line and finding["found"] in line for line in lines)
    hub = next(finding for finding in found if finding["name"] == "Hub")
    assert "HF_HUB_OFFLINE" in hub["found"]


def quickest(words: list[str]) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Return the shortest time of three runs, and the last run, whose stderr lists the imported modules."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", *words],
            capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        seconds.append(time.perf_counter() - started)
    return min(seconds), done


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["lowvram_chat.sft", "--help"], 0),
        (["lowvram_chat.sft", "recipes/quickstart.yaml", "train.precison=fp16"], 2),
        (["lowvram_chat.sft", "recipes/nosuch.yaml"], 2),
        (["lowvram_chat.sft", "recipes/quickstart.yaml", "--print-recipe"], 0),
        (["lowvram_chat", "--help"], 0),
    ],
    ids=["help", "typo", "missing", "print", "all"],
)
def test_help_and_a_wrong_recipe_answer_in_under_a_second_without_torch(words: list[str], code: int) -> None:
    seconds, done = quickest(words)
    assert done.returncode == code
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "lowvram_chat" in imported
    assert not imported & {"torch", "transformers", "datasets", "numpy", "peft", "trl"}
    assert seconds < 1.0


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_pipe_takes_every_character_whatever_the_code_page(encoding: str, tmp_path: Path) -> None:
    text = "\u4f60\u597d \u2013 \u00e9t\u00e9 \U0001f600"
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
    file.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "lowvram_chat.preview", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode("utf-8")
    assert text in shown.splitlines()[0] + "".join(shown.splitlines()[1:-1])
    assert text in json.dumps(json.loads(shown.splitlines()[-1]), ensure_ascii=False)


def test_piped_messages_are_read_as_utf8(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lowvram_chat.chat", "builtin:tiny-gpt2", "--max-new-tokens", "2"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(
        command, input="\ufeff\u4f60\u597d?\n".encode(), capture_output=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    wrong = subprocess.run(command, input=b"caf\xe9?\n", capture_output=True, check=False, env=environment)
    assert wrong.returncode == 2
    assert b"stdin: is not UTF-8" in wrong.stderr


def test_json_has_no_nan() -> None:
    assert json_text({"a": [float("nan"), 1.5], "b": {"c": float("inf")}}) == '{"a": [null, 1.5], "b": {"c": null}}'
