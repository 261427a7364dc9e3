"""Merges a run's adapter into its base model, and proves by logits that the result is the same function."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM

from lowvram_chat.errors import ProofError
from lowvram_chat.exporting.model_card import model_card
from lowvram_chat.exporting.proof import MAX_LOGIT_DIFFERENCE, Proof
from lowvram_chat.files import beside, discard, replace_folder, sync_files, written
from lowvram_chat.model.adapters import load_adapter, probe_logits
from lowvram_chat.model.device import choose_device, move_to_device
from lowvram_chat.model.generation_settings import prepare_generation_config
from lowvram_chat.model.out_of_memory import advised
from lowvram_chat.model.pretrained import load_model, load_tokenizer
from lowvram_chat.model.saved import DEVICE_ADVICE, base_of_adapter, float32_bytes
from lowvram_chat.model.saved_form import complete_config, save_tokenizer
from lowvram_chat.recipe.choices import portable_attention
from lowvram_chat.recipe.schema import Model
from lowvram_chat.training.run_dir import RunDir, read_result

COPIES = 2.5
"""Memory that a merge needs, in multiples of the model in float32: the base, and the saved model that is compared with it."""


@dataclass(frozen=True)
class Merged:
    """A merged model and the proof that it is right."""

    path: Path
    proof: Proof


def merge_run(
    run: RunDir, out: Path, *, base: str | None = None, dtype: str = "float32", device: str = "auto"
) -> Merged:
    """Merge the run's adapter into its base model, or into another copy of it named by `base`.

    Raises:
        NotFoundError, ModelError: the base cannot be loaded, or is not the one that the adapter was trained on.
        ProofError: the logits differ by more than `MAX_LOGIT_DIFFERENCE`; nothing is kept.
        UsageError: `out` cannot be replaced; an earlier merge is kept.
        OutOfMemory: the model does not fit the device; nothing is kept.
    """
    recipe = run.recipe()
    settings = (
        Model(name=base, attention=portable_attention(recipe.model.attention)) if base else base_of_adapter(run.adapter)
    )
    model = settings.model_copy(update={"fused_gelu": False})
    card = model_card(recipe, read_result(run), merged=True)
    place = device_for_merge(device, model)
    with advised(str(run.path), DEVICE_ADVICE[place.type]):
        return Merged(out, _merge(run.adapter, model, out, dtype, card, place))


def device_for_merge(wanted: str, base: Model) -> torch.device:
    """Return the device to merge on: "auto" is the CPU, unless the machine's memory is short and the card's is not."""
    if wanted != "auto":
        return choose_device(wanted, lambda: 0)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    needed = int(COPIES * float32_bytes(base))
    if psutil.virtual_memory().available >= needed:
        return torch.device("cpu")
    return choose_device("auto", lambda: needed)


def _merge(  # noqa: PLR0917
    adapter: Path, settings: Model, out: Path, dtype: str, card: str, device: torch.device
) -> Proof:
    """Merge, save next to the final place, prove what was saved, and move it there."""
    base = load_model(settings)
    vocabulary = base.config.get_text_config().vocab_size
    adapted = load_adapter(base, adapter, settings)  # on the CPU, where the fingerprint of the base was taken
    move_to_device(adapted, device)
    with adapted.disable_adapter():
        original = probe_logits(adapted, vocabulary)
    expected = probe_logits(adapted, vocabulary)
    merged = adapted.merge_and_unload()
    after_merge = probe_logits(merged, vocabulary)

    partial = beside(out, "new")
    try:
        tokenizer = load_tokenizer(str(adapter))
        prepare_generation_config(merged, tokenizer, settings.name)
        partial.mkdir(parents=True)
        with written(partial):
            merged.to(getattr(torch, dtype)).save_pretrained(partial)
            complete_config(partial)
            save_tokenizer(tokenizer, partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
            sync_files(partial)
        proof = Proof(
            adapter_to_merged=_largest_difference(expected, after_merge),
            adapter_to_reloaded=_largest_difference(expected, _saved_logits(partial, vocabulary)),
            adapter_to_base=_largest_difference(expected, original),
        )
        if not proof.holds(exact=dtype == "float32"):
            raise ProofError(
                f"{adapter}: the merged model is not the same function. Its logits differ by "
                f"{proof.adapter_to_merged:.2e} after merging and by {proof.adapter_to_reloaded:.2e} after reloading; at "
                f"most {MAX_LOGIT_DIFFERENCE:g} is allowed. Nothing was written. Was the adapter trained on this base?"
            )
    except BaseException:
        discard(partial)
        raise
    replace_folder(partial, out)  # a merge that is proved is not thrown away where a folder cannot be moved
    return proof


def _saved_logits(folder: Path, vocabulary: int) -> torch.Tensor:
    """Return the logits of a saved model. It is freed on return: its weights map the file, which Windows then locks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return probe_logits(model, vocabulary)


def _largest_difference(logits: torch.Tensor, others: torch.Tensor) -> float:
    return float((logits - others).abs().max())
