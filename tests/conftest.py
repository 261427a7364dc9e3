"""The tests' surroundings: no hub, caches of their own, quiet libraries; the tiny model and the tools around it."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# The libraries read these when they are imported, so they come before every other import.
CACHES = Path(tempfile.mkdtemp(prefix="lowvram-chat-tests-"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(CACHES / "hf")
os.environ["LOWVRAM_CHAT_CACHE"] = str(CACHES / "rows")
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(name, None)
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DATASETS_VERBOSITY"] = "error"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

import pytest  # noqa: E402

from tests.runs import Bench  # noqa: E402
from tests.samples import conversations, save_tiny_gpt2, write_jsonl  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LONG_FILES = ("test_notebook", "test_equivalence", "test_invariance", "test_processes", "test_bench", "test_witness")
"""Files whose tests take a minute or more together, or whose single test does."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the Python of an environment with an older transformers."""
    parser.addoption("--older", metavar="PYTHON", help="a Python with transformers 4.57 (make test-older)")


def pytest_unconfigure() -> None:
    """Remove the caches of this session."""
    shutil.rmtree(CACHES, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files that take longest first, and skip what this machine cannot do, and say why."""
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)  # so that no worker is left alone with one of them
    asked = str(config.getoption("-m"))
    for item in items:
        if "network" in item.keywords and "network" not in asked:
            item.add_marker(pytest.mark.skip(reason="reaches the Hugging Face hub: run pytest -m network"))
        if "architectures" in item.keywords and "architectures" not in asked:
            item.add_marker(pytest.mark.skip(reason="one of many model families: make architectures"))
        if "older" in item.keywords and not config.getoption("--older"):
            item.add_marker(pytest.mark.skip(reason="needs transformers 4.57: make test-older"))
        if "browser" in item.keywords and not _has_browser():
            item.add_marker(pytest.mark.skip(reason="needs Chromium: apt-get install chromium"))
        if "gpu" in item.keywords and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA graphics card"))


def _has_browser() -> bool:
    return any(map(shutil.which, ("chromium", "google-chrome", "chrome")))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Take away the handler that a command gives the package, since it holds on to this test's stderr."""
    yield
    package = logging.getLogger("lowvram_chat")
    package.handlers.clear()
    package.propagate = True


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Refuse a command that leaves a variable behind that switches torch.compile off, for a later run of this process."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    yield
    assert os.environ.get("TORCHDYNAMO_DISABLE") == before


@pytest.fixture(scope="session")
def libraries() -> None:
    """Import the libraries once and take them out of the garbage collector's work: each run would walk them (0.4 s)."""
    import lowvram_chat.training.trainer  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, libraries: None) -> Path:
    """A random GPT-2 of 2 layers x 64 with 256 positions and the built-in tokenizer, without dropout."""
    return save_tiny_gpt2(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training conversations of widely different lengths."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", conversations(64, seed=1))


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 held-out conversations."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "held_out.jsonl", conversations(16, seed=2))


@pytest.fixture
def bench(tmp_path: Path, tiny: Path, train_file: Path, held_out_file: Path) -> Bench:
    """Where a test makes recipes and runs them."""
    return Bench(tmp_path, tiny, train_file, held_out_file)


@pytest.fixture(scope="session")
def session_bench(tmp_path_factory: pytest.TempPathFactory, tiny: Path, train_file: Path, held_out_file: Path) -> Bench:
    """The same for runs that several tests look at and none changes."""
    return Bench(tmp_path_factory.mktemp("runs"), tiny, train_file, held_out_file)


@pytest.fixture(scope="session")
def full_run(session_bench: Bench) -> Path:
    """A finished full fine-tune with checkpoints at steps 5, 10 and 12."""
    return session_bench.run("full", train__save_steps=5, train__eval_steps=5)


@pytest.fixture(scope="session")
def lora_run(session_bench: Bench) -> Path:
    """A finished LoRA run."""
    return session_bench.run("lora", adapter={"kind": "lora", "r": 8, "alpha": 16}, train__learning_rate=2e-2)


@pytest.fixture
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    """The built-in tokenizer with the plain chat template."""
    from lowvram_chat.data.template import set_template
    from lowvram_chat.model.pretrained import load_tokenizer

    loaded = load_tokenizer(str(tiny))
    set_template(loaded, "plain", "assistant")
    return loaded
