"""Windows against a slow reading of the tokenizer's own output; batches; what is counted."""

import time
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tasks.qa.examples import Example, generate_examples
from tasks.qa.windows import OUTSIDE, Window, collate, count_windows, make_windows, thin_out
from tests.helpers import bases
from tests.tasks.qa.builders import CONTEXT, texts_of, word_pieces


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_pieces()


def ask(
    context: str = CONTEXT, answer: str | None = "Denmark", question: str = "where from?", **changes: Any
) -> Example:
    found = {} if answer is None else {"answers": (answer,), "starts": (context.index(answer),)}
    return replace(Example("q", "own", "d", question, context), **(found | changes))


def long_text(words: int = 300) -> str:
    return " ".join(f"w{number}" for number in range(words)) + " the end."


def label(example: Example, window: Window) -> str:
    return example.context[window.offsets[window.start][0] : window.offsets[window.end][1]]


# --- what a window is ------------------------------------------------------------------------------------------------


def test_a_short_context_is_one_window_of_question_and_context(tokenizer: Any) -> None:
    example = ask()
    (window,) = make_windows([example], tokenizer)
    assert window.example == 0 and label(example, window) == "Denmark"
    expected = tokenizer(example.question, example.context, return_offsets_mapping=True, return_token_type_ids=True)
    assert window.input_ids == expected["input_ids"] and window.type_ids == expected["token_type_ids"]
    parts = expected.sequence_ids(0)
    kept = [pair if part == 1 else (-1, -1) for pair, part in zip(expected["offset_mapping"], parts, strict=True)]
    assert window.offsets == kept
    assert parts[window.start] == parts[window.end] == 1


@pytest.mark.parametrize(("max_length", "stride"), [(32, 0), (32, 7), (48, 20), (64, 33)])
def test_windows_cover_the_context_and_overlap_by_the_stride(tokenizer: Any, max_length: int, stride: int) -> None:
    example = ask(long_text(), "the end", "what is this?")
    windows = make_windows([example], tokenizer, max_length, stride)
    pieces = [[pair for pair in window.offsets if pair != OUTSIDE] for window in windows]
    whole = tokenizer(example.context, add_special_tokens=False, return_offsets_mapping=True)
    room = max_length - 3 - len(tokenizer.tokenize(example.question))
    assert all(len(piece) == room for piece in pieces[:-1]) and len(pieces[-1]) <= room
    for before, after in pairwise(pieces):
        assert stride == len(set(before) & set(after)) and before[len(before) - stride :] == after[:stride]
    assert sorted({pair for piece in pieces for pair in piece}) == whole["offset_mapping"]
    for window in windows:
        assert window.input_ids[0] == tokenizer.cls_token_id and window.input_ids[-1] == tokenizer.sep_token_id
        assert len(window.input_ids) == len(window.type_ids) == len(window.offsets) <= max_length


def test_windows_follow_their_examples(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.qa.windows.CHUNK", 2)
    examples = [ask(), ask(long_text(), "w7"), ask(), ask(long_text(40), "w3"), ask()]
    windows = make_windows(examples, tokenizer, 64, 16)
    assert [window.example for window in windows] == sorted(window.example for window in windows)
    assert Counter(window.example for window in windows)[1] > 3
    for place, example in enumerate(examples):
        (alone, *_), mine = make_windows([example], tokenizer, 64, 16), [w for w in windows if w.example == place]
        assert replace(mine[0], example=0) == alone


# --- where the answer is ---------------------------------------------------------------------------------------------


def slow_label(example: Example, window: Window) -> tuple[int, int]:
    """All pairs of context tokens are tried; the shortest that covers the answer wins."""
    answer, start = example.answers[0].strip(), example.starts[0]
    start += len(example.answers[0]) - len(example.answers[0].lstrip())
    inside = [place for place, pair in enumerate(window.offsets) if pair != OUTSIDE]
    covering = [
        (last - first, first, last)
        for first in inside
        for last in inside
        if first <= last and window.offsets[first][0] <= start and start + len(answer) <= window.offsets[last][1]
    ]
    return min(covering)[1:] if covering else (0, 0)


def test_labels_are_those_of_a_search_over_all_spans(tokenizer: Any) -> None:
    generator = np.random.default_rng(0)
    text = long_text(60) + " (Café, Köln) 1940s " + CONTEXT
    examples = []
    for number in range(60):
        start = int(generator.integers(len(text) - 30))
        answer = text[start : start + int(generator.integers(1, 30))]
        if answer.strip():
            examples.append(ask(text, None, id=str(number), answers=(answer,), starts=(start,)))
    windows = make_windows(examples, tokenizer, 48, 12)
    for window in windows:
        assert (window.start, window.end) == slow_label(examples[window.example], window)
    labelled = Counter(window.example for window in windows if window.end)
    assert max(labelled.values()) > 1, "what neighbours share is labelled in both"
    assert min(labelled.values()) == 1 and any(not window.end for window in windows)


def test_the_given_place_is_labelled_not_another_one(tokenizer: Any) -> None:
    text = f"a red kite. {long_text(80)} a red kite."
    last = text.rindex("red")
    windows = make_windows([ask(text, None, answers=("red",), starts=(last,))], tokenizer, 48, 8)
    assert not windows[0].end and windows[-1].offsets[windows[-1].start][0] == last


def test_the_first_answer_is_learned(tokenizer: Any) -> None:
    example = ask(
        CONTEXT, None, answers=("France", "Denmark"), starts=(CONTEXT.index("France"), CONTEXT.index("Denmark"))
    )
    (window,) = make_windows([example], tokenizer)
    assert label(example, window) == "France"


def test_an_answer_inside_a_token_is_widened_and_counted(tokenizer: Any) -> None:
    examples = [ask(answer="Norman"), ask(answer=" Denmark"), ask(answer="egion in Franc"), ask()]
    examples[0] = replace(examples[0], starts=(CONTEXT.index("Normans"),))
    windows = make_windows(examples, tokenizer)
    labels = [label(example, window) for example, window in zip(examples, windows, strict=True)]
    assert labels == ["Normans", "Denmark", "region in France", "Denmark"]
    assert count_windows(examples, windows).widened == 2, "space around an answer is no token"


def test_what_is_counted(tokenizer: Any) -> None:
    text = long_text(100)
    examples = [ask(), ask(answer=None), ask(text, "w50"), ask(text, text[:-5]), ask(answer="om Denmar")]
    windows = make_windows(examples, tokenizer, 64, 8)
    counts = count_windows(examples, windows)
    assert (counts.examples, counts.windows) == (5, len(windows))
    assert (counts.unanswerable, counts.lost, counts.widened) == (1, 1, 1)
    assert counts.empty == sum(window.start == 0 for window in windows) == len(windows) - 3
    assert all((window.start == 0) == (window.end == 0) for window in windows)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_long_question_loses_its_end(tokenizer: Any) -> None:
    question = " ".join(["what", "is", "the"] * 40)
    (window,) = make_windows([ask(question=question)], tokenizer, 128, 16)
    words = tokenizer.convert_ids_to_tokens(window.input_ids)
    assert words[1 : words.index("[SEP]")] == tokenizer.tokenize(question)[:32]
    assert label(ask(), window) == "Denmark"


@pytest.mark.parametrize("stride", [-1, 45, 1000])
def test_a_stride_that_leaves_nothing_new(tokenizer: Any, stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride={stride}: must be at least 0 and below 45, .*max_length=64"):
        make_windows([ask()], tokenizer, 64, stride)


def test_the_largest_stride_with_the_longest_question_still_ends(tokenizer: Any) -> None:
    windows = make_windows([ask(long_text(30), "the end", "what is " * 40)], tokenizer, 64, 44)
    assert windows[-1].end


def test_a_tokenizer_without_cls_in_front_is_refused(tokenizer: Any) -> None:
    other = word_pieces()
    other.cls_token = "[MASK]"
    with pytest.raises(ValueError, match="does not begin with its"):
        make_windows([ask()], other)


def test_a_hundred_thousand_characters(tokenizer: Any) -> None:
    text = "Some words stand here. " * 4400 + "They came from Denmark."
    assert len(text) > 100_000
    started = time.process_time()
    windows = make_windows([ask(text)], tokenizer)
    assert time.process_time() - started < 10
    assert len(windows) > 50 and [label(ask(text), window) for window in windows if window.end] == ["Denmark"]


def test_a_context_of_nothing_that_the_tokenizer_knows(tokenizer: Any) -> None:
    (window,) = make_windows([ask("\u200b\u200b", None)], tokenizer)
    assert set(window.offsets) == {OUTSIDE} and window.end == 0


def test_generated_answers_are_all_found(tokenizer: Any) -> None:
    examples = generate_examples(100)
    counts = count_windows(examples, make_windows(examples, bases.word_pieces(texts_of(examples))))
    assert (counts.windows, counts.empty, counts.lost, counts.widened) == (100, 0, 0, 0)


# --- fewer empty windows ---------------------------------------------------------------------------------------------


def test_thinning_takes_only_windows_that_miss_an_answer_of_their_example(tokenizer: Any) -> None:
    text = long_text(400)
    examples = [ask(text, "w3"), ask(text, None), ask(text, "w300")]
    windows = make_windows(examples, tokenizer, 64, 8)
    empty = defaultdict(int)
    for window in windows:
        empty[window.example] += not window.end
    none, half = thin_out(examples, windows, 0.0), thin_out(examples, windows, 0.5, seed=1)
    assert Counter(window.example for window in none)[1] == empty[1], "without an answer all windows say so"
    assert all(window.end for window in none if window.example != 1)
    assert {id(w) for w in windows if w.end} <= {id(w) for w in none} <= {id(w) for w in half}
    kept = sum(not window.end for window in half if window.example != 1)
    assert 0.3 < kept / (empty[0] + empty[2]) < 0.7
    assert thin_out(examples, windows, 0.5, seed=1) == half != thin_out(examples, windows, 0.5, seed=2)
    assert thin_out(examples, windows, 1.0) == windows
    with pytest.raises(ValueError, match=r"keep_empty=1\.5"):
        thin_out(examples, windows, 1.5)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_as_long_as_its_longest_window(tokenizer: Any) -> None:
    examples = [ask(), ask(long_text(20), "w3"), ask("It is Rome.", None)]
    windows = make_windows(examples, tokenizer)
    batch = collate([(7, windows[1]), (3, windows[0]), (5, windows[2])], pad_id=9)
    assert len(batch) == 3 and batch.windows == [7, 3, 5]
    lengths = [len(windows[place].input_ids) for place in (1, 0, 2)]
    assert batch.input_ids.shape == (3, max(lengths)) and batch.attention_mask.sum(1).tolist() == lengths
    for row, place in enumerate((1, 0, 2)):
        window, length = windows[place], lengths[row]
        assert batch.input_ids[row, :length].tolist() == window.input_ids
        assert (batch.input_ids[row, length:] == 9).all() and not batch.attention_mask[row, length:].any()
        assert batch.type_ids[row, :length].tolist() == window.type_ids and not batch.type_ids[row, length:].any()
        inside = [place for place, pair in enumerate(window.offsets) if pair != (-1, -1)]
        assert batch.context_mask[row].nonzero().flatten().tolist() == inside
    assert batch.starts.tolist() == [windows[1].start, windows[0].start, 0]
    assert batch.ends.tolist() == [windows[1].end, windows[0].end, 0]
    assert {batch.input_ids.dtype, batch.type_ids.dtype, batch.starts.dtype, batch.ends.dtype} == {torch.int64}
    assert batch.attention_mask.dtype == batch.context_mask.dtype == torch.bool
