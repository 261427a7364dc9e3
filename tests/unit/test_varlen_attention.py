"""Packed rows on a card: attention by document is attention under a mask, planned as it runs, and replaced where it is wrong.

The kernel itself runs on cards only, where the self-test compares it with the mask. Here it is emulated, document by document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedModel

from lowvram_chat import api
from lowvram_chat.data import rows as rows_module
from lowvram_chat.data.packing import documents_at_once
from lowvram_chat.data.rows import Collator
from lowvram_chat.errors import ModelError, SubstitutionError
from lowvram_chat.model import flash_attention
from lowvram_chat.model import varlen_attention as varlen_module
from lowvram_chat.model.document_attention import attention_implementation
from lowvram_chat.model.document_mask import use_attention_by_document
from lowvram_chat.model.isolation import isolate_documents
from lowvram_chat.model.loss import attach_loss
from lowvram_chat.model.varlen_attention import VARLEN_ATTENTION, varlen_attention
from lowvram_chat.planning import plan as plan_module
from lowvram_chat.planning import prediction
from lowvram_chat.planning.plan import Plan
from lowvram_chat.planning.prediction import card_rules, make_plan
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.selftest import exactness
from lowvram_chat.training import model_setup
from tests.runs import Bench, curve
from tests.unit.test_packing import llama, small

CPU = torch.device("cpu")


def emulated(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, ends_of_keys: torch.Tensor,
    longest: int, longest_key: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """`varlen_attn` of tokens (T, H, D) as it is documented: one SDPA for each document."""
    assert window_size == (-1, 0) and ends.dtype == torch.int32 and ends is ends_of_keys
    lengths = ends.diff().tolist()
    assert sum(lengths) == len(query) and max(lengths) <= longest == longest_key
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([causal(*part, scale, enable_gqa) for part in parts])


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, grouped: bool
) -> torch.Tensor:
    """Causal attention (T, H, D) of the tokens of one document."""
    q, k, v = (heads.transpose(0, 1)[None] for heads in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)[0].transpose(0, 1)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Emulate the kernel, and yield the number of documents of each of its calls."""
    calls: list[int] = []

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(args[3]) - 1)
        return emulated(*args, **kwargs)

    monkeypatch.setattr(varlen_module, "varlen_attn", recorded)
    yield calls


def packed_batch(documents: list[list[int]]) -> dict[str, Any]:
    """Return a batch of packed rows of documents of these lengths, as the collator makes it."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for lengths in documents:
        ids = torch.randint(1, 50, (sum(lengths),), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]], "documents": lengths})
    batch = Collator(0, length=max(map(sum, documents)))(rows)
    batch.pop("real_tokens")
    return batch


FEW, MANY = [[7, 1, 8], [16], [10, 5]], [[1] * 16, [2] * 8, [3] * 5]


@pytest.mark.parametrize("documents", [FEW, MANY], ids=["at once", "in groups"])
@pytest.mark.parametrize("make", [small, llama])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_by_document_on_a_card_is_attention_under_a_mask(
    make: Callable[[], PreTrainedModel], documents: list[list[int]], precision: str, kernel: list[int]
) -> None:
    batch = packed_batch(documents)
    losses, gradients = [], []
    for by_document in (True, False):
        model = make().eval()
        attach_loss(model)
        if by_document:
            assert use_attention_by_document(model, VARLEN_ATTENTION)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    loose = precision == "bf16"
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if loose else 1e-6)
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None
        assert float((a - b).norm()) <= (5e-2 if loose else 1e-5) * float(b.norm()) + 1e-6
    layers = len(model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers)
    assert kernel == layers * ([7] if documents is FEW else [8, 8, 8, 6])  # the padding of a row is a document


def test_the_collator_groups_the_documents() -> None:
    ((tokens, ends),) = packed_batch(FEW)["document_groups"]
    assert (tokens, ends.tolist()) == (48, [0, 7, 8, 16, 32, 42, 47, 48])
    groups = packed_batch(MANY)["document_groups"]
    assert [tokens for tokens, _ in groups] == [8, 8, 16, 16]  # at most 8 documents each
    assert groups[2][1].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16]


@pytest.mark.parametrize(("rows", "length"), [(1, 1024), (4, 1024), (8, 128), (2, 16)])
def test_no_group_has_larger_buffers_than_planned(rows: int, length: int) -> None:
    positions = torch.arange(length).remainder(3).repeat(rows, 1)
    at_once = documents_at_once(rows, length)
    for tokens, ends in rows_module._document_groups(positions):
        assert tokens + 128 * (len(ends) - 1) <= rows * length + 128 * at_once


GPT2, LLAMA = GPT2Config(attn_pdrop=0.0), LlamaConfig()
REASONS: dict[str, tuple[PreTrainedConfig, dict[str, Any], tuple[int, int], str]] = {
    "applies": (GPT2, {}, (8, 6), ""),
    "applies to heads that share keys": (LLAMA, {}, (12, 0), ""),
    "off": (GPT2, {"model": {"document_attention": False}}, (8, 6), "model.document_attention is false"),
    "another attention": (GPT2, {"model": {"attention": "eager"}}, (8, 6), "model.attention is eager"),
    "compiled": (GPT2, {"train": {"compile": "if_possible"}}, (8, 6), "batches of one shape"),
    "fp32": (GPT2, {"train": {"precision": "fp32"}}, (8, 6), "train.precision is fp32"),
    "Turing": (GPT2, {}, (7, 5), "compute capability 7.5"),
    "dropout": (GPT2Config(), {}, (8, 6), "attn_pdrop is not 0"),
    "odd heads": (GPT2Config(n_embd=60, n_head=5, attn_pdrop=0.0), {}, (8, 6), "heads are 12 wide"),
    "windows": (MistralConfig(sliding_window=12), {}, (8, 6), "plain causal attention"),
}


@pytest.mark.parametrize("name", REASONS)
def test_where_a_card_keeps_the_mask(name: str) -> None:
    config, changes, capability, reason = REASONS[name]
    recipe = Recipe.model_validate({"train": {"precision": "fp16"} | changes.pop("train", {}), **changes})
    found = flash_attention.why_no_varlen(recipe, config, capability, has_flash=True)
    assert (reason in found) if reason and found else (found or "") == reason


def test_windows_keeps_the_mask() -> None:
    recipe = Recipe.model_validate({"train": {"precision": "fp16"}})
    assert "without FlashAttention, as on Windows" in str(
        flash_attention.why_no_varlen(recipe, GPT2, (8, 6), has_flash=False)
    )
    assert flash_attention.is_built("linux")
    assert not flash_attention.is_built("windows")


def test_dropout_is_not_left_out_in_silence() -> None:
    heads = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ModelError, match=r"Set model\.dropout=0\.0"):
        varlen_attention(
            torch.nn.Module(), heads, heads, heads, None, ((4, torch.tensor([0, 4], dtype=torch.int32)),), dropout=0.1
        )


def leaking(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Attention over the whole row."""
    return causal(query, key, value, None, False)


def missing(*_: Any, **__: Any) -> torch.Tensor:
    """A build of torch without the kernel."""
    raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.")


def test_a_right_kernel_passes_the_check(kernel: list[int]) -> None:
    model = small()
    isolate_documents(model, CPU, "bf16", "cuda")
    assert attention_implementation(model.config) == VARLEN_ATTENTION
    assert kernel


@pytest.mark.parametrize(
    ("broken", "reason"), [(leaking, "other states than alone"), (missing, "USE_FLASH_ATTENTION was not enabled")]
)
def test_a_run_goes_on_under_a_mask_where_the_kernel_is_wrong(
    broken: Callable[..., torch.Tensor],
    reason: str,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = bench.run("masked", data__rows="packed", model__document_attention=False, train__max_steps=3)
    monkeypatch.setattr(varlen_module, "varlen_attn", broken)
    monkeypatch.setattr(model_setup, "_attention_by_document", as_on_a_card)
    with pytest.raises(SubstitutionError):
        isolate_documents(small(), CPU, "fp32", "cuda")
    run = bench.run("r", data__rows="packed", train__max_steps=3)
    assert curve(run) == curve(expected)
    assert reason in caplog.text
    assert "continuing with a document mask" in caplog.text


def as_on_a_card(recipe: Recipe, *_: Any, **__: Any) -> str | None:
    """Choose attention by document as on a card, if it is wanted."""
    return "cuda" if recipe.model.document_attention else None


def test_a_run_with_it_has_the_losses_of_one_under_a_mask(
    bench: Bench, kernel: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bench.run("masked", data__rows="packed", model__document_attention=False, train__max_steps=8)
    monkeypatch.setattr(model_setup, "_attention_by_document", as_on_a_card)
    run = bench.run("r", data__rows="packed", train__max_steps=8)
    assert curve(run) == pytest.approx(curve(expected), rel=1e-5)
    assert len(kernel) > 2 * 8


def planned(**changes: Any) -> Recipe:
    """Return a packed fp16 recipe of GPT-2 small."""
    return api.load_recipe("recipes/full_fp16.yaml", "data.rows=packed", *(f"{k}={v}" for k, v in changes.items()))


def test_the_plan_has_no_mask_on_a_card_of_compute_capability_8() -> None:
    with_mask = make_plan(planned(**{"model.document_attention": False}))
    without = make_plan(planned())
    names = {operation.name for part in without.work for operation in part}
    assert "torch_attn._varlen_attn_backward.default" in names
    assert not any("efficient_attention" in name for name in names)
    assert without.peak_allocated_bytes < with_mask.peak_allocated_bytes - 50 * 2**20  # a mask for each layer
    assert without.peak_reserved_bytes <= with_mask.peak_reserved_bytes


def kernels(plan: Plan) -> set[str]:
    """Return the attention kernels of a plan's step."""
    names = {operation.name for part in plan.work for operation in part}
    return {name for name in names if "attention" in name or "attn" in name}


@pytest.mark.parametrize("compiled", ["true", "if_possible"])
def test_the_plan_of_a_compiled_run_has_the_mask(compiled: str) -> None:
    with_mask = make_plan(planned(**{"model.document_attention": False}))
    plan = make_plan(planned(**{"train.compile": compiled}))
    assert plan.peak_reserved_bytes == with_mask.peak_reserved_bytes
    assert all("efficient_attention" in name for name in kernels(plan))


def test_a_plan_for_windows_has_the_kernels_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    with_mask = make_plan(planned(**{"model.document_attention": False}))
    packed = make_plan(planned())
    assert packed.reserved_on == {"linux": packed.peak_reserved_bytes, "windows": with_mask.peak_reserved_bytes}
    assert packed.on_card_bytes_on("windows") > packed.on_card_bytes_on("linux")

    padded = make_plan(planned(**{"data.rows": "padded"}))
    assert padded.reserved_on["windows"] == padded.reserved_on["linux"] == padded.peak_reserved_bytes
    assert all("flash_attention" in name for name in kernels(padded))
    prediction._cached_plan.cache_clear()
    prediction._cached_trace.cache_clear()
    for module in (flash_attention, prediction, plan_module):
        monkeypatch.setattr(module, "this_system", lambda: "windows")
    there = make_plan(planned(**{"data.rows": "padded"}))
    assert there.peak_reserved_bytes == padded.peak_reserved_bytes
    assert all("efficient_attention" in name for name in kernels(there))
    prediction._cached_plan.cache_clear()
    prediction._cached_trace.cache_clear()


def test_the_plan_for_an_older_card_keeps_the_mask() -> None:
    recipe = planned(**{"memory.gpu": "t4-16gb"})
    assert not card_rules(recipe).has_varlen_attention(recipe, GPT2)
    names = {operation.name for part in make_plan(recipe).work for operation in part}
    assert any("efficient_attention" in name for name in names)


def test_the_selftest_compares_it_with_the_mask(kernel: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert exactness._packed_difference(CPU, VARLEN_ATTENTION, "bf16", exactness.PACKED_DOCUMENTS[1]) < 5e-2
    assert set(kernel) == {8, 4}  # 60 documents in groups of 8
    monkeypatch.setattr(varlen_module, "varlen_attn", leaking)
    assert exactness._packed_difference(CPU, VARLEN_ATTENTION, "bf16", exactness.PACKED_DOCUMENTS[0]) > 0.1
