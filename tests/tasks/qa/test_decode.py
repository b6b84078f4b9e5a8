"""Decoding against a loop over all spans, and on real windows of real tokens."""

import re
from dataclasses import dataclass

import numpy as np
import pytest

from tasks.qa.decode import Answer, decode
from tasks.qa.examples import Example, generate_examples
from tasks.qa.windows import Window, make_windows
from tests.helpers import bases
from tests.tasks.qa.builders import word_pieces

OUTSIDE = (-1, -1)


@dataclass
class Case:
    examples: list[Example]
    windows: list[Window]
    starts: list[np.ndarray]
    ends: list[np.ndarray]

    def decode(self, **options) -> list[list[Answer]]:
        return decode(self.examples, self.windows, self.starts, self.ends, **options)


def example(context: str, name: str = "q") -> Example:
    return Example(name, "domain", "document", "What?", context)


def window(of: int, pieces: list[tuple[int, int]], question: int = 2) -> Window:
    offsets = [OUTSIDE] * (question + 2) + pieces + [OUTSIDE]
    return Window(of, [1] * len(offsets), [0] * len(offsets), offsets, 0, 0)


def case(contexts: list[str], windows: list[Window], seed: int = 0) -> Case:
    random = np.random.default_rng(seed)
    starts, ends = ([random.normal(0, 2, len(piece.offsets)) for piece in windows] for _ in range(2))
    examples = [example(context, f"q{place}") for place, context in enumerate(contexts)]
    return Case(examples, windows, starts, ends)


def random_case(seed: int) -> Case:
    """Examples of one to four overlapping windows of any size, all windows shuffled."""
    random = np.random.default_rng(seed)
    contexts, windows = [], []
    for number in range(6):
        cuts = np.cumsum(random.integers(1, 6, size=2 * int(random.integers(1, 40))))
        tokens = [(int(start), int(end)) for start, end in cuts.reshape(-1, 2)]
        contexts.append("".join(random.choice(list("abcdefgh"), cuts[-1] + 3)))
        size, step = int(random.integers(3, 15)), int(random.integers(1, 12))
        firsts = range(0, min(max(len(tokens) - size, 0) + step, 4 * step), step)
        for first in firsts:
            windows.append(window(number, tokens[first : first + size], int(random.integers(0, 5))))
    random.shuffle(windows)
    return case(contexts, windows, seed)


def loop(of: Case, longest: int, penalty: float | None) -> list[list[Answer]]:
    """Every span of every window."""
    found: list[dict[tuple[int, int], float]] = [{} for _ in of.examples]
    nothing = [np.inf] * len(of.examples)
    for piece, starts, ends in zip(of.windows, of.starts, of.ends, strict=True):
        spans = found[piece.example]
        if any(pair != OUTSIDE for pair in piece.offsets):
            nothing[piece.example] = min(nothing[piece.example], starts[0] + ends[0])
        for start, first in enumerate(piece.offsets):
            for end in range(start, min(start + longest, len(piece.offsets))):
                last = piece.offsets[end]
                if first != OUTSIDE and last != OUTSIDE:
                    score = starts[start] + ends[end]
                    place = first[0], last[1]
                    spans[place] = max(spans.get(place, -np.inf), score)
    answers = []
    for asked, spans, score in zip(of.examples, found, nothing, strict=True):
        if penalty is not None:
            spans[-1, -1] = score - penalty
        total = sum(np.exp(score) for score in spans.values())
        ranked = sorted(spans, key=spans.__getitem__, reverse=True)
        answers.append(
            [
                Answer("" if start < 0 else asked.context[start:end], np.exp(spans[start, end]) / total, start, end)
                for start, end in ranked
            ]
        )
    return answers


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("n_best", "longest", "penalty"), [(1, 5, None), (20, 1, None), (7, 30, 0.0), (1000, 30, 3.0), (300, 30, None)]
)
def test_decoding_is_a_loop_over_all_spans(seed, n_best, longest, penalty) -> None:
    of = random_case(seed)
    options = {} if penalty is None else {"allow_no_answer": True, "threshold": penalty}
    found = of.decode(n_best=n_best, max_answer_tokens=longest, **options)
    for ours, all_spans in zip(found, loop(of, longest, penalty), strict=True):
        assert len(ours) == min(n_best, len(all_spans))
        assert [(a.text, a.start, a.end) for a in ours] == [(a.text, a.start, a.end) for a in all_spans[:n_best]]
        np.testing.assert_allclose([a.score for a in ours], [a.score for a in all_spans[:n_best]], rtol=1e-9)


def test_probabilities_of_all_candidates_add_up_to_one() -> None:
    for answers in random_case(3).decode(n_best=10_000, allow_no_answer=True):
        assert sum(answer.score for answer in answers) == pytest.approx(1)
        assert len({(answer.start, answer.end) for answer in answers}) == len(answers)


def test_any_token_alone_can_be_the_answer_the_last_one_too() -> None:
    context = "one two three"
    tokens = [(0, 3), (4, 7), (8, 13)]
    for wanted, (start, end) in enumerate(tokens):
        of = case([context], [window(0, tokens)])
        of.starts[0][4 + wanted] = of.ends[0][4 + wanted] = 50
        (best, *_), *_ = of.decode()
        assert (best.text, best.start, best.end) == (context[start:end], start, end)
        assert best.score == pytest.approx(1)


def test_logits_outside_the_context_count_for_nothing() -> None:
    of = random_case(1)
    before = of.decode()
    for piece, starts, ends in zip(of.windows, of.starts, of.ends, strict=True):
        outside = [place for place, pair in enumerate(piece.offsets) if pair == OUTSIDE]
        starts[outside], ends[outside] = 99, 77
    assert of.decode() == before
    assert all(answer.text for answers in before for answer in answers)


def test_a_span_in_two_windows_is_one_answer() -> None:
    tokens = [(0, 1), (2, 3), (4, 5), (6, 7)]
    of = case(["a b c d"], [window(0, tokens[:3]), window(0, tokens[1:], question=3)])
    for row, place in enumerate((5, 5)):
        of.starts[row][place] = of.ends[row][place] = 30 + row
    answers = of.decode()[0]
    assert answers[0].text == "b" and [answer.start for answer in answers].count(2) == 3
    assert answers[0].score == pytest.approx(1)


def test_windows_are_compared_by_their_logits() -> None:
    of = case(["a b"], [window(0, [(0, 1)]), window(0, [(2, 3)])])
    for row, logit in enumerate((1.0, 2.0)):
        of.starts[row][:], of.ends[row][:] = logit, logit
    first, second = of.decode()[0]
    assert (first.text, second.text) == ("b", "a")
    assert first.score / second.score == pytest.approx(np.exp(2))


def test_no_answer_needs_every_window_and_the_threshold() -> None:
    of = case(["a b"], [window(0, [(0, 1)]), window(0, [(2, 3)])])
    for logits in (*of.starts, *of.ends):
        logits[:] = 0
    of.starts[0][0], of.starts[1][0] = 9, 4
    of.starts[1][4] = 1
    assert [answer.text for answer in of.decode()[0]] == ["b", "a"]
    assert [answer.text for answer in of.decode(allow_no_answer=True)[0]] == ["", "b", "a"]
    none = of.decode(allow_no_answer=True, threshold=2.5)[0][0]
    assert (none.text, none.start, none.end) == ("", -1, -1)
    assert none.score == pytest.approx(np.exp(1.5) / (np.exp(1.5) + np.e + 1))
    # A tie is an answer.
    assert of.decode(allow_no_answer=True, threshold=3)[0][0].text == "b"
    assert of.decode(allow_no_answer=True, threshold=3.5)[0][0].text == "b"


@pytest.mark.parametrize("options", [{}, {"allow_no_answer": True, "threshold": 5.0}])
def test_without_a_token_of_context_there_is_no_answer(options) -> None:
    of = case(["   ", "a b", "c"], [window(0, []), window(1, [(0, 1), (2, 2), (2, 3)]), window(1, [])])
    empty, full, none = of.decode(**options)
    assert empty == none == [Answer("", 1.0, -1, -1)]
    texts = {answer.text for answer in full}
    assert texts - {""} == {"a", "b", "a b"} and ("" in texts) == bool(options)


def test_tokens_of_the_same_character_are_one() -> None:
    """Byte-level tokenizers cut one character into several tokens."""
    tokens = [(0, 1), (2, 3), (2, 3), (2, 3), (4, 5)]
    of = case(["a é b c d"], [window(0, tokens), window(0, [*tokens[2:], (6, 7)]), window(0, [(6, 7), (8, 9)])])
    of.starts[0][6], of.ends[0][7] = 20, 20
    best = of.decode(max_answer_tokens=2)[0]
    assert best[0].text == "é" and best[0].score == pytest.approx(1)
    assert sorted(answer.text for answer in best) == ["a", "a é", "b", "b c", "c", "c d", "d", "é", "é b"]


def test_text_is_cut_from_the_context() -> None:
    """The tokenizer lowers case, strips accents and splits words; labels of its windows are decoded to the answers."""
    context = 'Ms. São-Tomé  ("ST") paid £1,000.50\tin ISTANBUL; then\nshe left for Ürümqi at 5 p.m. ' * 6
    cases = ["São-Tomé", '("ST")', "£1,000.50\tin", "ISTANBUL; then\nshe", "Ürümqi", "5 p.m."]
    asked = [
        Example(str(place), "domain", "document", "Where to?", context, (text,), (context.index(text, 90),))
        for place, text in enumerate(cases)
    ]
    windows = make_windows(asked, bases.word_pieces([context]), max_length=60, stride=20)
    starts, ends = ([np.zeros(len(piece.offsets), np.float16) for piece in windows] for _ in range(2))
    for place, piece in enumerate(windows):
        if piece.end:
            starts[place][piece.start] = ends[place][piece.end] = 20
    assert len(windows) > 3 * len(asked)
    for of, answers in zip(asked, decode(asked, windows, starts, ends), strict=True):
        assert (answers[0].text, answers[0].start) == (of.answers[0], of.starts[0])
        assert answers[0].score > 0.99


def test_generated_questions_are_decoded() -> None:
    asked = generate_examples(40)
    windows = make_windows(asked, word_pieces(), max_length=40, stride=12)
    starts, ends = ([np.zeros(len(piece.offsets), np.float32) for piece in windows] for _ in range(2))
    held = set()
    for place, piece in enumerate(windows):
        if piece.end:
            starts[place][piece.start] = ends[place][piece.end] = 5
            held.add(piece.example)
    assert len(held) > 30
    for place, answers in enumerate(decode(asked, windows, starts, ends)):
        assert place not in held or answers[0].text == asked[place].answers[0]


def test_half_precision_is_enough_of_a_model() -> None:
    """Sums and probabilities are computed in double precision."""
    of = random_case(2)
    of.starts, of.ends = ([100 + logits.astype(np.float16) for logits in side] for side in (of.starts, of.ends))
    exactly = Case(of.examples, of.windows, *([row.astype(float) for row in side] for side in (of.starts, of.ends)))
    assert of.decode(allow_no_answer=True) == exactly.decode(allow_no_answer=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_best": 0}, "n_best=0"),
        ({"max_answer_tokens": 0}, "max_answer_tokens=0"),
        ({"end_logits": []}, "0 ends"),
        ({"start_logits": [np.zeros(9)]}, "'q0' has 6 tokens, but 9 start logits and 6 end logits: cut the padding"),
        ({"end_logits": [np.zeros(5)]}, "but 6 start logits and 5 end logits"),
        ({"start_logits": [np.full(6, np.nan)]}, "'q0' are not finite"),
        ({"end_logits": [np.full(6, np.inf)]}, "'q0' are not finite"),
    ],
)
def test_refusals(change, message) -> None:
    of = case(["a"], [window(0, [(0, 1)])])
    given = {"start_logits": of.starts, "end_logits": of.ends} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        decode(of.examples, of.windows, **given)
