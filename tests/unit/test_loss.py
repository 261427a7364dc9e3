"""The fused loss equals transformers' loss and gradients: in tiles, with a frozen head, with a bias, and with no labels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from lowvram_chat.data.rows import Collator
from lowvram_chat.model import loss as loss_module
from lowvram_chat.model import tiled_cross_entropy
from lowvram_chat.model.loss import attach_loss

ROWS = [(37, 12), (20, 3), (5, 2), (2, 1)]
"""(number of tokens, how many of the last ones are labelled) of each row."""


def batch(vocabulary: int, rows: list[tuple[int, int]] = ROWS) -> dict[str, Any]:
    """Return a padded batch as the collator makes it."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length, labelled in rows:
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (length - labelled) + ids[length - labelled :]})
    collated = Collator(0)(examples)
    collated.pop("real_tokens")
    return collated


def ours_and_theirs(
    model: PreTrainedModel, inputs: dict[str, Any], *, bf16: bool = False
) -> tuple[tuple[float, PreTrainedModel], tuple[float, PreTrainedModel]]:
    """Return (loss, model with gradients) by our loss and by transformers' own, both summed over labelled tokens."""
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    attach_loss(ours)
    labelled = inputs["loss_positions"].numel()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        our_loss = ours(**inputs)["loss"]
        reference = theirs(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss * labelled
    our_loss.backward()
    reference.backward()
    return (our_loss.item(), ours), (reference.item(), theirs)


def worst_gradient(ours: PreTrainedModel, theirs: PreTrainedModel) -> float:
    """Return the largest difference of any gradient, relative to the largest value of that gradient."""
    worst = 0.0
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            worst = max(worst, ((a.grad - b.grad).abs().max() / b.grad.abs().max().clamp_min(1e-8)).item())
    return worst


@pytest.fixture
def model(tiny: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny)
    return loaded


def test_loss_and_gradients_are_those_of_transformers(model: PreTrainedModel) -> None:
    (our_loss, ours), (reference, theirs) = ours_and_theirs(model, batch(8192))
    assert our_loss == pytest.approx(reference, rel=1e-6)
    assert worst_gradient(ours, theirs) < 1e-5


@pytest.mark.parametrize("tile", [1, 7, 18])
def test_tiles_change_nothing(model: PreTrainedModel, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CUDA_TILING", tiled_cross_entropy.Tiling(tile))
    (our_loss, ours), (reference, theirs) = ours_and_theirs(model, batch(8192))
    assert our_loss == pytest.approx(reference, rel=1e-6)
    assert worst_gradient(ours, theirs) < 1e-5


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_get_the_right_one(model: PreTrainedModel) -> None:
    model.get_output_embeddings().weight.requires_grad_(False)
    (our_loss, ours), (reference, theirs) = ours_and_theirs(model, batch(8192))
    assert ours.get_output_embeddings().weight.grad is None
    assert our_loss == pytest.approx(reference, rel=1e-6)
    assert worst_gradient(ours, theirs) < 1e-5


def test_only_the_head_can_be_trained() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=1, tie_word_embeddings=False))
    model.eval()
    for parameter in model.transformer.parameters():
        parameter.requires_grad_(False)
    (our_loss, ours), (reference, theirs) = ours_and_theirs(model, batch(300))
    assert our_loss == pytest.approx(reference, rel=1e-6)
    assert worst_gradient(ours, theirs) < 1e-5


def test_the_loss_of_a_head_with_a_bias_is_right() -> None:
    torch.manual_seed(0)
    config = PhiConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    (our_loss, ours), (reference, theirs) = ours_and_theirs(model, batch(300))
    assert ours.lm_head.bias.grad is not None
    assert our_loss == pytest.approx(reference, rel=1e-6)
    assert worst_gradient(ours, theirs) < 1e-5


def test_under_bf16_autocast_the_error_is_that_of_bf16(model: PreTrainedModel) -> None:
    # Measured loss: 161.0196 in fp32, 161.0185 in bf16 (ours and transformers'). Both gradients are off by 0.0075.
    inputs = batch(8192)
    (exact, _), (_, exact_model) = ours_and_theirs(model, inputs)
    (our_loss, ours), (reference, theirs) = ours_and_theirs(model, inputs, bf16=True)
    assert abs(our_loss - exact) <= max(2 * abs(reference - exact), 1e-4 * exact)
    assert worst_gradient(ours, exact_model) <= max(2 * worst_gradient(theirs, exact_model), 0.02)


def test_upstream_gradients_scale_ours(model: PreTrainedModel) -> None:
    inputs = batch(8192)
    whole, third = copy.deepcopy(model), copy.deepcopy(model)
    attach_loss(whole)
    attach_loss(third)
    whole(**inputs)["loss"].backward()
    (third(**inputs)["loss"] / 3).backward()
    for parameter in whole.parameters():
        assert parameter.grad is not None
        parameter.grad /= 3
    assert worst_gradient(third, whole) < 1e-5


def test_a_batch_without_labels_has_no_loss_and_finite_gradients(model: PreTrainedModel) -> None:
    attach_loss(model)
    loss = model(**batch(8192, [(9, 0), (4, 0)]))["loss"]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_does_not_change_the_loss(model: PreTrainedModel) -> None:
    attach_loss(model)
    together = model(**batch(8192))["loss"].item()
    alone = 0.0
    inputs = batch(8192)
    for number, (length, _) in enumerate(ROWS):
        row = {"input_ids": inputs["input_ids"][number, :length], "labels": inputs["labels"][number, :length]}
        collated = Collator(0)([row])
        collated.pop("real_tokens")
        alone += model(**collated)["loss"].item()
    assert together == pytest.approx(alone, rel=1e-5)


def test_calls_without_loss_positions_do_not_change(model: PreTrainedModel) -> None:
    plain = copy.deepcopy(model)
    attach_loss(model)
    ids = batch(8192)["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_summed_loss_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 4, 8, generator=generator)
    head = torch.nn.Linear(8, 11, bias=False)
    labels = torch.tensor([[-100, 3, -100, 7], [-100, -100, 1, -100]])
    positions = labels.flatten().ne(-100).nonzero().flatten() - 1
    our_loss = loss_module.summed_loss(hidden, head, labels, positions)
    logits = head(hidden)[:, :-1].reshape(-1, 11)
    assert our_loss.item() == pytest.approx(
        F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum").item(), rel=1e-6
    )


def test_a_padded_vocabulary_gives_the_same_loss_within_the_error_of_bf16() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=301, n_embd=32, n_layer=1, n_head=2)).eval()
    losses, gradients = [], []
    for padded in (False, True):
        scored = copy.deepcopy(model)
        attach_loss(scored, pad_vocabulary=padded)
        with torch.autocast("cpu", torch.bfloat16):
            loss = scored(**batch(301))["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(scored.transformer.wte.weight.grad)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # bf16 has 8 bits: 4e-3 per product; measured 0 to 2e-5
    assert gradients[1].shape == gradients[0].shape
    assert (gradients[1] - gradients[0]).abs().max() <= 0.01 * gradients[0].abs().max()


@pytest.mark.parametrize(("size", "padded"), [(50257, 50304), (49152, 49152)])
def test_the_head_is_padded_with_zero_rows_to_a_multiple_of_64(size: int, padded: int) -> None:
    weight = torch.ones(size, 2)
    for dtype, tiling in (
        (torch.bfloat16, tiled_cross_entropy.CUDA_TILING),
        (torch.float32, tiled_cross_entropy.CPU_TILING),
    ):
        head = tiled_cross_entropy._padded_head(weight, dtype, tiled_cross_entropy._padded_size(weight, dtype, tiling))
        assert head.shape == (padded, 2)
        assert head.float().sum() == 2 * size
    frozen = weight.half()  # as under an adapter
    assert tiled_cross_entropy._padded_size(frozen, torch.float16, tiled_cross_entropy.CUDA_TILING) == padded
    # On a GPU, fp32 products use the weights themselves.
    rows = tiled_cross_entropy._padded_size(weight, torch.float32, tiled_cross_entropy.CUDA_TILING)
    assert tiled_cross_entropy._padded_head(weight, torch.float32, rows) is weight


@pytest.mark.parametrize("on_cpu", [False, True])
def test_padding_in_fp32_computes_the_same_function(on_cpu: bool, model: PreTrainedModel) -> None:
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(8201)  # not a multiple of 64
    plain = copy.deepcopy(padded)
    attach_loss(padded, on_cpu=on_cpu)
    attach_loss(plain, pad_vocabulary=False)
    padded_loss, plain_loss = padded(**batch(301))["loss"], plain(**batch(301))["loss"]
    padded_loss.backward()
    plain_loss.backward()
    assert padded_loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    ours, theirs = (scored.get_parameter("transformer.wte.weight").grad for scored in (padded, plain))
    assert ours is not None
    assert theirs is not None
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_unfused_loss_is_summed_too(model: PreTrainedModel) -> None:
    fused, unfused = copy.deepcopy(model), copy.deepcopy(model)
    attach_loss(fused)
    attach_loss(unfused, fused=False)
    inputs = batch(8192)
    assert unfused(**inputs)["loss"].item() == pytest.approx(fused(**inputs)["loss"].item(), rel=1e-6)


def test_the_gradient_of_a_tile_is_softmax_minus_one_hot_and_is_rounded_once() -> None:
    # If p were rounded first, p - 1 would be -0.00049 or 0 here.
    logits = torch.tensor([[9.0, 0.0, 0.0], [-300.0, 0.0, 0.0]], dtype=torch.float16)
    exact = logits.double().log_softmax(1)
    targets = torch.tensor([[0], [0]])
    loss, gradient = tiled_cross_entropy._loss_and_gradient(logits, targets)
    assert gradient.dtype == torch.float16
    assert loss.item() == pytest.approx(-exact[:, 0].sum().item(), rel=1e-6)
    expected = exact.exp() - torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    assert torch.allclose(gradient.double(), expected, rtol=1e-3, atol=1e-7)


def test_the_cpu_function_for_a_tile_gives_the_same_loss_and_gradient() -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(6, 40)
    logits[0, 3], logits[1, 3], logits[2:, 38:] = 300.0, -300.0, -torch.inf  # certain; probability underflows; padding
    targets = torch.tensor([[3], [3], [5], [6], [7], [8]])
    exact = logits.double().log_softmax(1)
    expected = exact.exp().scatter_add(1, targets, -torch.ones(6, 1, dtype=torch.float64))
    assert (
        tiled_cross_entropy._tile_function("cpu", torch.float32, compiled=True)
        is tiled_cross_entropy._softmax_loss_and_gradient
    )
    for loss_and_gradient in (tiled_cross_entropy._softmax_loss_and_gradient, tiled_cross_entropy._loss_and_gradient):
        loss, gradient = loss_and_gradient(logits.clone(), targets)
        assert loss.item() == pytest.approx(-exact.gather(1, targets).sum().item(), rel=1e-6)
        assert (gradient - expected).abs().max() < 1e-6  # both are off by at most 1.3e-7


TRANSFORMED: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
    "nanochat": {"final_logit_softcapping": 2.0},
    "hyperclovax": {"logits_scaling": 0.25},
}
"""Model type whose logits are scaled or capped after the head -> settings that make it plain to see."""


def transformed_model(kind: str) -> PreTrainedModel:
    """Return a random model of this type, with large logits."""
    from transformers import AutoConfig

    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(kind, **sizes, **heads, **TRANSFORMED[kind])
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", TRANSFORMED)
def test_scaled_and_capped_logits_give_the_models_own_loss_and_gradients(
    kind: str, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CUDA_TILING", tiled_cross_entropy.Tiling(5))
    (our_loss, ours), (their_loss, theirs) = ours_and_theirs(transformed_model(kind), batch(200), bf16=bf16)
    assert our_loss == pytest.approx(their_loss, rel=5e-3 if bf16 else 1e-5)
    assert worst_gradient(ours, theirs) < (0.1 if bf16 else 1e-4)


def test_a_model_with_logits_of_its_own_uses_its_own_loss_and_says_so(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lowvram_chat.model.logits.OWN_LOSS_ONLY", ("gpt2",))
    model = AutoModelForCausalLM.from_pretrained(tiny)
    (our_loss, _), (their_loss, _) = ours_and_theirs(model, batch(8192))
    assert our_loss == pytest.approx(their_loss, rel=1e-6)
    assert "model.fused_loss: gpt2 computes its logits in a way of its own" in caplog.text


def test_a_model_with_its_loss_attached_can_be_pickled(tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    attach_loss(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    inputs = batch(8192)
    assert loaded(**inputs)["loss"].item() == model(**inputs)["loss"].item()
    assert loaded.forward.model is loaded
    assert loaded(inputs["input_ids"]).logits.shape == (4, 37, 8192)


def test_without_gradients_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(*_: object) -> None:
        raise AssertionError("the gradient of the head: a product, and as much memory as the head")

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64)).eval()
    attach_loss(model)
    inputs = batch(64)
    expected = model(**inputs)["loss"]
    monkeypatch.setattr(tiled_cross_entropy, "_add_product", product)
    with torch.no_grad():
        assert torch.equal(model(**inputs)["loss"], expected)
