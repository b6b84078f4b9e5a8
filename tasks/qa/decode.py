"""From logits to answers: the best spans over all windows of an example, each with its probability and its place.

A span is scored by its start logit plus its end logit (Devlin et al. 2019, section 4.2), and windows are compared by
these raw sums. A softmax over all windows of an example at once would rank spans in the same order; one per window
would let a window without the answer share out a whole probability, less what it puts on `[CLS]`. All spans are looked
at, not only those of the best starts and ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tasks.qa.examples import Example
    from tasks.qa.windows import Window

Array = NDArray[np.float64]
# A token's two places in the context are packed into one number, so that tokens can be sorted.
SHIFT = 2**32


@dataclass(frozen=True, slots=True)
class Answer:
    """A piece of the context.

    Attributes:
        text: The context's own characters; empty for no answer.
        score: Probability of the span among all spans of the example that may be an answer, and no answer where that
            is allowed: a softmax over their scores.
        start: First character in the context; -1 for no answer.
        end: The character after the last; -1 for no answer.
    """

    text: str
    score: float
    start: int
    end: int


def decode(
    examples: "Sequence[Example]",
    windows: "Sequence[Window]",
    start_logits: Sequence[NDArray[np.floating]],
    end_logits: Sequence[NDArray[np.floating]],
    n_best: int = 20,
    max_answer_tokens: int = 30,
    allow_no_answer: bool = False,
    threshold: float = 0.0,
) -> list[list[Answer]]:
    """The best answers to each example, over all of its windows.

    A span begins and ends in the context, not before it begins, and is at most `max_answer_tokens` long. Where windows
    overlap, the same characters count once, with their highest score. No answer is scored as in SQuAD v2: the start
    plus the end logit of `[CLS]`, the lowest of the example's windows that hold context, since one with an answer
    suffices.

    Args:
        examples: What was asked.
        windows: Windows of these examples, in any order.
        start_logits: `(length,)` per window, without padding.
        end_logits: The same.
        n_best: How many answers to give at most.
        max_answer_tokens: Longest answer; tokens that stand for the same characters (bytes of one) count once.
        allow_no_answer: Whether no answer is one of the candidates.
        threshold: What is taken off the score of no answer: it wins where it is above the best span by more than that.

    Returns:
        Per example, best first and never empty: an example without a token of context, or without a window, has no
        answer, with probability 1.

    Raises:
        ValueError: Logits are not finite or do not fit the windows, or an option is out of range.
    """
    if n_best < 1 or max_answer_tokens < 1:
        raise ValueError(f"n_best={n_best}, max_answer_tokens={max_answer_tokens}: both must be at least 1.")
    if not len(windows) == len(start_logits) == len(end_logits):
        raise ValueError(f"{len(windows)} windows, but logits of {len(start_logits)} starts, {len(end_logits)} ends.")
    pieces: list[list[_Piece]] = [[] for _ in examples]
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        pieces[window.example].append(_read(window, starts, ends, examples[window.example].id))
    penalty = threshold if allow_no_answer else np.inf
    return [
        _best(example.context, of_example, n_best, max_answer_tokens, penalty)
        for example, of_example in zip(examples, pieces, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A window's part of the context.

    Attributes:
        tokens: `(N,)` first character and end of each token in one number, in the order of the context.
        starts: `(N,)` logits.
        ends: `(N,)` logits.
        no_answer: The score of `[CLS]`.
    """

    tokens: NDArray[np.int64]
    starts: Array
    ends: Array
    no_answer: float


def _read(window: "Window", starts: NDArray[np.floating], ends: NDArray[np.floating], name: str) -> _Piece:
    size = len(window.offsets)
    if not len(starts) == len(ends) == size:
        raise ValueError(
            f"A window of example {name!r} has {size} tokens, but {len(starts)} start logits and {len(ends)} end "
            "logits: cut the padding off."
        )
    logits = np.array([starts, ends], dtype=np.float64)
    if not np.isfinite(logits).all():
        raise ValueError(f"The logits of example {name!r} are not finite: the model has diverged.")
    start, end = np.array(window.offsets, dtype=np.int64).T
    context = end > start
    tokens, of_context = (start * SHIFT + end)[context], logits[:, context]
    if len(tokens):
        first = np.flatnonzero(np.diff(tokens, prepend=-1))
        tokens, of_context = tokens[first], np.maximum.reduceat(of_context, first, axis=1)
    return _Piece(tokens, of_context[0], of_context[1], float(logits[:, 0].sum()))


def _best(context: str, pieces: list[_Piece], n_best: int, longest: int, penalty: float) -> list[Answer]:
    pieces = [piece for piece in pieces if len(piece.tokens)]
    if not pieces:
        return [Answer("", 1.0, -1, -1)]
    tokens = np.unique(np.concatenate([piece.tokens for piece in pieces]))
    spans = np.full((len(tokens), longest), -np.inf)
    for piece in pieces:
        first = np.searchsorted(tokens, piece.tokens[0])
        rows = spans[first : first + len(piece.tokens)]
        np.maximum(rows, _span_scores(piece, longest), out=rows)
    scores = np.append(spans, min(piece.no_answer for piece in pieces) - penalty)
    best, probabilities = _highest(scores, n_best)
    answers = []
    for place, probability in zip(best, probabilities, strict=True):
        start, end = -1, -1
        if place < spans.size:
            token, more = divmod(place, longest)
            start, end = int(tokens[token] // SHIFT), int(tokens[token + more] % SHIFT)
        answers.append(Answer("" if start < 0 else context[start:end], probability, start, end))
    return answers


def _highest(scores: Array, count: int) -> tuple[list[int], list[float]]:
    """Places of the highest scores, best first (of equals the first), and their share of the softmax over all."""
    best = np.argpartition(-scores, min(count, len(scores)) - 1)[:count]
    best = best[np.isfinite(scores[best])]
    best = best[np.lexsort((best, -scores[best]))]
    odds = np.exp(scores - scores[best[0]])
    return best.tolist(), (odds[best] / odds.sum()).tolist()


def _span_scores(piece: _Piece, longest: int) -> Array:
    """`(N, longest)`: of the span that begins at a token and is 1, 2, ... tokens long; -inf beyond the window."""
    ends = np.append(piece.ends, np.full(longest - 1, -np.inf))
    return piece.starts[:, None] + np.lib.stride_tricks.sliding_window_view(ends, longest)
