"""The generation config that a trained model is saved with: it can be saved, and it stops where answers end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lowvram_chat.data.answers import end_tokens_of
from lowvram_chat.errors import ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that only sampling uses."""
BEAMS = ("early_stopping", "length_penalty")
"""Settings that only a search with several beams uses."""
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
"""Settings that only a dictionary as result uses."""


def prepare_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make a model's generation config savable, and add the tokens that end an answer to it.

    transformers refuses to save a changed config with settings that its way of decoding ignores, such as a temperature without
    sampling. They are unset, which changes no answer.

    Raises:
        ModelError: the config has another mistake.
    """
    if not model.can_generate():
        return
    config = model.generation_config
    unset = _unset_unused(config)
    if unset:
        log.info(
            "%s: its generation config does not use %s, so a trained model is saved without", name, ", ".join(unset)
        )
    own = config.eos_token_id
    ids = [] if own is None else own if isinstance(own, list) else [own]
    if not all(isinstance(token, int) for token in ids):
        raise ModelError(f"{name}: eos_token_id in generation_config.json is {own!r}, which are no tokens. Correct it.")
    own = [token for token in ids if 0 <= token < model.config.get_text_config().vocab_size]
    if len(own) < len(ids):
        log.info("%s: its generation config stops at tokens that its vocabulary does not have; they are left out", name)
    config.eos_token_id = stop_tokens(tokenizer, own)
    try:
        config.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{name}: its generation_config.json cannot be saved again ({reason}). Correct that file."
        ) from None


def _unset_unused(config: GenerationConfig) -> list[str]:
    """Unset the settings that a config's way of decoding ignores, and return their names."""
    unused = [
        *(SAMPLING if config.do_sample is not True else ()),
        *(BEAMS if config.num_beams in (None, 1) else ()),
        *(OUTPUTS if config.return_dict_in_generate is not True else ()),
    ]
    unset = [name for name in unused if getattr(config, name, None) not in (None, False)]
    for name in unused:
        setattr(config, name, None)
    if config.pad_token_id is not None and config.pad_token_id < 0:
        config.pad_token_id = None
    return unset


def stop_tokens(tokenizer: PreTrainedTokenizerBase, own: int | list[int] | None) -> list[int] | int:
    """Return the tokens that end an answer: the chat template's end tokens, the EOS token, and a model's `own`."""
    try:
        end = [tokenizer.convert_tokens_to_ids(token) for token in end_tokens_of(tokenizer)]
    except ValueError:  # no template, or one without an end
        end = []
    others = [] if own is None else [own] if isinstance(own, int) else own
    found = list(dict.fromkeys([*end, tokenizer.eos_token_id, *others]))
    return found[0] if len(found) == 1 else found
