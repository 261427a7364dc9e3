"""A preview of training data as text: rows with the tokens that carry loss marked, then what the source holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lowvram_chat.data.preview import Piece, Preview, PreviewRow
from lowvram_chat.terminal import printable
from lowvram_chat.units import count

BAR_WIDTH = 30
OTHER_LENGTHS = (128, 256, 512, 1024)
"""Maximum lengths whose cut is shown for comparison."""
COLOUR, PLAIN = ("\x1b[32m", "\x1b[0m"), ("[[", "]]")
"""What stands before and after tokens that carry loss: green on a terminal, brackets elsewhere."""


def preview_lines(preview: Preview, *, colour: bool) -> Iterator[str]:
    """Yield the lines of a preview."""
    for row in preview.rows:
        yield from _row_lines(row, COLOUR if colour else PLAIN)
    yield from _corpus_lines(preview)
    if preview.lengths:
        yield from _length_lines(preview)
    yield from _problem_lines(preview)


def _row_lines(row: PreviewRow, marks: tuple[str, str]) -> Iterator[str]:
    yield printable(f"--- {row.place}: {count(row.tokens, 'token')}, {row.loss_tokens:,} with loss")
    yield "".join(_marked(piece, marks) for piece in row.pieces)
    yield ""


def _marked(piece: Piece, marks: tuple[str, str]) -> str:
    text = printable(piece.text)
    return f"{marks[0]}{text}{marks[1]}" if piece.carries_loss else text


def _corpus_lines(preview: Preview) -> Iterator[str]:
    facts = preview.facts
    of_sample = f" (the first {facts.rows_read:,} rows of it)" if preview.is_sample else ""
    yield printable(f"{preview.name}{of_sample}")
    yield f"  {count(facts.conversations, 'conversation')} in {count(facts.rows, 'row')}"
    yield f"  {count(facts.tokens, 'token')}, {preview.share_with_loss:.0%} with loss"


def _length_lines(preview: Preview) -> Iterator[str]:
    """Yield the histogram of lengths, and what other maximum lengths would do."""
    lengths, limit = preview.lengths, preview.max_length
    yield f"  tokens in a conversation: median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}"
    histogram = preview.histogram()
    largest = max(histogram.values())
    for bound, number in histogram.items():
        bar = "#" * max(1, round(BAR_WIDTH * number / largest))
        over = "  over data.max_length" if bound // 2 >= limit else ""
        yield f"    up to {bound:>6,}  {bar:<{BAR_WIDTH}} {number:>8,}{over}"
    over_limit = count(preview.facts.shortened, "conversation")
    yield f"  over data.max_length={limit}: {over_limit}; truncation cuts off {preview.share_cut_at(limit):.1%} of the tokens"
    if preview.facts.shortened:
        yield f"    data.overflow=split would keep all of them, in {preview.rows_when_split(limit):,} rows"
        for other in OTHER_LENGTHS:
            if other != limit:
                yield f"    data.max_length={other} would cut off {preview.share_cut_at(other):.1%}"


def _problem_lines(preview: Preview) -> Iterator[str]:
    facts = preview.facts
    found = {
        "rows that cannot be used": facts.bad_rows,
        "conversations without loss within data.max_length, left out": facts.without_loss,
        "conversations with the same text as an earlier one": facts.duplicates,
        "held-out conversations that are trained on, too": preview.in_both,
        "conversations from which special tokens are removed": facts.special_tokens_removed,
        "conversations whose text contains what begins a turn": facts.spelled_turns,
    }
    yield from _counts(found)
    for kind, number in preview.bad_rows_by_kind.items():
        yield printable(f"      {number:,} x {kind}")
    for example in facts.bad_examples:
        yield printable(f"      {example}")
    if facts.columns_not_used:
        listed = ", ".join(f"{name} ({number:,})" for name, number in facts.columns_not_used.items())
        yield printable(f"  columns not used, with the number of rows: {listed}")


def _counts(found: Mapping[str, int]) -> Iterator[str]:
    nothing = [what for what, number in found.items() if not number]
    for what, number in found.items():
        if number:
            yield f"  {what}: {number:,}"
    if len(nothing) == len(found):
        yield "  no bad rows, no duplicates, nothing held out that is trained on, too"


def preview_document(preview: Preview) -> dict[str, object]:
    """Return a preview as a JSON document."""
    facts, lengths = preview.facts, preview.lengths
    return {
        "rows": [
            {
                "text": row.text,
                "trained": row.trained,
                "tokens": row.tokens,
                "loss_tokens": row.loss_tokens,
                "place": row.place,
            }
            for row in preview.rows
        ],
        "is_sample": preview.is_sample,
        "conversations": facts.conversations,
        "rows_total": facts.rows,
        "tokens": facts.tokens,
        "loss_tokens": facts.loss_tokens,
        "bad_rows": facts.bad_rows,
        "bad_rows_by_kind": preview.bad_rows_by_kind,
        "bad_examples": facts.bad_examples,
        "duplicates": facts.duplicates,
        "in_both": preview.in_both,
        "shortened": facts.shortened,
        "without_loss": facts.without_loss,
        "share_cut": round(preview.share_cut_at(preview.max_length), 6),
        "rows_when_split": preview.rows_when_split(preview.max_length),
        "special_tokens_removed": facts.special_tokens_removed,
        "spelled_turns": facts.spelled_turns,
        "columns_not_used": facts.columns_not_used,
        "lengths": {
            "max_length": preview.max_length,
            "median": lengths[len(lengths) // 2] if lengths else 0,
            "longest": lengths[-1] if lengths else 0,
            "histogram": {str(bound): number for bound, number in preview.histogram().items()},
        },
    }
