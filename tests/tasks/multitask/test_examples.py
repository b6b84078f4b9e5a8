"""Files of every format and what is wrong with them, official rows, the development data's wrapping, splits."""

import json
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest

from tasks.multitask.examples import (
    GENERATED,
    OFFICIAL,
    Example,
    cap_tasks,
    check_examples,
    check_tasks,
    generate_examples,
    hold_out,
    load_official,
    plain_question,
    read_examples,
    split_choices,
    tasks_of,
)
from tests.tasks.multitask.builders import ARC
from zoo.errors import DataNotFoundError, UnknownNameError

ROWS = [
    {"task": "mood", "text": "good film", "text2": "", "choices": [], "label": "positive"},
    {"task": "mood", "text": "bad film", "text2": "really", "choices": [], "label": "negative"},
    {"task": "which", "text": "an animal", "text2": "", "choices": ["cat", "saw"], "label": "cat"},
]


def write(folder, suffix, rows):
    path = folder / f"own{suffix}"
    if suffix == ".csv":
        table = [row | {"choices": json.dumps(row["choices"])} if "choices" in row else row for row in rows]
        pd.DataFrame(table).to_csv(path, index=False)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    first, second, third = read_examples(write(tmp_path, suffix, ROWS))
    assert (first.task, first.text, first.label, first.kind) == ("mood", "good film", "positive", "classes")
    assert second.text2 == "really" and not first.text2
    assert (third.kind, third.choices, third.label) == ("choices", ("cat", "saw"), "cat")
    assert tasks_of([first, second, third]) == {"mood": ["negative", "positive"], "which": []}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_columns_are_renamed_and_prompts_are_free_text(tmp_path, suffix):
    path = write(
        tmp_path, suffix, [{"sentence": "a", "gold": 1, "text": "no"}, {"sentence": "b", "gold": 0, "text": "no"}]
    )
    found = read_examples(path, {"text": "sentence", "label": "gold"})
    assert [(e.text, e.label, e.task) for e in found] == [("a", "1", "own"), ("b", "0", "own")]
    path = write(tmp_path, suffix, [{"prompt": "a", "target": "b c"}])
    (free,) = read_examples(path)
    assert (free.text, free.label, free.kind) == ("a", "b c", "text")
    assert tasks_of([free]) == {"own": None}
    (read,) = read_examples(path, {"text": "prompt", "label": "target"})
    assert read.kind == "classes"
    path = write(tmp_path, suffix, [{"prompt": "a", "target": "b", "choices": ["b", "c"]}])
    (choice,) = read_examples(path)
    assert (choice.text, choice.label, choice.kind, choice.choices) == ("a", "b", "choices", ("b", "c"))


def test_a_line_of_json_may_hold_what_ends_lines_elsewhere(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"text": "a\u2028b", "label": "x"}, {"text": "c\u0085d", "label": "y"}]
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert [example.text for example in read_examples(path)] == ["a\u2028b", "c\u0085d"]


def test_a_column_of_numbers_with_a_gap_keeps_whole_numbers(tmp_path):
    path = write(tmp_path, ".parquet", [{"text": "a", "label": 1.0}, {"text": "b", "label": None}])
    assert [example.label for example in read_examples(path, labelled=False)] == ["1", None]
    with pytest.raises(ValueError, match="of 2 examples, 1 without a label: 1"):
        read_examples(path)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a"}], "has no column label: found text.*data.columns says"),
        ([{"label": "a"}], "has no column text"),
        ([{"text": " ", "label": "x"}], "1 without a text: 0"),
        ([{"text": "a", "label": "x", "choices": ["y", "z"]}], "'x', to choose from y, z"),
        ([{"text": "a", "label": "y", "choices": ["y", "y"]}], "1 without two different choices"),
        (
            [{"text": "a", "label": "y", "choices": ["y", "z"]}, {"text": "b", "label": "y", "choices": []}],
            "others have none",
        ),
    ],
)
def test_bad_rows(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        read_examples(write(tmp_path, ".jsonl", rows))


ARC_CHOICES = {"text": ["cat", "saw"], "label": ["A", "B"]}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (
            {"choices": ARC_CHOICES},
            r"'choices' holds a dict, \"{'text': .*must be a list of texts, in a CSV file as JSON",
        ),
        ({"choices": [["cat"], ["saw"]]}, "'choices' holds a .*must be a list of texts"),
        ({"choices": ["cat", None]}, "'choices' holds a .*must be a list of texts"),
        ({"choices": 2}, "'choices' holds a (int|float), '2(.0)?'; choices must be a list"),
        ({"text": ["a", "b"]}, "'text' holds a (list|ndarray), .*each cell has to be a text"),
        ({"text2": {"a": 1}}, "'text2' holds a dict, .*each cell has to be a text"),
        ({"label": ["x"]}, "'label' holds a (list|ndarray)"),
        ({"id": ["x"]}, "'id' holds a"),
        ({"task": ["x"]}, "'task' holds a"),
    ],
)
def test_cells_that_are_no_texts_are_refused(tmp_path, suffix, cell, words):
    good, bad = {"text": "a", "label": "cat"}, {"text": "b", "label": "cat"} | cell
    rows = [good, bad] if not good.keys() & cell.keys() else [bad, bad]
    path = write(tmp_path, suffix, rows)
    number = 1 + rows.index(bad)
    with pytest.raises(ValueError, match=rf"own\{suffix}: row {number} of the column {words}"):
        read_examples(path)


def test_numbers_among_choices_are_texts(tmp_path):
    (read,) = read_examples(write(tmp_path, ".jsonl", [{"text": "a", "label": 2, "choices": [1, 2]}]))
    assert (read.choices, read.label) == (("1", "2"), "2")


def test_bad_files(tmp_path):
    (tmp_path / "fields.csv").write_text("text,task\na moving, clever film,sst2\n")
    with pytest.raises(ValueError, match="more fields than the header"):
        read_examples(tmp_path / "fields.csv")
    with pytest.raises(DataNotFoundError, match=r"\.csv, \.jsonl, \.parquet"):
        read_examples(tmp_path / "none.csv")
    (tmp_path / "own.txt").write_text("a")
    with pytest.raises(UnknownNameError, match=r"Unknown format of examples '\.txt'"):
        read_examples(tmp_path / "own.txt")
    for name, content, words in (
        ("empty.csv", b"", "comma-separated"),
        ("head.csv", b"text,label\n", "holds no example"),
        ("latin.csv", "text,label\ncafé,x\n".encode("latin-1"), "is not UTF-8.*iconv"),
        ("half.jsonl", b'{"text": "a", "label": "b"}\n{"text": ', "line 2 is not JSON"),
        ("list.jsonl", b"[1]\n", "line 1 is no JSON object"),
        (
            "choices.csv",
            b"text,label,choices\na,b,b or c\n",
            "row 1 of the column 'choices' holds a str, 'b or c'; choices must be a list",
        ),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_examples(tmp_path / name)
    path = write(tmp_path, ".jsonl", ROWS)
    with pytest.raises(ValueError, match="has no column 'sentence': found task, text, text2, choices, label"):
        read_examples(path, {"text": "sentence"})
    with pytest.raises(UnknownNameError, match="Unknown column 'words'"):
        read_examples(path, {"words": "text"})


def test_a_task_of_one_class_is_refused():
    with pytest.raises(ValueError, match="'mood' have the label 'x': with one class there is nothing to learn"):
        tasks_of([Example("0", "mood", "a", label="x"), Example("1", "mood", "b", label="x")])


def test_what_a_model_does_not_know_is_said():
    tasks = {"mood": ["negative", "positive"], "which": [], "say": None}
    check_tasks([Example("0", "mood", "a", label="positive"), Example("1", "say", "a")], tasks)
    with pytest.raises(UnknownNameError, match=r"label of the task 'mood' 'positiv'\. Did you mean 'positive'"):
        check_tasks([Example("0", "mood", "a", label="positiv")], tasks)
    with pytest.raises(UnknownNameError, match="Unknown task 'moot'"):
        check_tasks([Example("0", "moot", "a")], tasks)
    for example in (Example("0", "which", "a"), Example("0", "mood", "a", kind="choices", choices=("a", "b"))):
        with pytest.raises(ValueError, match="give it choices where it needs them"):
            check_tasks([example], tasks)


# --- official sets ---------------------------------------------------------------------------------------------------


def fake(name: str) -> datasets.Dataset:
    """Two rows as the hub has them."""
    label = datasets.ClassLabel(names=["bad", "good"])
    if name in ("arc_easy", "arc_challenge", "commonsenseqa", "openbookqa"):
        asked = "question_stem" if name == "openbookqa" else "question"
        choices = {"text": ["ice", "fire"], "label": ["A", "B"]}
        return datasets.Dataset.from_list([{asked: "what is hot", "choices": choices, "answerKey": "B"}] * 2)
    if name == "boolq":
        return datasets.Dataset.from_list([{"question": "is it", "passage": "it is", "answer": True}] * 2)
    columns = {
        "cola": ("sentence",),
        "sst2": ("sentence",),
        "qnli": ("question", "sentence"),
        "qqp": ("question1", "question2"),
        "mnli": ("premise", "hypothesis"),
    }.get(name, ("sentence1", "sentence2"))
    rows = {column: [f"{column} a", f"{column} b"] for column in columns} | {"label": [1, 0]}
    features = datasets.Features({column: datasets.Value("string") for column in columns} | {"label": label})
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_rows(monkeypatch, name):
    asked = []

    def load(path, config, split):
        asked.append((path, config, split))
        return fake(name)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for part in ("train", "test"):
        first, second = load_official(name, part)
    official = OFFICIAL[name]
    assert asked == [(official.path, official.config, split) for split in ("train", official.test)]
    assert first.task == name and first.id != second.id
    if official.path.startswith("nyu"):
        assert (first.label, second.label) == ("good", "bad") and first.text.endswith(" a")
        assert bool(first.text2) == (name not in ("cola", "sst2"))
    elif name == "boolq":
        assert (first.label, first.text2) == ("true", "it is")
    else:
        assert (first.kind, first.choices, first.label) == ("choices", ("ice", "fire"), "fire")


def test_official_sets_need_a_network(monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataNotFoundError, match=r"the split 'train' of cola.*no route.*source=generated"):
        load_official("cola", "train")
    with pytest.raises(UnknownNameError, match="official task 'colla'"):
        load_official("colla", "train")


# --- the development data --------------------------------------------------------------------------------------------


def test_wrapping_is_taken_off_and_options_become_choices():
    plain = plain_question(Example("0", "arc_easy", ARC, label="answer2"))
    assert plain.text == "What is hot?\n\nAnswer1: ice Answer2: fire, or so Answer3: snow"
    found = split_choices(plain)
    assert (found.text, found.choices, found.label) == ("What is hot?", ("ice", "fire, or so", "snow"), "fire, or so")
    asked = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"
    assert plain_question(Example("0", "boolq", asked)).text == "is it?"
    untouched = Example("0", "cola", "He said Answer1: no.", label="acceptable")
    assert split_choices(plain_question(untouched)) == untouched
    with pytest.raises(ValueError, match="'answer4' is none of answer1, answer2, answer3"):
        split_choices(plain_question(Example("0", "arc_easy", ARC, label="answer4")))


# --- generated, splits -----------------------------------------------------------------------------------------------


def test_generated_examples_are_seeded_and_whole():
    first, again, other = (generate_examples(list(GENERATED), 30, seed) for seed in (1, 1, 2))
    assert first == again != other
    check_examples(first, "generated")
    assert {name: kind for name, kind in tasks_of(first).items() if not kind} == {"which": [], "colour": None}
    with pytest.raises(UnknownNameError, match="generated task 'moods'"):
        generate_examples(["moods"], 3)


def test_held_out_examples_share_no_text_and_keep_the_classes():
    random = np.random.default_rng(0)
    examples = [
        Example(str(number), task, f"{task} {random.integers(200)}", label=str(int(random.random() < share)))
        for task, share in (("a", 0.2), ("b", 0.5))
        for number in range(400)
    ]
    learned, held = hold_out(examples, 0.25, seed=3)
    assert len(learned) + len(held) == len(examples)
    assert not {(e.task, e.text) for e in learned} & {(e.task, e.text) for e in held}
    for task in ("a", "b"):
        shares = [np.mean([e.label == "1" for e in part if e.task == task]) for part in (learned, held)]
        assert shares[0] == pytest.approx(shares[1], abs=0.1)
        assert 0.2 < sum(e.task == task for e in held) / 400 < 0.3
    assert hold_out(examples, 0.25, seed=3) == (learned, held) != hold_out(examples, 0.25, seed=4)
    # The same question with other choices is another example.
    same = [Example(str(n), "c", "which", label=str(n), kind="choices", choices=(str(n), "x")) for n in range(10)]
    assert len(hold_out(same, 0.2)[1]) == 2
    with pytest.raises(ValueError, match="must be above 0 and below 1"):
        hold_out(examples, 1.0)
    with pytest.raises(ValueError, match="task 'd' has too few examples"):
        hold_out([Example(str(n), "d", str(n), label=str(n)) for n in range(3)], 0.1)


def test_a_cap_keeps_small_tasks_whole():
    examples = [Example(f"{task}{n}", task, str(n)) for task, count in (("a", 5), ("b", 50)) for n in range(count)]
    kept = cap_tasks(examples, 10, seed=1)
    assert Counter(example.task for example in kept) == {"a": 5, "b": 10}
    assert [examples.index(example) for example in kept] == sorted(examples.index(example) for example in kept)
    assert {e.id for e in kept if e.task == "b"} != {f"b{n}" for n in range(10)}
    assert cap_tasks(examples, None) == examples
