"""EDA leaves answers alone, knows where they are, and does to the rest what its technique says."""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel

from tasks.qa.augment import (
    STOP_WORDS,
    TECHNIQUES,
    Eda,
    augment,
    cut,
    delete_words,
    insert_words,
    is_copy,
    join,
    load_synonyms,
    main,
    mark_changes,
    nearest_words,
    read_synonyms,
    replace_words,
    swap_words,
    whole_words,
    wordnet_synonyms,
)
from tasks.qa.examples import Example, check_examples, generate_examples
from tests.tasks.qa.builders import CONTEXT, word_pieces
from zoo.errors import DataNotFoundError

OFF = dict.fromkeys(TECHNIQUES, 0.0)


def synonyms(word: str) -> Sequence[str]:
    return [f"{word}1", f"{word}2"]


def ask(context: str = CONTEXT, *answers: str, question: str = "where did they come from?") -> Example:
    starts = tuple(context.index(answer) for answer in answers)
    return Example("q", "own", "d", question, context, answers, starts)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def only(technique: str, share: float = 0.3, **changes: object) -> Eda:
    return replace(Eda(**(OFF | {technique: share})), **changes)


# --- all techniques --------------------------------------------------------------------------------------------------


def hard_examples() -> list[Example]:
    """Answers at both ends, overlapping, inside words, with punctuation, repeated elsewhere, none."""
    return [
        ask(CONTEXT, "The Normans", "Normans (French: Normands)", "Denmark"),
        ask(CONTEXT, "a region in France.", "gion in"),
        ask(CONTEXT, "name"),
        ask(CONTEXT, "ormans (Fr"),
        ask(CONTEXT, "(French: Normands) came"),
        ask(CONTEXT),
        ask("one two. One two", "One two", "two"),
        *generate_examples(30),
    ]


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_answers_are_untouched_and_their_places_exact(technique: str) -> None:
    examples = [replace(example, id=f"x{number}") for number, example in enumerate(hard_examples())]
    copies = augment(examples, only(technique, 0.5, copies=20), synonyms)
    check_examples(copies, "copies")
    by_id = {example.id: example for example in examples}
    for copy in copies:
        original = by_id[copy.id.partition("#")[0]]
        assert copy.answers == original.answers and copy.context != original.context
        assert (copy.question, copy.domain, copy.document) == (original.question, original.domain, original.document)
    moved = [copy.starts != by_id[copy.id.partition("#")[0]].starts for copy in copies]
    assert any(moved), "places are known anew"


def test_the_place_is_known_even_where_the_answer_occurs_again() -> None:
    """The first occurrence is not always the answer; a search would find the wrong one."""
    context = "red blue red blue red green red"
    example = replace(ask(context), answers=("red",), starts=(context.index("red", 12),))
    for copy in augment([example], only("delete", 0.5, copies=50)):
        before, answer = copy.context[: copy.starts[0]], copy.context[copy.starts[0] : copy.starts[0] + 3]
        assert answer == "red" and Counter(words(before)) <= Counter(["red", "blue", "red", "blue"])
        assert Counter(words(copy.context[copy.starts[0] + 3 :])) <= Counter(["green", "red"])


def test_copies_depend_on_seed_id_and_number_alone() -> None:
    examples = [replace(e, id=f"x{number}") for number, e in enumerate(generate_examples(12))]
    eda = Eda(copies=3)
    copies = augment(examples, eda, synonyms)
    assert sorted(augment(examples[::-1], eda, synonyms), key=lambda e: e.id) == sorted(copies, key=lambda e: e.id)
    more = augment(examples, replace(eda, copies=5), synonyms)
    assert {c.id: c.context for c in copies}.items() <= {c.id: c.context for c in more}.items()
    assert {c.context for c in augment(examples, replace(eda, seed=1), synonyms)} != {c.context for c in copies}
    assert copies[0].id == "x0#eda1" and is_copy(copies[0]) and not is_copy(examples[0])
    alike = augment([ask(" ".join(f"w{number}" for number in range(40)))], only("swap", copies=5))
    assert len({copy.context for copy in alike}) == 5, "copies of one technique differ"
    same_text = [replace(ask(), id="a"), replace(ask(), id="b")]
    first, second = augment(same_text, only("swap", copies=1))
    assert first.context != second.context


def test_techniques_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    for start in generate_examples(5):
        copies = augment([start], Eda(copies=4, insert=0.2, swap=0.2, delete=0.3, synonym=0.2), synonyms)
        sizes = sorted(len(words(c.context)) - len(words(start.context)) for c in copies)
        assert sizes[0] < 0 < sizes[-1] and sizes.count(0) >= 1, "one deletes, one inserts, the others keep the number"


def test_unchanged_copies_are_left_out() -> None:
    assert augment([ask()], only("synonym", copies=3), lambda word: []) == []
    assert augment([ask("France", "France")], only("swap", copies=3)) == []


def test_words_of_the_question_can_be_kept() -> None:
    example = ask("cold rain fell on the wide river", question="What FELL on the River?")
    eda = only("synonym", 0.9, copies=5, keep_question_words=True)
    assert all({"fell", "river"} <= set(words(c.context)) for c in augment([example], eda, synonyms))
    assert not all(
        {"fell", "river"} <= set(words(c.context))
        for c in augment([example], replace(eda, keep_question_words=False), synonyms)
    )


# --- each technique --------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("example", hard_examples()[:8], ids=range(8))
def test_cut_and_joined_again_nothing_changes(example: Example) -> None:
    pieces, rest = cut(example)
    assert join(example, "q", pieces, rest) == replace(example, id="q")
    assert sorted(number for piece in pieces for number, _ in piece.answers) == list(range(len(example.answers)))
    assert all(piece.locked == bool(piece.answers) for piece in pieces)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_as_many_words_are_replaced_as_asked_for_and_possible(count: int) -> None:
    example = ask(CONTEXT, "Denmark")
    pieces, _ = cut(example)
    edited = replace_words(pieces, count, generator(), synonyms)
    changed = [(old.text, new.text) for old, new in zip(pieces, edited, strict=True) if old != new]
    candidates = [p for p in pieces if not p.locked and p.text.lower() not in STOP_WORDS]
    assert len(changed) == min(count, len(candidates))
    for old, new in changed:
        assert old.lower() not in STOP_WORDS and new[:-1].lower() == old.lower() and new[-1] in "12"
        assert new[0].isupper() == old[0].isupper()


def test_words_without_synonyms_do_not_count() -> None:
    pieces, _ = cut(ask())
    edited = replace_words(pieces, 1, generator(), lambda word: ["land"] if word == "region" else [])
    assert [new.text for old, new in zip(pieces, edited, strict=True) if old != new] == ["land"]


def test_inserted_words_are_synonyms_of_others_and_never_inside_an_answer() -> None:
    example = ask(CONTEXT, "Normandy, a region")
    pieces, rest = cut(example)
    for seed in range(30):
        made = join(example, "new", insert_words(pieces, 4, generator(seed), synonyms), rest)
        new = Counter(words(made.context)) - Counter(words(CONTEXT))
        assert sum(new.values()) == 4 and all(word[:-1] in CONTEXT.lower() and word[-1] in "12" for word in new)
        left = re.sub(r"\w+[12] ", "", made.context)
        assert left == CONTEXT, "nothing else changes"
        check_examples([made], "here")


def test_swapped_words_are_the_same_words() -> None:
    example = ask(CONTEXT, "Denmark")
    pieces, _ = cut(example)
    edited = swap_words(pieces, 1, generator(), None)
    changed = [place for place, (old, new) in enumerate(zip(pieces, edited, strict=True)) if old.text != new.text]
    assert len(changed) == 2 and [p.gap for p in edited] == [p.gap for p in pieces]
    assert Counter(p.text for p in edited) == Counter(p.text for p in pieces)
    many = swap_words(pieces, 50, generator(), None)
    assert Counter(p.text for p in many) == Counter(p.text for p in pieces)
    assert [p.text for p in many if p.locked] == ["Denmark"]


def test_each_word_is_deleted_with_the_given_probability() -> None:
    example = ask(" ".join(f"w{number}" for number in range(2000)), "w7")
    pieces, rest = cut(example)
    left, _ = delete_words(pieces, rest, 0.2, generator())
    assert 0.76 < len(left) / 2000 < 0.84 and any(piece.text == "w7" for piece in left)


@pytest.mark.parametrize(
    ("text", "kept", "expected"),
    [
        ("one two three", {"one", "three"}, "one three"),
        ("one two three", {"two", "three"}, "two three"),
        ("one two three.", {"one", "two"}, "one two."),
        ("one, two three", {"one", "three"}, "one, three"),
        ("one two, three", {"one", "three"}, "one, three"),
        ("one (two) three", {"one", "three"}, "one () three"),
        ("one two-three four", {"two", "four"}, "two- four"),
        ("one two three four", {"one", "four"}, "one four"),
        ("one\n\ntwo three", {"one", "three"}, "one\n\nthree"),
    ],
)
def test_what_stands_around_a_deleted_word(text: str, kept: set[str], expected: str) -> None:
    example = ask(text)
    pieces, rest = cut(example, kept)
    left, rest = delete_words(pieces, rest, 0.999999, generator())
    assert join(example, "new", left, rest).context == expected


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"delete": 1.0}, {"swap": -0.1}, {"copies": 0}, OFF])
def test_settings_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 0 and below 1|at least one copy and one technique"):
        Eda(**wrong)


def test_synonyms_are_asked_for_where_needed() -> None:
    with pytest.raises(ValueError, match="need synonyms: name a file of them, 'wordnet' or 'embedding'"):
        augment([ask()], only("insert"))
    assert augment([ask()], only("swap", copies=1))


# --- synonyms --------------------------------------------------------------------------------------------------------


def test_synonyms_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "s.txt"
    path.write_text("Big\tlarge, great\n\nbig\thuge\nred\tscarlet\n", encoding="utf-8")
    look_up = load_synonyms(str(path), "no base needed")
    assert [list(look_up(word)) for word in ("big", "red", "blue")] == [["large", "great", "huge"], ["scarlet"], []]
    for line in ("big large", "big\t , ", "\tlarge"):
        path.write_text(f"red\tscarlet\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="line 2: expected word<TAB>synonym"):
            read_synonyms(path)
    with pytest.raises(DataNotFoundError, match=r"none\.txt"):
        load_synonyms(str(tmp_path / "none.txt"), "")


def test_wordnet_through_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for nltk, with the calls that are made."""
    names = {"big": [["big", "large"], ["big", "grown_up", "large"]]}
    stub = SimpleNamespace(
        ensure_loaded=lambda: None,
        synsets=lambda word: [SimpleNamespace(lemma_names=lambda n=n: n) for n in names.get(word, [])],
    )
    corpus = ModuleType("nltk.corpus")
    corpus.wordnet = stub
    monkeypatch.setitem(sys.modules, "nltk", ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)
    look_up = load_synonyms("wordnet", "")
    assert look_up("big") == ("large", "grown up") and look_up("blue") == ()

    def missing() -> None:
        raise LookupError("wordnet")

    stub.ensure_loaded = missing
    with pytest.raises(DataNotFoundError, match=r"WordNet.*python -m nltk\.downloader wordnet"):
        wordnet_synonyms()


def test_without_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(DataNotFoundError, match="pip install nltk"):
        wordnet_synonyms()


def test_nearest_words_are_those_with_the_largest_cosines() -> None:
    vocabulary = {
        w: n for n, w in enumerate(["[CLS]", "##ing", "king", "queen", "kings", "town", "the", "prince", "42"])
    }
    table = torch.zeros(9, 4)
    table[2] = torch.tensor([3.0, 0, 0, 0])
    table[3] = torch.tensor([0.8, 0.6, 0, 0])  # cosine 0.8 to king
    table[7] = torch.tensor([9.0, 1.0, 0, 0])  # 0.99, though longer
    table[4] = table[6] = table[0] = table[1] = table[8] = table[2]
    table[5] = torch.tensor([0.1, 0, 5.0, 0])
    look_up = nearest_words(vocabulary, table)
    assert look_up("king") == ("prince", "queen"), "no form of the word, no stop word, no piece, nothing far away"
    assert look_up("town") == () and look_up("unknown") == ()


@pytest.mark.parametrize("mark", ["\u0120", "\u2581"])
def test_where_beginnings_of_words_are_marked_synonyms_are_words_without_the_mark(mark: str) -> None:
    marked = [f"{mark}{word}" for word in ("king", "queen", "King", "queens", "the", "42", "prince")]
    pieces = ["<s>", *marked, "ing", "king", "prin"]
    vocabulary = {piece: row for row, piece in enumerate(pieces)}
    look_up = nearest_words(vocabulary, torch.ones(len(vocabulary), 4))
    assert sorted(look_up("king")) == ["prince", "queen", "queens"]
    assert look_up("prin") == () and look_up(f"{mark}king") == ()


def test_synonyms_of_a_byte_level_tokenizer_are_words() -> None:
    texts = ["the king met the queen", "a caf\u00e9 for the king and the queen"] * 5
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "<pad>"]))
    vocabulary = tokenizer.get_vocab()
    words = whole_words(vocabulary)
    assert any("caf\u00c3\u00a9" in piece for piece in vocabulary), "bytes of a letter look like letters"
    assert {"king", "queen", "the"} <= words.keys() and all(word.isascii() and word.isalpha() for word in words)
    assert all(tokenizer.encode(f" {word}").ids == [row] for word, row in words.items())


def test_the_embedding_table_is_that_of_the_base(tmp_path: Path) -> None:
    tokenizer = word_pieces()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    model = BertModel(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    look_up = load_synonyms("embedding", str(tmp_path))
    expected = nearest_words(tokenizer.get_vocab(), model.get_input_embeddings().weight.detach())
    found = [look_up(word) for word in ("normandy", "baker", "honey")]
    assert found == [expected(word) for word in ("normandy", "baker", "honey")] and all(found)


# --- the command -----------------------------------------------------------------------------------------------------


def test_changes_are_marked() -> None:
    old = ask("The red kite flew in May.", "kite")
    pieces, rest = cut(old)
    new = join(old, "q#eda1", [replace(pieces[0], text="A"), *pieces[1:3], *pieces[4:]], rest)
    left, right = mark_changes(old, new)
    assert left.plain == "[-The-] red <<kite>> [-flew -]in May."
    assert right.plain == "{+A+} red <<kite>> in May."
    assert {span.style for span in left.spans} >= {"red"} and {span.style for span in right.spans} >= {"green"}
    assert mark_changes(ask("one two"), ask("one three"))[1].plain == "one {+three+}"


def test_the_command_prints_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    path = tmp_path / "q.csv"
    path.write_text('question,context,answer\n"Who [bold]?","Rollo of Norway came to France","Rollo"\nA?,b c d e,b\n')
    (tmp_path / "s.txt").write_text("came\twent\nnorway\tIceland\n")
    off = ["--insert", "0", "--swap", "0", "--delete", "0"]
    main(["--file", str(path), "--count", "2", "--copies", "1", "--synonyms", str(tmp_path / "s.txt"), *off])
    shown = capsys.readouterr().out
    assert "1 (own): Who [bold]?" in shown and "#eda1" in shown and "<<Rollo>> of" in shown
    assert "{+went+}" in shown or "{+Iceland+}" in shown


def test_the_command_ends_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--file", str(tmp_path / "none.csv")])
    assert "Could not find the questions" in capsys.readouterr().err
