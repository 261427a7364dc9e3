"""What models do to their logits between the head and the loss: a factor, or a soft cap.

A fused loss computes the logits itself, so it must do the same. Keyed by model type, because the names of the settings do not
tell: MPT has a `logit_scale` and ignores it, and `logits_scaling` divides in Granite and multiplies in HyperCLOVA X.

Source: the `forward` methods of transformers 5.23, `models/*/modeling_*.py`; checked for each type against its own logits in
tests/integration/test_architectures.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class LogitTransform:
    """z -> cap * tanh(scale * z / cap), or scale * z without a cap."""

    scale: float = 1.0
    cap: float | None = None


def _divide(value: float | None) -> LogitTransform:
    return LogitTransform(scale=1 / value if value else 1.0)


def _multiply(value: float | None) -> LogitTransform:
    return LogitTransform(scale=1.0 if value is None else value)


def _cap(value: float | None) -> LogitTransform:
    return LogitTransform(cap=value or None)


TRANSFORMS: Mapping[tuple[str, Callable[[float | None], LogitTransform]], tuple[str, ...]] = {
    ("logits_scaling", _divide): (
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "minicpm3",
    ),
    ("logits_scaling", _multiply): ("hyperclovax",),
    ("logit_scale", _multiply): ("cohere", "cohere2", "cohere2_moe", "cohere_compass_text"),
    ("lm_head_multiplier", _multiply): ("falcon_h1",),
    ("final_logit_softcapping", _cap): (
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "gemma4_unified_text",
        "nanochat",
        "vaultgemma",
    ),
    ("logits_soft_cap", _cap): ("recurrent_gemma",),
    ("output_logit_soft_cap", _cap): ("xlstm",),
}
"""Setting and what it does -> the model types that do it."""

BY_MODEL_TYPE = {kind: (setting, change) for (setting, change), kinds in TRANSFORMS.items() for kind in kinds}

OWN_LOSS_ONLY = (
    "beam",
    "bert",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "gemma4_assistant",
    "inkling2_text",
    "inkling_text",
    "modernbert-decoder",
    "musicgen",
    "prophetnet",
    "roberta",
    "xlm-roberta",
)
"""Model types with more than a factor or a cap between hidden states and logits."""


def logit_transform(config: PreTrainedConfig) -> LogitTransform | None:
    """Return what a model does to its logits; None if the fused loss cannot do the same."""
    kind = config.model_type
    if kind in OWN_LOSS_ONLY:
        return None
    if kind not in BY_MODEL_TYPE:
        return LogitTransform()
    setting, change = BY_MODEL_TYPE[kind]
    return change(getattr(config, setting, None))
