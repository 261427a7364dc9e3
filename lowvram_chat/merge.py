"""Fold a run's adapter into its base model and prove that the result is the same function.

    python -m lowvram_chat.merge runs/quickstart

The merged model is an ordinary Hugging Face checkpoint in RUN/merged. It is written only if its logits equal those of
base + adapter; a 4-bit run is merged onto the full-precision base.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram_chat.cli import guarded, parser, print_json
from lowvram_chat.errors import ModelError, ProofError, UsageError
from lowvram_chat.quiet import quiet_transformers
from lowvram_chat.recipe.schema import Model

TOLERANCE = 1e-3
"""Largest absolute difference of fp32 logits that still counts as the same function."""


@dataclass(frozen=True)
class Proof:
    """Largest absolute differences in fp32 logits on fixed random tokens."""

    adapter_to_merged: float
    adapter_to_reloaded: float
    adapter_to_base: float
    """How far the adapter moves the base: a proof about an adapter that does nothing would prove nothing."""

    def holds(self, *, exact: bool) -> bool:
        """Return whether merged (and, where it was saved in float32, reloaded) is the same function as base + adapter."""
        same = self.adapter_to_merged <= TOLERANCE  # NaN is not
        return same and (self.adapter_to_reloaded <= TOLERANCE or not exact)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the words of the command line and run."""
    arguments = parser("merge", __doc__)
    arguments.add_argument("run", help="run folder with an adapter")
    arguments.add_argument("--out", type=Path, metavar="FOLDER", help="where the model goes (default: RUN/merged)")
    arguments.add_argument(
        "--base", metavar="MODEL", help="base model, where it is no longer found under the recipe's name"
    )
    arguments.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="type to save in"
    )
    arguments.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    arguments.add_argument("--json", action="store_true", help="print the proof as JSON, as the last line")
    args = arguments.parse_args(argv)

    def work() -> int:
        proof, out = run(args.run, out=args.out, base=args.base, dtype=args.dtype, overwrite=args.overwrite)
        print(f"largest difference in logits, base+adapter to merged:            {proof.adapter_to_merged:.2e}")
        print(f"largest difference in logits, base+adapter to saved and reloaded: {proof.adapter_to_reloaded:.2e}")
        print(f"(the adapter itself moves the base's logits by up to              {proof.adapter_to_base:.2e})")
        print(f"merged model: {out}")
        if args.json:
            print_json({**vars(proof), "out": str(out)})
        return 0

    return guarded(work)


def run(
    run_path: str | Path,
    *,
    out: Path | None = None,
    base: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> tuple[Proof, Path]:
    """Merge a run's adapter; return the proof and where the model is.

    Raises:
        LowVramError: no run, no adapter, another base, or a result that is in the way.
        ProofError: the logits differ by more than `TOLERANCE`; nothing is kept.
    """
    from lowvram_chat.training.card import model_card
    from lowvram_chat.training.run_dir import open_run, read_result

    folder = open_run(run_path)
    out = folder.merged if out is None else out
    if not (folder.adapter / "adapter_config.json").is_file():
        whole = " It was a full fine-tune: its model folder is already a whole model." if folder.model.is_dir() else ""
        raise ModelError(f"{run_path}: has no adapter to merge.{whole or ' Finish the run first (sft --resume).'}")
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: exists. Add --overwrite to replace an earlier merge, or --out for another folder.")
    if out.exists() and not (out / "config.json").is_file():
        raise UsageError(f"{out}: exists and is no model folder, so it is left alone. Give another folder with --out.")

    from lowvram_chat.hub import work_offline_if_unreachable

    recipe = folder.recipe()
    name = base or recipe.model.name
    if not name.startswith("builtin:") and not Path(name).exists():
        work_offline_if_unreachable()
    quiet_transformers()
    model = Model(name=name, revision=None if base else recipe.model.revision, fused_gelu=False)
    card = model_card(recipe, read_result(folder), merged=True)
    return _merge(folder.adapter, model, out, dtype, card), out


def _merge(adapter: Path, model: Model, out: Path, dtype: str, card: str) -> Proof:
    """Merge, save beside the final place, prove on what was saved, and move it there."""
    import torch
    from transformers import AutoModelForCausalLM

    from lowvram_chat.model.adapters import load_adapter, probe_logits
    from lowvram_chat.model.pretrained import load_model, load_tokenizer

    base = load_model(model)
    vocabulary = base.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
    original = probe_logits(base, vocabulary)
    adapted = load_adapter(base, adapter)
    wanted = probe_logits(adapted, vocabulary)
    merged: Any = adapted.merge_and_unload()
    after_merge = probe_logits(merged, vocabulary)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        merged.to(getattr(torch, dtype)).save_pretrained(partial)
        load_tokenizer(str(adapter)).save_pretrained(partial)
        reloaded = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32, trust_remote_code=False)
        proof = Proof(
            adapter_to_merged=_largest(wanted, after_merge),
            adapter_to_reloaded=_largest(wanted, probe_logits(reloaded, vocabulary)),
            adapter_to_base=_largest(wanted, original),
        )
        if not proof.holds(exact=dtype == "float32"):
            raise ProofError(
                f"{adapter}: the merged model is not the same function: its logits differ by {proof.adapter_to_merged:.2e} "
                f"merged and {proof.adapter_to_reloaded:.2e} reloaded (at most {TOLERANCE:g} is allowed). Nothing was "
                "written. Was the adapter trained on this base?"
            )
        (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return proof


def _largest(a: Any, b: Any) -> float:
    return float((a - b).abs().max())


if __name__ == "__main__":
    sys.exit(main())
