"""Rows of encoders and causal models: what they hold, what is cut, what is scored, how they are padded."""

from dataclasses import replace

import pytest
import torch

from tasks.multitask.encode import UNKNOWN, Form, TaskDataset, asking, encode, padding_of
from tasks.multitask.examples import Example
from tests.tasks.multitask.builders import tokenizer as tokenizer_of
from zoo.errors import UnknownNameError

TASKS = {"mood": ["negative", "positive"], "which": [], "colour": None}
MOOD = Example("0", "mood", "the film was great", "the book was poor", "positive")
SINGLE = Example("1", "mood", "the film was great", "", None)
WHICH = Example("2", "which", "which of these is a tool", "the film", "saw", "choices", ("cat", "saw", "bread"))
COLOUR = Example("3", "colour", "what colour has sky", "", "blue", "text")
ENCODER = Form("base", TASKS)
VERBALISED = Form("base", TASKS, verbalised=True)
CAUSAL = Form("base", TASKS, causal=True)


def told(tokenizer, row):
    return tokenizer.decode(row.ids)


def test_an_encoder_reads_two_segments_or_one_row_per_choice():
    tokenizer = tokenizer_of()
    pair, single, choice = encode([MOOD, SINGLE, WHICH], tokenizer, ENCODER, 64)
    assert told(tokenizer, pair.rows[0]) == "[CLS] the film was great [SEP] the book was poor [SEP]"
    assert pair.rows[0].types == [0] * 6 + [1] * 5 and pair.label == 1
    assert told(tokenizer, single.rows[0]) == "[CLS] the film was great [SEP]" and single.label == UNKNOWN
    assert [told(tokenizer, row) for row in choice.rows] == [
        f"[CLS] which of these is a tool the film [SEP] {option} [SEP]" for option in WHICH.choices
    ]
    assert choice.label == 1


def test_verbalised_classes_are_read_as_choices():
    tokenizer = tokenizer_of()
    (pair,) = encode([MOOD], tokenizer, VERBALISED, 64)
    assert [told(tokenizer, row) for row in pair.rows] == [
        f"[CLS] the film was great the book was poor [SEP] {name} [SEP]" for name in TASKS["mood"]
    ]
    assert pair.label == 1


def test_a_causal_model_scores_the_answer_alone():
    tokenizer = tokenizer_of(causal=True)
    mood, colour = encode([MOOD, COLOUR], tokenizer, CAUSAL, 64)
    asked = "the film was great the book was poor options : negative ; positive answer :"
    assert [told(tokenizer, row) for row in mood.rows] == [f"{asked} negative", f"{asked} positive"]
    assert [row.scored for row in mood.rows] == [1, 1] and mood.label == 1
    # Free text is learned with its end.
    assert [told(tokenizer, row) for row in colour.rows] == ["what colour has sky answer : blue </s>"]
    assert colour.rows[0].scored == 2 and colour.label == 0
    (learned,) = encode([MOOD], tokenizer, CAUSAL, 64, learning=True)
    assert learned.rows == [mood.rows[1]] and learned.label == 0
    assert asking(["not_and", "b"]) == "\nOptions: not and; b\nAnswer:" and asking(()) == "\nAnswer:"


def test_rows_are_filled_with_what_is_in_no_answer():
    tokenizer = tokenizer_of(causal=True)
    assert padding_of(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert padding_of(tokenizer) == tokenizer.eos_token_id


def test_text_is_cut_and_answers_are_not():
    encoder, causal = tokenizer_of(), tokenizer_of(causal=True)
    (pair,) = encode([MOOD], encoder, ENCODER, 7)
    assert len(pair.rows[0].ids) == 7
    (which,) = encode([WHICH], encoder, ENCODER, 6)
    assert [told(encoder, row) for row in which.rows] == [
        f"[CLS] which of [SEP] {name} [SEP]" for name in WHICH.choices
    ]
    long = replace(WHICH, label="cat", choices=("cat", "the film was great the book was poor"))
    assert told(encoder, encode([long], encoder, ENCODER, 12)[0].rows[1]).endswith(
        "[SEP] the film was great the book was poor [SEP]"
    )
    with pytest.raises(
        ValueError, match=r"max_length=11 leaves no room for a text beside the option 'the film.* of 8 tokens"
    ):
        encode([long], encoder, ENCODER, 11)
    (row,) = encode([MOOD], causal, CAUSAL, 11, learning=True)
    assert told(causal, row.rows[0]) == "the film was options : negative ; positive answer : positive"
    with pytest.raises(
        ValueError, match=r"max_length=8 leaves no room for the text of '0' beside 7 tokens of question"
    ):
        encode([MOOD], causal, CAUSAL, 8)


def test_what_cannot_be_read():
    with pytest.raises(ValueError, match="which an encoder cannot give"):
        encode([COLOUR], tokenizer_of(), ENCODER, 64)
    with pytest.raises(UnknownNameError, match="Unknown task 'other'"):
        ENCODER.options(Example("0", "other", "a"))


@pytest.mark.parametrize("form", [ENCODER, CAUSAL])
def test_batches_hold_rows_padded_on_the_right_or_left(form):
    dataset = TaskDataset([SINGLE, WHICH, MOOD], tokenizer_of(form.causal), form, 64)
    batch = dataset.collate([1, 0], pad_id=0)
    rows = [row for place in (1, 0) for row in dataset.encoded[place].rows]
    longest = max(len(row.ids) for row in rows)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.type_ids.shape == (len(rows), longest)
    for ids, mask, row in zip(batch.input_ids, batch.attention_mask, rows, strict=True):
        assert ids[mask].tolist() == row.ids and not ids[~mask].any()
        assert mask[-1 if form.causal else 0] and mask.sum() == len(row.ids)
    assert batch.owners.tolist() == [0, 0, 0] + [1] * (len(rows) - 3)
    assert batch.options.tolist() == [0, 1, 2, *range(len(rows) - 3)]
    assert batch.tasks.tolist() == [1, 0] and batch.labels.tolist() == [1, UNKNOWN] and batch.places == [1, 0]
    assert batch.scored.tolist() == [row.scored for row in rows]
    assert torch.equal(batch.inputs[0], batch.input_ids) and len(batch.inputs) == 7
    assert dataset.costs == [max(len(row.ids) for row in of.rows) for of in dataset.encoded]
    assert dataset.tokens == sum(len(row.ids) for of in dataset.encoded for row in of.rows)
