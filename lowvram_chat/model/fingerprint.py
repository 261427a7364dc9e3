"""Fingerprints of base models: shapes and sampled values of every weight, so that an adapter is only used with its own base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import cached_file

from lowvram_chat.errors import ModelError
from lowvram_chat.model.loading_report import persistent_buffers
from lowvram_chat.model.pretrained import resolve
from lowvram_chat.model.substitutions import DROPOUT_SETTINGS
from lowvram_chat.recipe.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FINGERPRINT_FILE = "base_fingerprint.json"
"""File beside an adapter with the fingerprint of its base model."""
SAMPLES = 8
"""Values that are sampled of each weight, evenly spaced."""
MAX_LISTED = 3
"""Differences that a message lists."""
HALF_TYPES = ("float16", "bfloat16")
COARSEST_STEP = 2.0**-7
"""Relative spacing of bfloat16: the most by which a value changes between two 16-bit types."""


@dataclass(frozen=True)
class WeightSample:
    """The shape and type of a weight, and some of its values."""

    shape: tuple[int, ...]
    dtype: str
    values: tuple[float, ...]

    @classmethod
    def of(cls, weight: torch.Tensor) -> WeightSample:
        """Return the sample of a weight."""
        flat = weight.detach().reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        values = flat[places.to(flat.device)].float().tolist()
        return cls(tuple(weight.shape), str(weight.dtype).removeprefix("torch."), tuple(values))

    def is_same(self, other: WeightSample) -> bool:
        """Return whether two samples can be of one weight: their values are equal in the coarser of their types."""
        if self.shape != other.shape:
            return False
        mine, others = torch.tensor(self.values), torch.tensor(other.values)
        types = {self.dtype, other.dtype}
        if types == set(HALF_TYPES):
            return torch.allclose(mine, others, rtol=COARSEST_STEP, atol=1e-6)
        for dtype in types.intersection(HALF_TYPES):
            mine, others = (values.to(getattr(torch, dtype)).float() for values in (mine, others))
        return torch.equal(mine, others)


@dataclass(frozen=True)
class Fingerprint:
    """What tells a base model from all others."""

    weights: Mapping[str, WeightSample]
    """Name -> sample of each weight that is not quantised, and of each buffer that is saved."""
    config: Mapping[str, object]
    """Settings of config.json that change what the model computes."""
    adapter: str | None = None
    """Digest of the configuration of the adapter that the fingerprint is saved with."""
    files: str | None = None
    """Digest of the weight files, where weights are quantised; None: all weights are in `weights`."""

    def to_json(self) -> str:
        """Return the fingerprint as JSON."""
        weights = {name: [sample.shape, sample.dtype, sample.values] for name, sample in self.weights.items()}
        return (
            json.dumps({"files": self.files, "adapter": self.adapter, "config": self.config, "weights": weights}) + "\n"
        )

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Return the fingerprint of a JSON text.

        Raises:
            ValueError: it is not one.
        """
        try:
            document: dict[str, Any] = json.loads(text)
            weights = {
                name: WeightSample(tuple(shape), dtype, tuple(values))
                for name, (shape, dtype, values) in document["weights"].items()
            }
            return cls(weights, dict(document["config"]), document["adapter"], document["files"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a fingerprint ({type(error).__name__})") from None

    def digest(self) -> str:
        """Return a short text that is equal for equal fingerprints."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]


def fingerprint(model: PreTrainedModel, settings: Model) -> Fingerprint:
    """Return the fingerprint of a base model without an adapter; `settings` say where it comes from."""
    named = (*model.named_parameters(), *persistent_buffers(model))
    weights = {name: weight for name, weight in named if weight.is_floating_point()}
    is_quantised = any(not weight.is_floating_point() for weight in model.parameters())
    return Fingerprint(
        {name: WeightSample.of(weight) for name, weight in weights.items()},
        _settings_of(model.config),
        files=digest_of_files(settings) if is_quantised else None,
    )


NOT_COMPUTED = {
    *DROPOUT_SETTINGS,
    *(
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
        "model_type",
        "name_or_path",
        "torch_dtype",
    ),
    *(
        "transformers_version",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "router_aux_loss_coef",
    ),
    *("output_router_logits", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward", "pretraining_tp"),
    # keys of transformers 4 beside those of 5
    *("rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor", "rope_local_base_freq"),
}
"""Settings that change no result without dropout, or that are written twice."""


def _settings_of(config: PreTrainedConfig) -> dict[str, object]:
    """Return the simple settings of a configuration that change what a model computes."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, str | int | float) and name not in NOT_COMPUTED and not name.startswith("_")
    }


def check_same_base(saved: Fingerprint, model: PreTrainedModel, settings: Model, adapter: Path) -> None:
    """Refuse a base model that is not the one of a saved fingerprint.

    Raises:
        ModelError: with the first differences.
    """
    differences = list(_differences(saved, fingerprint(model, settings)))
    if saved.files is not None and not differences and digest_of_files(settings) != saved.files:
        differences.append("the weight files differ")
    if differences:
        more = f", and {len(differences) - MAX_LISTED} more" if len(differences) > MAX_LISTED else ""
        raise ModelError(
            f"{adapter}: this adapter was trained on another base model than {settings.name}: "
            f"{'; '.join(differences[:MAX_LISTED])}{more}. Give the base model that it was trained on."
        )


def _differences(saved: Fingerprint, found: Fingerprint) -> Iterator[str]:
    """Yield how two bases differ. Of a base with quantised weights, only the others can be compared."""
    for name, sample in saved.weights.items():
        other = found.weights.get(name)
        if other is None:
            yield f"{name} is not in it"
        elif sample.shape != other.shape:
            yield f"{name} has the shape {list(other.shape)} instead of {list(sample.shape)}"
        elif not sample.is_same(other):
            yield f"{name} has other values"
    for name in sorted(saved.config.keys() & found.config.keys()):
        if saved.config[name] != found.config[name]:
            yield f"{name} is {found.config[name]} instead of {saved.config[name]} in config.json"
    if saved.files is None:
        yield from (f"{name} was not in the other one" for name in found.weights if name not in saved.weights)


def digest_of_files(settings: Model) -> str:
    """Return a digest of the contents of a model's safetensors files."""
    path = Path(resolve(settings.name))
    if not path.is_dir():
        config = cached_file(str(path), "config.json", revision=settings.revision or "main")
        path = Path(str(config)).parent
    digest = hashlib.sha256()
    for weights in sorted(path.glob("*.safetensors")):
        with weights.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:32]
