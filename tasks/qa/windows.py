"""Overlapping windows of tokens, each a question with a piece of its context, and batches of them."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tasks.qa.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The offsets of a token that is not part of the context.
OUTSIDE = (-1, -1)
# A question may take this part of a window, the rest of it is cut off.
QUESTION_SHARE = 1 / 4
# Examples that are tokenised together.
CHUNK = 1000


@dataclass(frozen=True, slots=True)
class Window:
    """`[CLS] question [SEP] piece of the context [SEP]`, without padding.

    Attributes:
        example: Position of its example.
        input_ids: Tokens.
        type_ids: 0 up to the first `[SEP]`, 1 from there on, where the tokenizer tells them apart.
        offsets: Start and end (exclusive) of each token in the context's characters; (-1, -1) outside the context.
        start: Position of the answer's first token; 0, that of `[CLS]`, where this window does not hold all of it.
        end: Position of its last one.
    """

    example: int
    input_ids: list[int]
    type_ids: list[int]
    offsets: list[tuple[int, int]]
    start: int
    end: int


@dataclass(slots=True)
class Batch:
    """Windows padded to the longest; not frozen, since Lightning sets its fields when it moves it to a device.

    Attributes:
        input_ids: `(B, L)` int64.
        attention_mask: `(B, L)` bool, False is padding.
        type_ids: `(B, L)` int64.
        context_mask: `(B, L)` bool: the tokens that an answer may consist of.
        starts: `(B,)` int64.
        ends: `(B,)` int64, inclusive.
        windows: B positions in the dataset's list of windows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    type_ids: Tensor
    context_mask: Tensor
    starts: Tensor
    ends: Tensor
    windows: list[int]

    def __len__(self) -> int:
        return len(self.windows)


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """What became of examples.

    Attributes:
        examples: How many there are.
        windows: Theirs.
        empty: Windows without an answer.
        unanswerable: Examples without an answer.
        lost: Examples with an answer that no window holds whole.
        widened: Examples whose answer begins or ends inside a token, so that more than it is learned.
    """

    examples: int
    windows: int
    empty: int
    unanswerable: int
    lost: int
    widened: int


def make_windows(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", max_length: int = 256, stride: int = 64
) -> list[Window]:
    """Cut contexts into windows, and find the first answer of each example in them.

    A window is labelled where it holds the whole answer, so neighbours may both be. A label's tokens cover the answer's
    characters; an answer that begins or ends inside a token is widened to it. A question of more than a quarter of
    `max_length` loses its end.

    Args:
        examples: Checked ones, see `check_examples`.
        tokenizer: A fast one, which knows the characters of its tokens.
        max_length: Tokens of a window.
        stride: Tokens of context that neighbours share.

    Returns:
        The windows of the first example, then of the second, and so on.

    Raises:
        ValueError: The stride leaves nothing new to a window, or the tokenizer does not put `[CLS]` first.
    """
    most = int(max_length * QUESTION_SHARE)
    room = max_length - most - tokenizer.num_special_tokens_to_add(pair=True)
    if not 0 <= stride < room:
        raise ValueError(
            f"stride={stride}: must be at least 0 and below {room}, which is what max_length={max_length} leaves to "
            f"the context beside a question of {most} tokens."
        )
    windows: list[Window] = []
    # Equal pairs are one object: there are millions of them.
    shared: dict[tuple[int, int], tuple[int, int]] = {}
    for first in range(0, len(examples), CHUNK):
        chunk = examples[first : first + CHUNK]
        encoded = tokenizer(
            _cut_questions([example.question for example in chunk], tokenizer, most),
            [example.context for example in chunk],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        for row, place in enumerate(encoded["overflow_to_sample_mapping"]):
            ids = encoded["input_ids"][row]
            if ids[0] != tokenizer.cls_token_id:
                raise ValueError(
                    f"{type(tokenizer).__name__} does not begin with its [CLS] token, which stands for no answer here: "
                    "use one of BERT's kind."
                )
            offsets = [
                shared.setdefault(pair, pair) if part == 1 else OUTSIDE
                for pair, part in zip(encoded["offset_mapping"][row], encoded.sequence_ids(row), strict=True)
            ]
            span = _find_answer(chunk[place], offsets)
            windows.append(Window(first + place, ids, encoded["token_type_ids"][row], offsets, *span))
    return windows


def _cut_questions(questions: Sequence[str], tokenizer: "PreTrainedTokenizerFast", most: int) -> list[str]:
    """Questions of at most so many tokens."""
    encoded = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True)
    return [
        question if len(offsets) <= most else question[: offsets[most - 1][1]]
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def _bounds(example: Example) -> tuple[int, int]:
    """Characters of the first answer, space around it left out, since no token holds space."""
    answer, start = example.answers[0], example.starts[0]
    first = start + len(answer) - len(answer.lstrip())
    return first, first + len(answer.strip())


def _find_answer(example: Example, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of the answer; 0, 0 where the window does not hold all of it."""
    if not example.answers:
        return 0, 0
    first, end = _bounds(example)
    inside = [place for place, pair in enumerate(offsets) if pair != OUTSIDE]
    if not inside:
        return 0, 0
    low, high = inside[0], inside[-1] + 1
    start = bisect_right(offsets, first, low, high, key=itemgetter(1))
    last = bisect_left(offsets, end, low, high, key=itemgetter(0)) - 1
    whole = low <= start <= last and offsets[start][0] <= first and end <= offsets[last][1]
    return (start, last) if whole else (0, 0)


def count_windows(examples: Sequence[Example], windows: Sequence[Window]) -> WindowCounts:
    """Count what became of examples.

    Args:
        examples: All.
        windows: Theirs.
    """
    labelled = {window.example: window for window in windows if window.end}
    answerable = [place for place, example in enumerate(examples) if example.answers]
    return WindowCounts(
        examples=len(examples),
        windows=len(windows),
        empty=sum(not window.end for window in windows),
        unanswerable=len(examples) - len(answerable),
        lost=sum(place not in labelled for place in answerable),
        widened=sum(
            (window.offsets[window.start][0], window.offsets[window.end][1]) != _bounds(examples[place])
            for place, window in labelled.items()
        ),
    )


def thin_out(examples: Sequence[Example], windows: Sequence[Window], share: float, seed: int = 0) -> list[Window]:
    """Leave out some of the windows that miss the answer of their example: long contexts have little else.

    Windows of examples without an answer all stay.

    Args:
        examples: All.
        windows: Theirs.
        share: How many of those windows to keep, from 0 to 1.
        seed: Chooses them.

    Raises:
        ValueError: The share is not in that range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"keep_empty={share}: must be from 0, no window without its answer, to 1, all.")
    draws = np.random.default_rng(seed).random(len(windows))
    return [
        window
        for window, draw in zip(windows, draws, strict=True)
        if window.end or not examples[window.example].answers or draw < share
    ]


def collate(windows: Sequence[tuple[int, Window]], pad_id: int) -> Batch:
    """Pad windows to the longest.

    Args:
        windows: Each with its position in the dataset's list of windows.
        pad_id: The padding token.
    """
    shape = len(windows), max(len(window.input_ids) for _, window in windows)
    batch = Batch(
        input_ids=torch.full(shape, pad_id),
        attention_mask=torch.zeros(shape, dtype=torch.bool),
        type_ids=torch.zeros(shape, dtype=torch.int64),
        context_mask=torch.zeros(shape, dtype=torch.bool),
        starts=torch.tensor([window.start for _, window in windows]),
        ends=torch.tensor([window.end for _, window in windows]),
        windows=[position for position, _ in windows],
    )
    for row, (_, window) in enumerate(windows):
        length = len(window.input_ids)
        batch.input_ids[row, :length] = torch.tensor(window.input_ids)
        batch.attention_mask[row, :length] = True
        batch.type_ids[row, :length] = torch.tensor(window.type_ids)
        batch.context_mask[row, :length] = torch.tensor([pair != OUTSIDE for pair in window.offsets])
    return batch
