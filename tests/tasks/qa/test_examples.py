"""Questions from files, official sources and the generator: what is read, what is refused, how parts are divided."""

import json
import os
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from tasks.qa.examples import (
    GENERATED,
    GENERATED_OOD,
    OWN_DOMAIN,
    Example,
    check_examples,
    count_repeated,
    folds,
    from_dataset,
    generate_examples,
    load_official,
    merge_rows,
    name_documents,
    read_examples,
    read_text,
    split_by_document,
)
from zoo.data import ENVIRONMENT_VARIABLE
from zoo.errors import DataNotFoundError, UnknownNameError

CONTEXT = "Rollo was a Norman. The Normans gave their name to Normandy, a region in France."


def example(id_: str = "q1", answer: str | None = "France", **changes: Any) -> Example:
    made = Example(id_, "squad", "Normans", "Where is Normandy?", CONTEXT)
    if answer is not None:
        made = replace(made, answers=(answer,), starts=(CONTEXT.find(answer),))
    return replace(made, **changes)


# --- parquet ---------------------------------------------------------------------------------------------------------


def table(examples: list[Example]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "domain": [e.domain for e in examples],
            "id": [e.id for e in examples],
            "title": [e.document for e in examples],
            "context": [e.context for e in examples],
            "question": [e.question for e in examples],
            "answers": [list(e.answers) for e in examples],
            "answer_starts": [list(e.starts) for e in examples],
            "further": 1,
        }
    )


def test_parquet_in_the_layout_of_the_development_data(tmp_path: Path) -> None:
    examples = [
        example("a", answers=("France", "in France"), starts=(CONTEXT.find("France"), CONTEXT.find("in France"))),
        example("b", None, document="Rollo"),
    ]
    table(examples).to_parquet(tmp_path / "q.parquet")
    assert read_examples(tmp_path / "q.parquet") == examples


def test_a_missing_value_counts_as_empty(tmp_path: Path) -> None:
    rows = table([example("a"), example("b", document="Rollo"), example("c", None, document="Bors")])
    rows.loc[0, "title"] = None
    rows.at[2, "answers"] = rows.at[2, "answer_starts"] = None
    rows.to_parquet(tmp_path / "q.parquet")
    first, _, last = read_examples(tmp_path / "q.parquet")
    assert first.document == CONTEXT and last.answers == ()
    rows.loc[1, "context"] = None
    rows.to_parquet(tmp_path / "q.parquet")
    with pytest.raises(ValueError, match="1 with empty context: b"):
        read_examples(tmp_path / "q.parquet")


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        ("question", ["Where?", "When?"], r"holds a ndarray, .*Where.*; each cell has to be a text\."),
        ("context", {"text": "a"}, "holds a dict, .*; each cell has to be a text"),
        ("id", [1, 2], "holds a ndarray"),
        ("answers", "France", "holds a str, 'France'; each cell has to be a list of texts"),
        ("answers", [1815], "holds a ndarray, '.1815.'; each cell has to be a list of texts"),
        ("answers", {"text": ["France"]}, "holds a dict, .*; each cell has to be a list of texts"),
        ("answer_starts", 5, "holds a (int|float), '5(.0)?'; each cell has to be a list of whole numbers"),
        ("answer_starts", [5.5], "holds a ndarray, '.5.5.'; each cell has to be a list of whole numbers"),
        ("answer_starts", ["5"], "holds a ndarray, .*; each cell has to be a list of whole numbers"),
    ],
)
def test_cells_of_another_kind_are_refused(tmp_path: Path, column: str, cell: Any, words: str) -> None:
    rows = table([example("a"), example("b")])
    # A column of a parquet file is of one kind.
    rows[column] = [None, cell]
    rows.to_parquet(tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=rf"q\.parquet: row 2 of the column '{column}' {words}"):
        read_examples(tmp_path / "q.parquet")


def test_numbers_of_questions_and_whole_offsets_are_read(tmp_path: Path) -> None:
    rows = table([example("a"), example("b")])
    rows["id"] = [7, 8]
    rows["answer_starts"] = [[float(CONTEXT.find("France"))]] * 2
    rows.to_parquet(tmp_path / "q.parquet")
    first, second = read_examples(tmp_path / "q.parquet")
    assert (first.id, second.id) == ("7", "8") and first.starts == (CONTEXT.find("France"),)


def test_a_missing_column_is_named_beside_what_is_there_and_needed(tmp_path: Path) -> None:
    rows = table([example()]).drop(columns=["answers", "title"])
    rows.to_parquet(tmp_path / "q.parquet")
    with pytest.raises(
        ValueError, match=r"has no column title, answers: found domain, id, .*needed are domain, id, ti"
    ):
        read_examples(tmp_path / "q.parquet")
    with pytest.raises(ValueError, match="has no column title: found"):
        read_examples(tmp_path / "q.parquet", answered=False)
    table([example()]).drop(columns=["answers", "answer_starts"]).to_parquet(tmp_path / "q.parquet")
    (asked,) = read_examples(tmp_path / "q.parquet", answered=False)
    assert (asked.id, asked.answers) == ("q1", ())


def test_rows_of_one_question_become_one_example_with_all_answers(tmp_path: Path) -> None:
    one = example("a")
    other = example("a", "Normandy, a region in France")
    table([one, example("b"), other, one]).to_parquet(tmp_path / "q.parquet")
    first, second = read_examples(tmp_path / "q.parquet")
    assert first.answers == ("France", "Normandy, a region in France") and second.id == "b"
    assert [first.context[s : s + len(a)] for s, a in zip(first.starts, first.answers, strict=True)] == list(
        first.answers
    )
    unlike = merge_rows([one, replace(one, question="When?")])
    with pytest.raises(ValueError, match="1 with id used for another question too: a"):
        check_examples(unlike, "here")


# --- JSON ------------------------------------------------------------------------------------------------------------


def squad(*questions: dict[str, Any], context: str = CONTEXT) -> dict[str, Any]:
    return {
        "version": "v2.0",
        "data": [{"title": "Normans", "paragraphs": [{"context": context, "qas": list(questions)}]}],
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


ASKED = {"id": "q1", "question": "Where is Normandy?"}
FOUND = {"text": "France", "answer_start": CONTEXT.find("France")}


def test_squad_of_both_versions(tmp_path: Path) -> None:
    questions = [
        ASKED | {"answers": [FOUND, {"text": "a region in France", "answer_start": CONTEXT.find("a region")}]},
        ASKED | {"id": "q2", "answers": [], "is_impossible": True, "plausible_answers": [FOUND]},
        ASKED | {"id": "q3", "answers": [FOUND], "is_impossible": False},
        ASKED | {"id": "q4", "answers": [FOUND], "is_impossible": True},
    ]
    first, second, third, fourth = read_examples(write(tmp_path / "q.json", squad(*questions)))
    assert first.answers == ("France", "a region in France") and first.starts == (CONTEXT.find("France"), 61)
    assert (second.id, second.answers, second.starts) == ("q2", (), ())
    assert third.answers == ("France",) and fourth.answers == (), "what is said to be impossible has no answer"
    assert first.domain == OWN_DOMAIN and first.document == CONTEXT, "the only title divides nothing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "no proper 'data' in"),
        ({"data": [{"title": "x"}]}, "no proper 'paragraphs' in .*title"),
        ({"data": [{"title": ["x"], "paragraphs": [{"context": "x", "qas": [ASKED]}]}]}, "no proper 'title' in"),
        (squad({"id": "q1", "answers": [FOUND]}), "no proper 'question' in"),
        (squad(ASKED), "no proper 'answers' in .*Where is"),
        (squad(ASKED | {"answers": [{"text": "France"}]}), "no proper 'answer_start' in"),
        (squad(ASKED | {"question": None, "answers": []}), "no proper 'question' in"),
    ],
)
def test_json_of_another_layout(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_examples(write(tmp_path / "q.json", content))


def test_json_without_answers_is_for_prediction(tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", squad(ASKED))
    assert read_examples(path, answered=False)[0].answers == ()
    path.write_text('{"data": [', encoding="utf-8")
    with pytest.raises(ValueError, match=r"q\.json is not JSON: .*line 1"):
        read_examples(path)


# --- CSV -------------------------------------------------------------------------------------------------------------


def write_csv(path: Path, *rows: dict[str, Any]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_csv_with_and_without_the_optional_columns(tmp_path: Path) -> None:
    plain = {"question": "Who?", "context": CONTEXT, "answer": "Rollo"}
    (made,) = read_examples(write_csv(tmp_path / "q.csv", plain))
    assert made == Example("1", OWN_DOMAIN, CONTEXT, "Who?", CONTEXT, ("Rollo",), (0,))
    full = plain | {"domain": "history", "id": "x7", "title": "Rollo", "answer": "Norman", "start": 20 + 4}
    other = full | {"id": "x8", "title": "Bors", "answer": "", "start": ""}
    first, second = read_examples(write_csv(tmp_path / "q.csv", full, other))
    assert first == Example("x7", "history", "Rollo", "Who?", CONTEXT, ("Norman",), (24,)) and second.answers == ()


def test_csv_takes_the_first_occurrence_and_counts_repeated_ones(tmp_path: Path) -> None:
    row = {"question": "Who?", "context": CONTEXT, "answer": "Norman"}
    made = read_examples(write_csv(tmp_path / "q.csv", row, row | {"answer": "Rollo", "question": "?"}))
    assert made[0].starts == (12,)
    assert count_repeated(made) == 1 and count_repeated([example(None, None)]) == 0


def test_csv_refuses_what_it_cannot_place(tmp_path: Path) -> None:
    (tmp_path / "fields.csv").write_text("question,context\nWhere, tell me?,Ada was born in London.\n")
    with pytest.raises(ValueError, match="more fields than the header"):
        read_examples(tmp_path / "fields.csv", answered=False)
    row = {"question": "Who?", "context": CONTEXT, "answer": "Wace", "id": "w"}
    with pytest.raises(ValueError, match="1 with answer that does not occur in its context: w"):
        read_examples(write_csv(tmp_path / "q.csv", row, row | {"answer": "Rollo", "id": "r"}))
    with pytest.raises(ValueError, match=r"row 1: start='-3' is not a number"):
        read_examples(write_csv(tmp_path / "q.csv", row | {"start": "-3"}))
    with pytest.raises(ValueError, match="has no column answer: found question, context, id; needed are question, con"):
        read_examples(write_csv(tmp_path / "q.csv", {key: row[key] for key in ("question", "context", "id")}))
    (tmp_path / "q.csv").write_text('question,context,answer\na,b,c\na,b,c,"d\n', encoding="utf-8")
    with pytest.raises(ValueError, match="not a table of comma-separated values"):
        read_examples(tmp_path / "q.csv")


def test_line_ends_and_large_fields_keep_their_offsets(tmp_path: Path) -> None:
    context = "one\r\ntwo\nthree " * 12_000 + "the end"
    path = tmp_path / "q.csv"
    path.write_bytes(f'question,context,answer\r\nWhat?,"{context}",the end\r\n'.encode())
    (made,) = read_examples(path)
    assert made.context == context and made.starts == (len(context) - 7,)


# --- encodings -------------------------------------------------------------------------------------------------------


def test_utf8_with_and_without_byte_order_mark(tmp_path: Path) -> None:
    text = 'question,context,answer\nWo?,"Das Café 😀 in Köln",Köln\n'
    for content in (text.encode(), text.encode("utf-8-sig")):
        (tmp_path / "q.csv").write_bytes(content)
        (made,) = read_examples(tmp_path / "q.csv")
        assert made.question == "Wo?" and made.context[made.starts[0] :] == "Köln"
        assert read_text(tmp_path / "q.csv") == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Café".encode("cp1252"), r"byte 0xe9 at position 3 \(line 1\).*iconv -f WINDOWS-1252 -t UTF-8"),
        (
            "Café\nKöln ".encode() + "Zürich".encode("latin-1"),
            r"byte 0xfc at position 13 \(line 2\).*correct that line",
        ),
        ("Café".encode("utf-16"), r"byte 0xff at position 0 \(line 1\).*iconv -f UTF-16 "),
    ],
    ids=["windows", "mixed", "utf16"],
)
def test_other_encodings_are_named_with_the_byte(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "t.txt")


def test_what_is_no_file_of_questions(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"none\.csv"):
        read_examples(tmp_path / "none.csv")
    with pytest.raises(DataNotFoundError, match=r"none\.txt"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "q.jsonl").write_text("{}")
    with pytest.raises(UnknownNameError, match=r"'\.jsonl'.*Allowed: \.csv, \.json, \.parquet"):
        read_examples(tmp_path / "q.jsonl")


# --- checks ----------------------------------------------------------------------------------------------------------


def test_one_error_lists_every_problem() -> None:
    examples = [
        example("good"),
        example("moved", starts=(CONTEXT.find("France") + 1,)),
        example("moved too", starts=(3,)),
        example("beyond", starts=(len(CONTEXT) - 2,)),
        example("before", starts=(-7,)),
        example("no question", question=" \n"),
        example("no context", None, context="\t "),
        example("no answer", answers=(" ",), starts=(5,)),
        example("good", question="Which?"),
    ]
    with pytest.raises(ValueError, match="here: of 9 questions") as caught:
        check_examples(examples, "here")
    message = str(caught.value)
    assert "2 with answer that is not at its offset: moved, moved too" in message
    assert "2 with answer outside its context: beyond, before" in message
    assert "moved has 'France' at 74, where the context says 'rance.'" in message
    for kind, id_ in [("question", "no question"), ("context", "no context"), ("answer", "no answer")]:
        assert f"1 with empty {kind}: {id_}" in message
    assert "1 with id used for another question too: good" in message
    check_examples(examples[:1], "here")
    with pytest.raises(ValueError, match="here holds no question"):
        check_examples([], "here")


def test_a_long_list_of_ids_is_cut_but_counted() -> None:
    with pytest.raises(ValueError, match=r"50 with answer that is not at its offset: n0, .*n19, \.\.\.;? ?"):
        check_examples([example(f"n{number}", starts=(0,)) for number in range(50)], "here")


def test_answers_without_places_are_refused() -> None:
    with pytest.raises(ValueError, match="'q1' has 2 answers, but 1 offsets"):
        example(answers=("a", "b"), starts=(0,))


def test_documents_are_titles_unless_a_domain_has_but_one() -> None:
    named = name_documents(
        [
            example("a", domain="wiki", document="Normans"),
            example("b", domain="wiki", document="Rollo"),
            example("c", domain="wiki", document=""),
            example("d", domain="reviews", document="all"),
            example("e", domain="reviews", document="all"),
        ]
    )
    assert [e.document for e in named] == ["Normans", "Rollo", CONTEXT, CONTEXT, CONTEXT]


# --- official sources ------------------------------------------------------------------------------------------------


def test_squad_through_datasets() -> None:
    rows = datasets.Dataset.from_list(
        [
            {"id": "1", "title": "Normans", "context": CONTEXT, "question": "Where?", "answers": answers}
            for answers in [{"text": ["France"], "answer_start": [73]}]
        ]
        + [
            {
                "id": "2",
                "title": "Rollo",
                "context": CONTEXT,
                "question": "When?",
                "answers": {"text": [], "answer_start": []},
            }
        ]
    )
    first, second = from_dataset(rows, "squad_v2")
    assert first == Example("1", "squad_v2", "Normans", "Where?", CONTEXT, ("France",), (73,))
    assert second.answers == () and second.document == "Rollo"


def test_mrqa_through_datasets_has_inclusive_spans_and_subsets_for_domains() -> None:
    feature = datasets.Features(
        {
            "subset": datasets.Value("string"),
            "context": datasets.Value("string"),
            "qid": datasets.Value("string"),
            "question": datasets.Value("string"),
            "detected_answers": datasets.Sequence(
                {
                    "text": datasets.Value("string"),
                    "char_spans": datasets.Sequence({"start": datasets.Value("int32"), "end": datasets.Value("int32")}),
                }
            ),
            "answers": datasets.Sequence(datasets.Value("string")),
        }
    )
    # What `datasets` makes of a sequence of records: a record of lists.
    spans = [{"start": [12, 24], "end": [17, 29]}, {"start": [0], "end": [4]}]
    detected = {"text": ["Norman", "Rollo"], "char_spans": spans}
    row = {"subset": "BioASQ", "context": CONTEXT, "qid": "7", "question": "Who?", "answers": ["Norman"]}
    rows = datasets.Dataset.from_list([row | {"detected_answers": detected}], features=feature)
    assert from_dataset(rows, "mrqa") == [
        Example("7", "BioASQ", CONTEXT, "Who?", CONTEXT, ("Norman", "Rollo"), (12, 0))
    ]


def test_official_sources_are_asked_for_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    row = {"id": "1", "title": "N", "context": CONTEXT, "question": "?", "answers": {"text": [], "answer_start": []}}

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_official("squad", "validation")[0].domain == "squad" and asked == [("rajpurkar/squad", "validation")]
    with pytest.raises(UnknownNameError, match="Did you mean 'squad'"):
        from_dataset(datasets.Dataset.from_list([row]), "squat")


def test_official_sources_without_a_network_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataNotFoundError, match=r"the split 'train' of squad.*rajpurkar/squad.*source=generated"):
        load_official("squad", "train")


# --- splits ----------------------------------------------------------------------------------------------------------


def many(sizes: dict[str, list[int]]) -> list[Example]:
    """Domains with documents of so many examples."""
    return [
        example(f"{domain}{number}-{i}", domain=domain, document=f"{domain}{number}")
        for domain, documents in sizes.items()
        for number, size in enumerate(documents)
        for i in range(size)
    ]


SIZES = {"a": [10] * 20, "b": [3, 1, 5, 2, 9, 30], "c": [7]}


def test_held_out_documents_are_whole_and_of_each_domain() -> None:
    examples = many(SIZES)
    learned, held_out = split_by_document(examples, 0.2, seed=1)
    assert sorted([*learned, *held_out], key=examples.index) == examples
    assert not {e.document for e in learned} & {e.document for e in held_out}
    sizes = Counter(e.domain for e in held_out)
    assert sizes["a"] == 40 and sizes["b"] >= 10 and not sizes["c"], "a domain of one document is learned from"
    assert any(e.domain == "b" for e in learned)
    assert split_by_document(examples, 0.2, seed=1) == (learned, held_out)
    assert split_by_document(examples, 0.2, seed=2)[1] != held_out


def test_a_document_of_two_domains_is_on_one_side() -> None:
    examples = many({"a": [1] * 30}) + [example(f"b{n}", domain="b", document=f"a{n}") for n in range(30)]
    learned, held_out = split_by_document(examples, 0.5)
    assert not {e.document for e in learned} & {e.document for e in held_out}


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match=f"holdout={share}"):
        split_by_document(many(SIZES), share)


def test_one_document_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="No domain has two documents"):
        split_by_document(many({"c": [7]}), 0.1)


def test_folds_are_by_document_and_even_in_each_domain() -> None:
    examples = many({"a": [1] * 23, "b": [4, 4, 3, 3, 2, 2, 1, 1, 5, 5]})
    numbers = folds(examples, 5)
    of_document = defaultdict(set)
    sizes = Counter()
    for e, number in zip(examples, numbers, strict=True):
        of_document[e.document].add(number)
        sizes[e.domain, number] += 1
    assert all(len(found) == 1 for found in of_document.values())
    assert sorted(sizes["a", n] for n in range(5)) == [4, 4, 5, 5, 5] and [sizes["b", n] for n in range(5)] == [6] * 5
    assert folds(examples, 5) == numbers and folds(examples, 5, seed=1) != numbers


def test_folds_that_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="folds=1"):
        folds(many(SIZES), 1)
    with pytest.raises(ValueError, match="folds=5: the domain 'c' has only 1 documents"):
        folds(many(SIZES), 5)


# --- the generated set -----------------------------------------------------------------------------------------------


def test_generated_examples_are_sound_varied_and_determined_by_the_seed() -> None:
    examples = generate_examples(200, seed=3)
    check_examples(examples, "generated")
    assert len(examples) == 200 and {e.domain for e in examples} == set(GENERATED)
    assert all(name.startswith("synthetic_") for name in GENERATED) and set(GENERATED_OOD) < set(GENERATED)
    assert generate_examples(200, seed=3) == examples and generate_examples(200, seed=4) != examples
    assert generate_examples(50, seed=3) == examples[:50]
    assert max(Counter(e.context for e in examples).values()) == 2, "two questions about each text"
    places = [e.starts[0] / len(e.context) for e in examples]
    assert min(places) < 0.2 and max(places) > 0.8 and count_repeated(examples) < 5
    assert {" " in e.answers[0] for e in examples} == {True, False}


def test_generated_questions_depend_on_what_is_asked() -> None:
    """Each text answers several questions differently."""
    answers = defaultdict(set)
    for e in generate_examples(100):
        answers[e.document].add(e.answers[0])
    assert all(len(found) == 2 for found in answers.values())


def test_generated_domains_are_checked() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'synthetic_towns'"):
        generate_examples(3, domains=["synthetic_town"])
    with pytest.raises(ValueError, match="count=0"):
        generate_examples(0)


# --- the development data --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get(ENVIRONMENT_VARIABLE), reason=f"{ENVIRONMENT_VARIABLE} names no data folder")
def test_the_development_data_are_read_whole() -> None:
    folder = Path(os.environ[ENVIRONMENT_VARIABLE]) / "qa"
    examples = read_examples(folder / "ood_train.parquet")
    assert Counter(e.domain for e in examples) == {"race": 127, "duorc": 127, "relation_extraction": 127}
    assert Counter(folds(examples, 5)).most_common()[-1][1] >= 70
    test = read_examples(folder / "test.parquet")
    assert len(test) == 5749, "6,217 rows, of which SubjQA repeats some with further answers"
    assert all(e.document == e.context for e in test if e.domain.startswith("subjqa"))
    assert len({e.document for e in test if e.domain == "policyqa"}) == 20
