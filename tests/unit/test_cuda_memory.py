"""What the planner knows of CUDA beyond the tensors of a step, each found by holding a plan against torch's allocator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowvram_chat.planning.allocator import LARGE_SEGMENT_BYTES
from lowvram_chat.planning.prediction import card_rules, longest_rows_run
from lowvram_chat.planning.replay import replay
from lowvram_chat.planning.runs import traced_steps
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.tracing.cuda_rules import CUBLASLT_WORKSPACE_BYTES, CudaRules
from lowvram_chat.tracing.recorder import Event, TraceRecorder

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny_recipe() -> Recipe:
    """A LoRA recipe of the built-in model."""
    return load_recipe(ROOT / "recipes" / "quickstart.yaml", ["train.gradient_accumulation_steps=2"])


def trace(step: Callable[[], object], rules: CudaRules | None = None) -> list[Event]:
    """Return the events of a step on a CUDA device."""
    with TraceRecorder(rules or CudaRules()) as recorder:
        step()
    return recorder.events


def temporaries(events: list[Event]) -> list[int]:
    """Return the sizes of the buffers inside kernels."""
    return [storage.nbytes for storage, is_new in events if is_new and storage.category == "temporaries"]


@pytest.mark.parametrize(
    ("shape", "dimensions", "sizes"),
    [
        ((2048, 1024), [0], [12582912, 32]),
        ((2048, 256), [0], [4194304, 8]),
        ((300, 1024), [0], []),
        ((2048, 1024), [1], []),
    ],
)
def test_a_sum_over_many_rows_is_shared_by_blocks_of_threads(
    shape: tuple[int, int], dimensions: list[int], sizes: list[int]
) -> None:
    # As torch 2.14.1 allocates them on a card with 16 multiprocessors and compute capability 8.6.
    events = trace(lambda: torch.empty(shape, dtype=torch.float16).sum(dimensions))
    assert temporaries(events) == sizes


def test_a_norm_of_a_transposed_matrix_is_shared_as_the_matrix_lies_in_memory() -> None:
    """DoRA takes the norms of the rows of GPT-2's transposed weights."""
    events = trace(lambda: torch.linalg.norm(torch.empty(3072, 768).t(), dim=1))
    assert 12582912 in temporaries(events)


def test_a_product_with_a_bias_takes_a_workspace_only_where_cublaslt_has_its_own() -> None:
    def product() -> None:
        torch.addmm(torch.empty(8), torch.empty(8, 8), torch.empty(8, 8))

    assert temporaries(trace(product)) == []
    shared = CudaRules(cublaslt_workspace_bytes=CUBLASLT_WORKSPACE_BYTES)
    assert temporaries(trace(product, shared)) == [CUBLASLT_WORKSPACE_BYTES]


def test_the_gradient_of_selected_rows_is_added_to_zeros_in_place() -> None:
    def step() -> None:
        states = torch.empty(1 << 10, 1 << 8, requires_grad=True)
        states.index_select(0, torch.arange(1 << 9)).sum().backward()

    whole = [storage for storage, is_new in trace(step) if is_new and storage.nbytes == MIB]
    assert len(whole) == 2  # the states and their gradient


def test_the_gradient_of_a_softmax_needs_a_product_of_its_size() -> None:
    events = trace(lambda: torch.empty(256, 1024, requires_grad=True).softmax(1).sum().backward())
    assert MIB in temporaries(events)


def test_a_library_that_asks_for_cuda_s_autocast_is_told_of_the_traced_device_s() -> None:
    found: list[bool] = []

    def step() -> None:
        found.append(torch.is_autocast_enabled())
        with torch.autocast("cpu", dtype=torch.float16):
            found.append(torch.is_autocast_enabled())

    trace(step)
    assert found == [False, True]


def test_a_released_cache_leaves_only_the_segments_in_use() -> None:
    def step(recorder: TraceRecorder) -> None:
        kept = torch.empty(MIB)
        torch.empty(5 * MIB)
        recorder.record_cache_release()
        more = torch.empty(8 * MIB)
        del kept, more

    with TraceRecorder(CudaRules()) as recorder:
        step(recorder)
    assert LARGE_SEGMENT_BYTES == 20 * MIB
    assert replay(recorder.events).peak_reserved_bytes == (20 + 32) * MIB  # without the release: 20 + 20 + 32


def test_the_run_of_the_longest_rows_has_no_shorter_ones(tiny_recipe: Recipe) -> None:
    longest = tiny_recipe.data.max_length
    first, second, *_ = traced_steps(tiny_recipe)
    assert {shape.length for shape in first + second} == {longest}
    rows = tiny_recipe.train.per_device_train_batch_size
    batches = [s.nbytes for s, is_new in longest_rows_run(tiny_recipe) if is_new and s.category == "batch"]
    assert max(batches) == 8 * rows * longest
    assert card_rules(tiny_recipe).cublaslt_workspace_bytes == 0


def test_the_checks_before_a_run_leave_the_workspaces_and_release_the_cache(tiny_recipe: Recipe) -> None:
    events = longest_rows_run(tiny_recipe)
    checks = [storage for storage, _ in events if storage.phase == "checks"]
    assert sum(storage.category == "workspace" for storage in checks) == 2
    releases = [i for i, (storage, is_new) in enumerate(events) if is_new and storage.category == "cache release"]
    first_batch = next(i for i, (storage, _) in enumerate(events) if storage.phase == "backward")
    assert len(releases) == 3
    assert sum(place < first_batch for place in releases) == 2  # after each check; the third before the first step
