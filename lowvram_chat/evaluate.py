"""Held-out loss and perplexity of a run or model, on the assistant's words and on all tokens.

    python -m lowvram_chat.evaluate runs/quickstart
    python -m lowvram_chat.evaluate openai-community/gpt2 my_chats.jsonl

Without data, a run is scored on its own held-out conversations.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowvram_chat.cli import guarded, parser, print_json
from lowvram_chat.errors import UsageError
from lowvram_chat.quiet import quiet_transformers
from lowvram_chat.recipe.schema import Data
from lowvram_chat.recipe.yaml_file import describe_problems, load_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the words of the command line and score."""
    arguments = parser("evaluate", __doc__)
    arguments.add_argument("model", help="run folder, model folder, hub id or builtin:tiny-gpt2")
    arguments.add_argument("data", nargs="*", help="files, globs, builtin:chitchat-held-out or a hub dataset")
    arguments.add_argument("--split", default="train", help="split of a hub dataset (default: train)")
    arguments.add_argument("--format", help="row format (default: detected)")
    arguments.add_argument("--limit", type=int, help="use only the first so many conversations")
    arguments.add_argument("--max-length", type=int, help="tokens of a row at most (default: the run's, else 1024)")
    arguments.add_argument("--max-bad-rows", type=int, default=0, help="rows that cannot be used to skip (default: 0)")
    arguments.add_argument("--batch-size", type=int, default=8, help="rows of a batch (default: 8)")
    arguments.add_argument("--json", action="store_true", help="print the scores as JSON, as the last line")
    args = arguments.parse_args(argv)

    def work() -> int:
        scores = run(args.model, args.data, **_settings(args), batch_size=args.batch_size)
        print(f"{'loss on':<12}{'loss':>10}{'perplexity':>14}{'tokens':>12}")
        for kind, score in scores.items():
            print(f"{kind:<12}{score['loss']:>10.4f}{score['perplexity']:>14.2f}{score['tokens']:>12,}")
        if args.json:
            print_json(scores)
        return 0

    return guarded(work)


def _settings(args: Any) -> dict[str, Any]:
    names = {"split": args.split, "format": args.format, "eval_limit": args.limit, "max_length": args.max_length}
    return {name: value for name, value in names.items() if value is not None} | {"max_bad_rows": args.max_bad_rows}


def run(model: str, data: Sequence[str], *, batch_size: int = 8, **settings: Any) -> dict[str, dict[str, Any]]:
    """Return loss, perplexity and tokens scored, under `assistant` and `all` (text without roles: `all` only).

    Raises:
        UsageError: no data, and the model's run has no held-out part of its own.
        LowVramError: see `model.open`, `data.load`.
    """
    own = load_recipe(Path(model) / "recipe.yaml").data if (Path(model) / "recipe.yaml").is_file() else None
    section = _section(model, list(data), own, settings)
    if batch_size < 1:
        raise UsageError(f"--batch-size: {batch_size} is below 1. Give the rows of a batch.")

    from lowvram_chat.data.sources import is_remote
    from lowvram_chat.hub import work_offline_if_unreachable

    if any(is_remote(name) for name in [model, *data]):
        work_offline_if_unreachable()
    quiet_transformers()

    from lowvram_chat.data.rows import Collator
    from lowvram_chat.data.template import marks_answers, set_template
    from lowvram_chat.model.loss import attach_loss
    from lowvram_chat.model.pretrained import check_positions
    from lowvram_chat.model.saved import open_model
    from lowvram_chat.model.scoring import score

    opened = open_model(model)
    if own is None and "max_length" not in settings:
        section = section.model_copy(update={"max_length": min(section.max_length, opened.positions)})
    check_positions(opened.model.config, section.max_length, model)
    tokenizer = opened.tokenizer
    attach_loss(opened.model.get_base_model() if hasattr(opened.model, "get_base_model") else opened.model)
    set_template(tokenizer, "own" if marks_answers(tokenizer) else "plain", "all")
    collate = Collator(int(tokenizer.pad_token_id))  # type: ignore[arg-type]
    seed = opened.recipe.train.seed if opened.recipe else 0
    scores = {}
    for loss_on in ["assistant", "all"] if _has_roles(section) else ["all"]:
        rows = held_out_rows(section.model_copy(update={"loss_on": loss_on}), tokenizer, seed)
        result = score(opened.model, rows, collate, batch_size)
        scores[loss_on] = {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}
    return scores


def _section(model: str, data: list[str], own: Data | None, settings: dict[str, Any]) -> Data:
    """Return the data section to score by: the words of the command line over the run's own.

    Raises:
        UsageError: there is nothing to score on.
    """
    base = {} if own is None else own.model_dump()
    if data:
        base |= {"eval_source": data, "eval_split": settings.get("split"), "eval_fraction": None, "eval_limit": None}
        base |= {"format": None, "split": settings.get("split", "train")}
    elif own is None or (own.eval_source is None and own.eval_split is None and own.eval_fraction is None):
        raise UsageError(f"{model}: has no held-out conversations of its own. Name some: evaluate {model} chats.jsonl")
    else:
        settings = {name: value for name, value in settings.items() if name != "split"}
    try:
        return Data.model_validate(base | settings)
    except ValidationError as error:
        raise UsageError(describe_problems(error, "evaluate")) from None


def _has_roles(section: Data) -> bool:
    """Return whether the conversations to score tell the assistant's words from the rest."""
    from lowvram_chat.data.dataset import held_out_source
    from lowvram_chat.data.formats import detect_format
    from lowvram_chat.data.sources import BadRow
    from lowvram_chat.recipe.formats import FORMATS

    if section.format is not None:
        return FORMATS[section.format].has_roles
    first = next(((where, row) for where, row in held_out_source(section).rows() if not isinstance(row, BadRow)), None)
    return first is None or FORMATS[detect_format(first[1], first[0])].has_roles


def held_out_rows(section: Data, tokenizer: Any, seed: int) -> Any:
    """Return the rows to score: those held out by the section's source, split or fraction."""
    from lowvram_chat.data.dataset import load_held_out, load_rows

    if section.eval_fraction is not None:
        return load_rows(section, tokenizer, seed).held_out
    return load_held_out(section, tokenizer)


if __name__ == "__main__":
    sys.exit(main())
