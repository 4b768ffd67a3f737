"""What happens between two forwards of a generation, outside every module: the next token is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analytic import operators as op
from analytic.cost import BOOL, FP32, INT64

if TYPE_CHECKING:
    from analytic.layers.base import Scope


def note_sampling(at: Scope, *, vocabulary: int, length: int, ngram: int) -> None:
    """Note everything from the logits of one forward to the ids that go into the next, for one prompt.

    The likeliest token that completes no n-gram for a second time, as `stage_runners.generate.Generation` chooses it.
    Reading the token back is the only time that the host waits: it needs the token for its stopping test.

    Parameters
    ----------
    at
        Where to note it, such as ``tape.at("(sampling)", 1)``: no module does it.
    vocabulary
        Logits per position, in fp32.
    length
        Ids so far, those of the prompt included.
    ngram
        Length of the n-gram that may not repeat.
    """
    at.op("scores", "copy", op.view() + op.copy(vocabulary, FP32), dtype=FP32)
    if length >= ngram:
        _ban_repetitions(at, vocabulary, length, ngram)
    at.op("argmax", "reduction", op.reduction(vocabulary, 1, FP32), dtype=FP32)
    at.op("ids_cat", "copy", op.view() + op.cat(length + 1, INT64))
    at.op("token_to_host", "copy", op.view() + op.to_host(1, INT64))
    at.op("next_ids", "other", op.view())


def _ban_repetitions(at: Scope, vocabulary: int, length: int, ngram: int) -> None:
    """Compare the last ids with every window of the sequence, as transformers does since it keeps them as tensors.

    Source: ``NoRepeatNGramLogitsProcessor`` of transformers 5.23. Older versions, 4.46 among them, bring all ids to the
    host in two read-backs and compare them there, in a loop over the windows.
    """
    windows = length - ngram + 1
    compared = windows * (ngram - 1)
    at.op("ngram_views", "other", op.view() * 6)
    # Windows overlap: each id is read once, and the result is a byte.
    ids = (length + ngram - 1) * INT64.bytes
    at.op("ngram_compare", "elementwise", op.elementwise(compared, BOOL, operands=0, shared=ids))
    at.op("ngram_matches", "reduction", op.reduction(compared, windows, BOOL))
    at.op("banned_zeros", "copy", op.fill(vocabulary + 1, BOOL))
    at.op("ngram_last", "elementwise", op.elementwise(windows, INT64))
    at.op("spare_column", "copy", op.fill(1, INT64))
    at.op("banned_ids", "elementwise", op.elementwise(windows, INT64, shared=1))
    at.op("banned_scatter", "routing", op.scatter(windows, 1, BOOL))
    at.op("banned_fill", "copy", op.elementwise(vocabulary, FP32, shared=vocabulary // FP32.bytes), dtype=FP32)
