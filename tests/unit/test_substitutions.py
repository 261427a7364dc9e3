"""Each substitution is the same function, forward and backward, and the recipe can switch it off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, masking_utils
from transformers.activations import GELUTanh, NewGELUActivation

from lowvram_chat.model import substitutions
from lowvram_chat.model.pretrained import load_model
from lowvram_chat.model.substitutions import fuse_gelu, packing_declared, set_dropout
from lowvram_chat.recipe.schema import Model


def gelus(model: torch.nn.Module) -> tuple[int, int]:
    """Return the number of GELUs written in Python and the number of fused ones."""
    modules = list(model.modules())
    return sum(isinstance(m, NewGELUActivation) for m in modules), sum(isinstance(m, GELUTanh) for m in modules)


def test_the_fused_gelu_is_the_same_function_with_the_same_gradient() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-30, -60.0, 60.0])]).requires_grad_()
    y = x.detach().clone().requires_grad_()
    NewGELUActivation()(x).sum().backward()
    GELUTanh()(y).sum().backward()
    assert torch.allclose(NewGELUActivation()(x), GELUTanh()(y), atol=2e-6)
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, atol=2e-6)


def test_a_model_with_fused_gelus_has_the_same_logits_and_gradients(tiny: Path) -> None:
    plain, fused = AutoModelForCausalLM.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    assert fuse_gelu(fused) == 2
    assert gelus(plain) == (2, 0)
    assert gelus(fused) == (0, 2)
    ids = torch.randint(0, 8192, (2, 30), generator=torch.Generator().manual_seed(0))
    for model in (plain, fused):
        model(input_ids=ids, labels=ids).loss.backward()
    assert torch.allclose(plain(input_ids=ids).logits, fused(input_ids=ids).logits, atol=1e-5)
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_what_is_saved_is_an_ordinary_gpt2(tiny: Path, tmp_path: Path) -> None:
    load_model(Model(name=str(tiny))).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).activation_function == "gelu_new"
    assert gelus(AutoModelForCausalLM.from_pretrained(tmp_path)) == (2, 0)


@pytest.mark.parametrize(("switch", "expected"), [(True, (0, 2)), (False, (2, 0))])
def test_the_recipe_switches_the_fused_gelu(tiny: Path, switch: bool, expected: tuple[int, int]) -> None:
    assert gelus(load_model(Model(name=str(tiny), fused_gelu=switch))) == expected


@pytest.mark.parametrize(("setting", "probability"), [(None, 0.1), (0.0, 0.0), (0.3, 0.3)])
def test_the_recipe_sets_every_dropout(tmp_path: Path, setting: float | None, probability: float) -> None:
    from tests.samples import save_tiny_gpt2

    save_tiny_gpt2(tmp_path, dropout=0.1)
    model = load_model(Model(name=str(tmp_path), dropout=setting))
    found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert found == {probability}


def test_only_dropouts_that_a_config_has_are_set() -> None:
    config = LlamaConfig(attention_dropout=0.5)
    before = {**config.to_dict(), "attention_dropout": 0.25}
    set_dropout(config, 0.25)
    assert config.to_dict() == before


@pytest.mark.parametrize("kind", ["biogpt", "starcoder2", "mpt", "opt", "gpt_neo", "bloom", "phi"])
def test_a_model_without_dropout_gives_the_same_states_twice(kind: str) -> None:
    config = AutoConfig.for_model(kind, vocab_size=64)
    sizes = {"hidden_size": 32, "d_model": 32, "ffn_dim": 64, "intermediate_size": 64, "word_embed_proj_dim": 32}
    layers = {
        "num_hidden_layers": 2,
        "n_layers": 2,
        "n_layer": 2,
        "num_layers": 2,
        "attention_types": [[["global"], 2]],
    }
    heads = {"num_attention_heads": 2, "n_heads": 2, "num_heads": 2, "n_head": 2, "num_key_value_heads": 2}
    for name, value in {**sizes, **layers, **heads}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if kind == "gpt_neo":
        config.attention_layers = ["global", "global"]
    set_dropout(config, 0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    tokens = torch.arange(10)[None]
    assert torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.fixture
def fresh_search() -> Iterator[None]:
    """Let the test look for transformers' private function anew, and forget what it found."""
    substitutions._can_declare_packing.cache_clear()
    yield
    substitutions._can_declare_packing.cache_clear()


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])


@pytest.mark.usefixtures("fresh_search")
def test_declared_packing_numbers_the_documents_and_undeclared_packing_looks_at_nothing() -> None:
    original = masking_utils.find_packed_sequence_indices
    with packing_declared(packed=True):
        documents = masking_utils.find_packed_sequence_indices(POSITIONS)
    assert documents is not None
    assert documents.tolist() == [[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 1, 1]]
    with packing_declared(packed=False):
        assert masking_utils.find_packed_sequence_indices(POSITIONS) is None
    assert masking_utils.find_packed_sequence_indices is original


@pytest.mark.usefixtures("fresh_search")
def test_without_the_private_function_transformers_looks_itself_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    for packed in (True, False):
        with packing_declared(packed=packed):
            assert not hasattr(masking_utils, "find_packed_sequence_indices")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "masking_utils.find_packed_sequence_indices is gone" in caplog.text
    assert "constraints.txt" in caplog.text
