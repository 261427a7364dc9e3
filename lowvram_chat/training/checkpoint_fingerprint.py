"""What a checkpoint is a state of: base model, tokenizer, template, rows and settings. A run is not resumed over changed ones."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_chat.errors import UsageError
from lowvram_chat.files import write_json
from lowvram_chat.training.resume import fixed_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowvram_chat.data.dataset import PreparedRows
    from lowvram_chat.model.fingerprint import Fingerprint
    from lowvram_chat.recipe.schema import Recipe

log = logging.getLogger(__name__)

FILE = "lowvram_chat_fingerprint.json"
"""File in each checkpoint."""

WHAT_CHANGED = {
    "base": "the weights or the configuration of the base model",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "rows": "the training rows",
    "settings": "the settings of the recipe",
}
"""Field of `CheckpointFingerprint` -> what it stands for."""


@dataclass(frozen=True)
class CheckpointFingerprint:
    """Digests of everything that a checkpoint depends on."""

    base: str
    tokenizer: str
    template: str
    rows: str
    settings: str

    @classmethod
    def of(
        cls, base: Fingerprint, tokenizer: PreTrainedTokenizerBase, rows: PreparedRows, recipe: Recipe
    ) -> CheckpointFingerprint:
        """Return the fingerprint of a run."""
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        return cls(
            base=base.digest(),
            tokenizer=_digest([tokenizer.backend_tokenizer.to_str(), special]),
            template=_digest(str(tokenizer.chat_template)),
            rows=rows.fingerprint,
            settings=_digest(fixed_settings(recipe)),
        )

    def write(self, checkpoint: Path) -> None:
        """Keep the fingerprint in a checkpoint."""
        write_json(checkpoint / FILE, vars(self))

    def check(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of other things than these.

        Raises:
            UsageError: with what has changed. A checkpoint of an earlier version, which has no fingerprint, is accepted with a
                warning.
        """
        file = checkpoint / FILE
        if not file.is_file():
            log.warning(
                "%s: has no %s, so it is not checked that base, tokenizer and rows are the same", checkpoint, FILE
            )
            return
        try:
            saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            changed = [what for name, what in WHAT_CHANGED.items() if saved[name] != getattr(self, name)]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{file}: is damaged. Delete {checkpoint.name}, and resume from the one before.") from None
        if changed:
            raise UsageError(
                f"{checkpoint}: {' and '.join(changed)} changed since this checkpoint was written, so the run would be "
                "another one. Restore what was there, or start again with --overwrite or another output.dir."
            )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
