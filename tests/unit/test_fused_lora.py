"""A fused adapter computes PEFT's function, and an adapter that cannot be fused runs PEFT's own forward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from lowvram_chat.model import fused_lora
from lowvram_chat.model.adapters import add_adapter
from lowvram_chat.model.pretrained import load_model
from lowvram_chat.recipe.schema import Adapter, Model

TOKENS = torch.arange(24).view(2, 12)


def adapted(folder: Path, *, fused: bool, on_cpu: bool = False, **settings: Any) -> PeftModel:
    """Return the model with an adapter whose B is not zero."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with_adapter = add_adapter(model, Adapter(r=4, fused=fused, **settings), on_cpu=on_cpu)
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return with_adapter


def loss_and_gradients(model: torch.nn.Module) -> tuple[float, list[torch.Tensor]]:
    """Return the loss of `TOKENS` and the gradients of the adapter."""
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["lora", "rslora", "pissa", "dora"])
def test_loss_and_gradients_equal_those_of_peft(kind: str, tiny: Path) -> None:
    (our_loss, ours), (peft_loss, theirs) = (
        loss_and_gradients(adapted(tiny, fused=fused, kind=kind)) for fused in (True, False)
    )
    assert our_loss == pytest.approx(peft_loss, rel=1e-6)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture
def always_folded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Fold adapters however few tokens there are, and return the shapes of the weights they were folded into."""
    folded: list[torch.Size] = []

    def pays(_: torch.Tensor, base: torch.nn.Linear | Conv1D) -> bool:
        folded.append(base.weight.shape)
        return True

    monkeypatch.setattr(fused_lora, "_folding_pays", pays)
    return folded


@pytest.mark.parametrize("kind", ["lora", "rslora", "pissa"])
def test_folded_loss_and_gradients_equal_those_of_peft(kind: str, tiny: Path, always_folded: list[torch.Size]) -> None:
    our_loss, ours = loss_and_gradients(adapted(tiny, fused=True, on_cpu=True, kind=kind))
    peft_loss, theirs = loss_and_gradients(adapted(tiny, fused=False, kind=kind))
    assert len(always_folded) == 8
    assert our_loss == pytest.approx(peft_loss, rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):  # against float64: folded is off by 1.5e-5, PEFT by 1.3e-5
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_linear_layers_without_a_bias_are_folded_too(always_folded: list[torch.Size]) -> None:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    base = AutoModelForCausalLM.from_config(config)
    results = []
    for fold in (True, False):
        torch.manual_seed(4)
        model = add_adapter(copy.deepcopy(base), Adapter(r=4, fused=fold), on_cpu=fold)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        results.append(loss_and_gradients(model))
    assert len(always_folded) == 7
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_adapters_are_folded_only_in_a_training_step_in_fp32_with_enough_tokens(tiny: Path) -> None:
    model = adapted(tiny, fused=True, on_cpu=True)
    base = model.get_submodule("base_model.model.transformer.h.0.mlp.c_fc.base_layer")
    assert isinstance(base, Conv1D)
    width = min(base.weight.shape)
    states = fused_lora.MIN_TOKENS_PER_WIDTH * width
    few, enough = torch.zeros(1, states - 1, width), torch.zeros(1, states, width)
    assert fused_lora._folding_pays(enough, base)
    assert not fused_lora._folding_pays(few, base)
    assert not fused_lora._folding_pays(enough.bfloat16(), base)
    with torch.no_grad():
        assert not fused_lora._folding_pays(enough, base)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused_lora._folding_pays(enough, base)


@pytest.mark.parametrize(("settings", "is_plain"), [({}, True), ({"dropout": 0.5}, False), ({"kind": "dora"}, False)])
def test_only_a_plain_adapter_is_fused(
    settings: dict[str, Any], is_plain: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def peft_forward(self: Linear, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        calls.append(self)
        output: torch.Tensor = self.base_layer(x)
        return output

    monkeypatch.setattr(Linear, "forward", peft_forward)
    model = adapted(tiny, fused=True, **settings)
    model.train()(input_ids=TOKENS)
    assert (calls == []) is is_plain


def test_disabled_adapters_and_half_precision_match_peft(tiny: Path) -> None:
    model = adapted(tiny, fused=True)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model.eval()(input_ids=TOKENS).logits, base.eval()(input_ids=TOKENS).logits)
    fused, unfused = (adapted(tiny, fused=fused).eval() for fused in (True, False))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        difference = (fused(input_ids=TOKENS).logits - unfused(input_ids=TOKENS).logits).abs().max()
        adapter_effect = (unfused(input_ids=TOKENS).logits - base(input_ids=TOKENS).logits).abs().max()
    assert difference < 0.1 * adapter_effect  # bf16 has 8 significant bits


def test_a_merged_adapter_is_not_added_again(tiny: Path) -> None:
    model = adapted(tiny, fused=True).eval()
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        model.merge_adapter()
        assert torch.allclose(model(input_ids=TOKENS).logits, before, atol=1e-5)


def test_an_adapter_on_a_4_bit_base_is_fused_too(tiny: Path) -> None:
    logits = []
    for fused in (True, False):
        torch.manual_seed(3)
        model = load_model(Model(name=str(tiny), load_in="4bit"))
        with_adapter = add_adapter(model, Adapter(r=4, fused=fused))
        for name, parameter in with_adapter.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            logits.append(with_adapter.eval()(input_ids=TOKENS).logits)
    assert torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_fused_are_reported(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    adapted(tiny, fused=True)
    assert not caplog.records
    monkeypatch.setattr(fused_lora, "FUSABLE_LAYERS", ("RenamedByPeft",))
    adapted(tiny, fused=True)
    assert "adapter.fused: none of PEFT's layers can be fused" in caplog.text
