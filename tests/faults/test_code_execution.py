"""Files that would run code if they were unpickled or imported: it never runs, and the command ends with one message."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from lowvram_chat import chat, cli, merge, sft
from lowvram_chat.training import checkpoints
from tests.faults.processes import refused
from tests.runs import Bench

SETTINGS = {"train__save_steps": 4, "train__max_steps": 8, "train__save_total_limit": 9}


class Payload:
    """Unpickles to a call that creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        """Return the call."""
        return Path.touch, (self.proof,)


@pytest.fixture
def payload(tmp_path: Path) -> tuple[bytes, Path]:
    """Return a pickle, and the file that it would create."""
    proof = tmp_path / "ran"
    data = pickle.dumps(Payload(proof))
    pickle.loads(data)  # it does what it says
    proof.unlink()
    return data, proof


def test_pickled_weights_are_refused(
    bench: Bench, payload: tuple[bytes, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, proof = payload
    for name in ("pytorch_model.bin", "model.bin", "model.safetensors"):
        model = bench.folder / f"m-{name}"
        shutil.copytree(bench.model, model)
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(data)
        for command, main in (("chat", chat.main), ("sft", sft.main)):
            words = (
                [str(model), "--prompt", "a"] if command == "chat" else [str(bench.file("r", model__name=str(model)))]
            )
            refused(words, capsys, main)
    assert not proof.exists()


@pytest.mark.parametrize("target", ["weights.bin", "../weights.bin", "/weights.bin", "missing.safetensors", ""])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_names_a_pickle_is_refused(
    index: str, target: str, bench: Bench, payload: tuple[bytes, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, proof = payload
    model = bench.folder / "m"
    shutil.copytree(bench.model, model)
    (model / "model.safetensors").unlink()
    for place in (model, bench.folder):
        (place / "weights.bin").write_bytes(data)
    weights = {"transformer.wte.weight": target, "transformer.wpe.weight": target}
    (model / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
    told = refused([str(model), "--prompt", "a"], capsys, chat.main)
    assert "safetensors" in told or "index" in told, told
    assert not proof.exists()


def test_a_pickled_adapter_is_refused(
    bench: Bench, payload: tuple[bytes, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, proof = payload
    run = bench.run("a", adapter={})
    (run / "adapter" / "adapter_model.safetensors").unlink()
    (run / "adapter" / "adapter_model.bin").write_bytes(data)
    for words in (["merge", str(run)], ["chat", str(run), "--prompt", "a"], ["evaluate", str(run)]):
        refused(words, capsys, cli.main)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_does_not_run(
    name: str, bench: Bench, payload: tuple[bytes, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, proof = payload
    run = bench.run("r", **SETTINGS)
    (run / "result.json").unlink()
    checkpoint = run / "checkpoints" / "checkpoint-4"
    shutil.rmtree(run / "checkpoints" / "checkpoint-8")
    (checkpoint / name).write_bytes(data)
    checkpoints.seal(checkpoint, 4)  # whoever can change the file can change its digest
    words = [str(bench.file("r", **SETTINGS)), "--resume"]
    if name == "training_args.bin":  # nothing reads it
        assert sft.main(words) == 0
    else:
        assert name in refused(words, capsys, sft.main)
    assert not proof.exists()


def test_code_in_a_model_folder_does_not_run(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof = tmp_path / "ran"
    model = bench.folder / "m"
    shutil.copytree(bench.model, model)
    code = f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n"
    for name in ("mine.py", "modeling_gpt2.py", "tokenization_mine.py", "custom_generate/generate.py", "__init__.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(code)
    for file, changes in {
        "config.json": {"auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["mine.T", "mine.T"]}},
    }.items():
        before = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(before | changes))
    chat.main([str(model), "--prompt", "a"])
    sft.main([str(bench.file("r", model__name=str(model), train__max_steps=1))])
    merge.main([str(model)])
    assert "Traceback" not in capsys.readouterr().err
    assert not proof.exists()
