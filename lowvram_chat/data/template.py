"""Chat templates: the text of messages. The template is set on the tokenizer, so that it is saved with every model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_chat.data.answers import SAMPLE, end_tokens_of
from lowvram_chat.data.markup import bos_text
from lowvram_chat.data.template_text import render_text
from lowvram_chat.errors import DataError, NotFoundError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FOLDER = Path(__file__).parent.parent / "assets" / "templates"
SHIPPED_TEMPLATES = ("plain", "chatml")
KNOWN_TEMPLATES = (*SHIPPED_TEMPLATES, "own")


def read_template(name: str) -> str:
    """Return the Jinja text of a shipped template (`plain`, `chatml`) or of a .jinja file.

    Raises:
        NotFoundError: the name is neither that of a shipped template nor of a file.
        DataError: the file is not text.
    """
    path = TEMPLATE_FOLDER / f"{name}.jinja" if name in SHIPPED_TEMPLATES else Path(name)
    if not path.is_file():
        raise NotFoundError(
            f"data.chat_template: '{name}' is neither {', '.join(KNOWN_TEMPLATES)} nor a file."
            f"{did_you_mean(name, KNOWN_TEMPLATES)} Give one of those names or the path of a .jinja file."
        )
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise DataError(f"data.chat_template: {name} is not UTF-8 text. Give a Jinja template.") from None


def _write_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the BOS token in front of a template's text if the tokenizer puts one before each text and the template does not."""
    bos = bos_text(tokenizer)
    if bos:
        with contextlib.suppress(ValueError):  # a template that fails is refused later
            if not render_text(tokenizer, SAMPLE).startswith(bos):
                tokenizer.chat_template = "{{- bos_token -}}" + str(tokenizer.chat_template)


def set_template(tokenizer: PreTrainedTokenizerBase, name: str, loss_on: str) -> None:
    """Set the tokenizer's chat template and padding token, without adding a token to its vocabulary.

    A template that does not write the BOS token gets it in front if the tokenizer puts one before each text.

    Raises:
        DataError: the tokenizer has no EOS token; the name is `own` and the tokenizer has no template; the tokenizer lacks
            the template's tokens; the template fails; or the loss is on the assistant, and its answers cannot be found in the
            template's text or have no end that a model could learn.
        NotFoundError: see `read_template`.
    """
    if tokenizer.eos_token is None:
        raise DataError("The tokenizer has no end-of-text token, so that answers could not end. Use another tokenizer.")
    if tokenizer.pad_token is None:  # padding gets no labels, so that the real EOS tokens are still learned
        tokenizer.pad_token = tokenizer.eos_token
    if name == "own":
        if isinstance(tokenizer.chat_template, dict):
            raise DataError(
                f"data.chat_template: own, but the tokenizer has several ({', '.join(tokenizer.chat_template)}). Write the one "
                "to use to a .jinja file, and name that file."
            )
        if not tokenizer.chat_template:
            raise DataError(
                "data.chat_template: own, but the tokenizer has no chat template. Set data.chat_template=plain."
            )
    else:
        tokenizer.chat_template = read_template(name)
        _write_bos(tokenizer)
    if name == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        raise DataError("data.chat_template: chatml, but the tokenizer lacks its tokens. Set data.chat_template=plain.")
    try:
        render_text(tokenizer, SAMPLE)
        if loss_on == "assistant":
            end_tokens_of(tokenizer)
    except ValueError as error:
        raise DataError(
            f"data.chat_template: {name} cannot be used: {error}. Use the template plain, or another."
        ) from None
