"""The form in which models and adapters are saved, so that other programs and older libraries read them as they are meant.

- Chat templates have no {% generation %} marks, which plain Jinja, minijinja and llama.cpp do not know. The template with marks
  is kept in a file beside it, for training and evaluation.
- config.json and tokenizer_config.json also have the keys that transformers 4 reads. It would otherwise read every Llama with
  a `rope_theta` of 10,000, and could not load some tokenizers at all.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_chat.data.markup import bos_text
from lowvram_chat.data.template_text import marks_answers
from lowvram_chat.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MARKED_TEMPLATE_FILE = "chat_template_training.jinja"
"""File with the chat template that marks the assistant's words; other programs do not read it."""

STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
MARK = r"\{%(?P<left>[-+]?)\s*(?P<tag>generation|endgeneration)\s*(?P<right>[-+]?)%\}"
TEMPLATE_PARTS = re.compile(
    r"(?P<comment>\{#.*?#\})"
    r"|\{%[-+]?\s*raw\s*-?%\}.*?\{%[-+]?\s*endraw\s*[-+]?%\}"
    rf"|\{{\{{(?:{STRING}|.)*?\}}\}}|{MARK}|\{{%(?:{STRING}|.)*?%\}}",
    re.DOTALL,
)
"""Comments, raw blocks, expressions, marks and other statements of a Jinja template."""


def without_marks(template: str) -> str:
    """Return a chat template without its {% generation %} marks, which renders the same text.

    Each mark becomes an empty comment with the same control of white space. Comments that mention a mark lose its braces.
    """

    def replaced(found: re.Match[str]) -> str:
        if found["tag"]:
            return f"{{#{found['left']} {found['right']}#}}"
        return re.sub(MARK, r"\g<tag>", found[0]) if found["comment"] else found[0]

    return TEMPLATE_PARTS.sub(replaced, template)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer with its chat template, without and with marks."""
    marked = tokenizer.chat_template
    has_marks = marks_answers(tokenizer)
    try:
        if has_marks:
            tokenizer.chat_template = without_marks(str(marked))
            write_text(folder / MARKED_TEMPLATE_FILE, str(marked))
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = marked
    _rewrite(
        folder / "tokenizer_config.json",
        lambda config: legacy_tokenizer_config(config, adds_bos=bool(bos_text(tokenizer))),
    )


def with_marks(folder: Path, template: object) -> object:
    """Return the chat template with marks of a saved model, if it is the model's `template` but for its marks.

    Someone may have changed the template since; then the marked one is out of date, and the log says so.
    """
    file = folder / MARKED_TEMPLATE_FILE
    if not file.is_file():
        return template
    marked = file.read_text(encoding="utf-8")
    if without_marks(marked).strip() == str(template).strip():
        return marked
    log.warning("%s: is not the template beside it, so it is not used. Delete it, or write it anew.", file)
    return template


def complete_config(folder: Path) -> None:
    """Add to a saved config.json the keys that transformers 4 reads."""
    _rewrite(folder / "config.json", legacy_config)


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        write_text(file, json.dumps(change(config), indent=2, ensure_ascii=False, sort_keys=True) + "\n")


BACKEND_CLASS = "TokenizersBackend"
CLASSES_WITH_BOS = ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer", "CohereTokenizer")
"""Tokenizer classes that rebuild in transformers 4 what they put before a text, from `add_bos_token`."""
LOADING_ARGUMENTS = ("is_local", "local_files_only", "backend")


def legacy_tokenizer_config(config: Mapping[str, Any], *, adds_bos: bool) -> dict[str, Any]:
    """Return a tokenizer's configuration that transformers 4 (from 4.40) and 5 read alike."""
    done = {key: value for key, value in config.items() if key not in LOADING_ARGUMENTS}
    if done.get("tokenizer_class") == BACKEND_CLASS:  # transformers 5 loads the older name as this class
        done["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(done.get("extra_special_tokens"), list):  # a dictionary in transformers 4
        done["additional_special_tokens"] = done.pop("extra_special_tokens")
    if str(done.get("tokenizer_class", "")).removesuffix("Fast") in CLASSES_WITH_BOS:
        done["add_bos_token"] = adds_bos
        done.setdefault("legacy", False)
    return done


THETA_KEYS = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
PARTIAL_KEYS = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
"""Model type -> its name for `rope_theta` and for `partial_rotary_factor` in transformers 4, where it is another."""
LOCAL_THETA_KEYS = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq"}
"""Model type -> its name for the theta of sliding attention."""
NOT_SCALING = ("rope_theta", "partial_rotary_factor", "type")
SHORT_SCALINGS = ("phi3", "phi4_multimodal")
"""Model types whose `rope_scaling` has exactly three keys in transformers 4."""


def legacy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's configuration with `rope_parameters`, and the keys of transformers 4 for the same values beside it."""
    done = dict(config)
    if isinstance(done.get("text_config"), dict):
        done["text_config"] = legacy_config(done["text_config"])
    rope, kind = done.get("rope_parameters"), str(done.get("model_type"))
    if not rope:
        return done
    if "full_attention" in rope:  # one entry for each kind of layer
        sliding = rope.get("sliding_attention")
        if sliding and kind in LOCAL_THETA_KEYS:
            done[LOCAL_THETA_KEYS[kind]] = sliding["rope_theta"]
        rope = rope["full_attention"]
    if any(
        isinstance(value, dict) for value in rope.values()
    ):  # other kinds of layers, which transformers 4 does not know
        return done
    if rope.get("rope_theta") is not None:
        done[THETA_KEYS.get(kind, "rope_theta")] = rope["rope_theta"]
    if rope.get("partial_rotary_factor") is not None:
        done[PARTIAL_KEYS.get(kind, "partial_rotary_factor")] = rope["partial_rotary_factor"]
    scaling = _legacy_scaling(rope, kind)
    if scaling:
        done["rope_scaling"] = scaling
        if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings"):
            done["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return done


def _legacy_scaling(rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return `rope_scaling` of transformers 4; empty if nothing is scaled."""
    scaling = {key: value for key, value in rope.items() if key not in NOT_SCALING}
    scaling["rope_type"] = scaling.get("rope_type", rope.get("type", "default"))
    if scaling == {"rope_type": "default"}:
        return {}
    if kind in SHORT_SCALINGS:
        return {"type": scaling["rope_type"], "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return scaling
