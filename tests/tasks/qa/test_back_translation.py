"""Back-translation: what is cut, what goes to the translator, where answers end up, what is kept on disk."""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MarianConfig, MarianMTModel

from tasks.qa.back_translation import (
    CachedTranslator,
    MarianTranslator,
    back_translate,
    cut_around_answers,
    load_translators,
    read_cache,
    translate_all,
    weights_sha256,
)
from tasks.qa.examples import Example, check_examples, generate_examples
from tests.helpers import bases
from zoo.errors import DataNotFoundError

CONTEXT = (
    "  The Normans came to France with many ships from Norway. Their duke\n\n"
    "was called Rollo by all of the people there; he gave his name to no town at all. Yes. What a man he was!"
)


class Marker:
    """Puts a mark before each word, and remembers what it was given."""

    def __init__(self, mark: str, group: int = 4) -> None:
        self.name = mark
        self.group = group
        self.given: list[list[str]] = []

    def translate(self, texts: Sequence[str]) -> list[str]:
        self.given.append(list(texts))
        return [" ".join(self.name + word for word in text.split()) for text in texts]


def ask(*answers: str, context: str = CONTEXT) -> Example:
    return Example("q", "own", "d", "?", context, answers, tuple(context.index(answer) for answer in answers))


# --- contexts --------------------------------------------------------------------------------------------------------


def test_only_sentences_around_the_answer_are_translated() -> None:
    there, back = Marker("<"), Marker(">")
    (made,) = back_translate([ask("Rollo")], [(there, back)])
    sentences = [
        "The Normans came to France with many ships from Norway.",
        "by all of the people there; he gave his name to no town at all.",
    ]
    assert sorted(text for group in there.given for text in group) == sorted(sentences)
    marked = CONTEXT
    for sentence in sentences:
        marked = marked.replace(sentence, " ".join(f"><{word}" for word in sentence.split()))
    assert made.context == marked, "five words or fewer are kept, and so is all space"
    assert made.id == "q#bt1" and made.answers == ("Rollo",) and made.starts == (marked.index("Rollo"),)


def test_cuts_lose_nothing_and_answers_keep_their_places() -> None:
    generator = np.random.default_rng(0)
    letters = [*"aé1 .!?\n\t\"')", "word ", "Two words. "]
    for number in range(300):
        context = "".join(generator.choice(letters, size=40))
        spans = sorted((int(a), int(b)) for a, b in generator.integers(1, len(context), (3, 2)) if a < b)
        answers, starts = tuple(context[a:b] for a, b in spans), tuple(a for a, _ in spans)
        example = Example(str(number), "own", "d", "?", context, answers, starts)
        parts = list(cut_around_answers(example))
        assert "".join(part.text for part in parts) == context
        assert sorted(n for part in parts for n, _ in part.answers) == list(range(len(spans)))
        assert not any(part.translate and (part.answers or part.text != part.text.strip()) for part in parts)


def test_answers_are_untouched_whatever_comes_back() -> None:
    examples = [ask("Rollo", "called Rollo by"), ask("Rollo by", "called Rollo"), ask("orwa", "Yes"), ask(CONTEXT[2:9])]
    examples = [Example(f"x{n}", *[getattr(e, f) for f in e.__slots__[1:]]) for n, e in enumerate(examples)]
    made = back_translate([*examples, *generate_examples(20)], [(Marker("<<"), Marker(""))])
    check_examples(made, "made")
    assert [e.answers for e in made[:4]] == [e.answers for e in examples]
    assert "Norway" in made[2].context and "<<Norway" not in made[2].context, "a word that holds an answer stays whole"


def test_one_context_for_each_language_and_none_that_is_unchanged() -> None:
    made = back_translate(
        [ask("Rollo")], [(Marker("<"), Marker(">")), (Marker(""), Marker("")), (Marker("«"), Marker(""))]
    )
    assert [e.id for e in made] == ["q#bt1", "q#bt3"]
    assert back_translate([ask("Rollo", context="Rollo was a duke.")], [(Marker("<"), Marker(">"))]) == []


def test_what_does_not_come_back_stays() -> None:
    class Silent(Marker):
        def translate(self, texts: Sequence[str]) -> list[str]:
            return ["" for _ in texts]

    assert back_translate([ask("Rollo")], [(Marker("<"), Silent(">"))]) == []


def test_long_sentences_are_cut() -> None:
    text = " ".join(f"w{number}" for number in range(250))
    there = Marker("<")
    back_translate([ask("w0", context=text)], [(there, Marker(">"))])
    assert sorted(len(t.split()) for group in there.given for t in group) == [49, 100, 100]


def test_groups_are_the_same_in_every_run() -> None:
    one, other = Marker("<"), Marker("<")
    texts = [f"{'x' * (n % 7)}{n}" for n in range(11)]
    table = translate_all(one, texts)
    assert table == {text: f"<{text}" for text in texts} == translate_all(other, texts[::-1])
    assert one.given == other.given and [len(group) for group in one.given] == [4, 4, 3]
    lengths = [len(text) for group in one.given for text in group]
    assert lengths == sorted(lengths)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_nothing_is_translated_twice(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache.jsonl"
    pair = [(CachedTranslator(Marker("<"), path), CachedTranslator(Marker(">"), path))]
    made = back_translate([ask("Rollo")], pair)
    again = [Marker("<"), Marker(">")]
    cached = [tuple(CachedTranslator(marker, path) for marker in again)]
    assert back_translate([ask("Rollo")], cached) == made and not again[0].given and not again[1].given
    assert len(path.read_text().splitlines()) == 4
    other = Marker("{")
    CachedTranslator(other, path).translate(["The Normans came to France with many ships from Norway."])
    assert other.given, "another translator has its own"


class Interrupted(Exception):
    pass


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    class Weak(Marker):
        def translate(self, texts: Sequence[str]) -> list[str]:
            if len(self.given) == 2:
                raise Interrupted
            return super().translate(texts)

    texts, path = [f"text {n}" for n in range(11)], tmp_path / "cache.jsonl"
    with pytest.raises(Interrupted):
        translate_all(CachedTranslator(Weak("<"), path), texts)
    with path.open("a") as file:
        file.write('{"key": "torn')
    marker = Marker("<")
    assert translate_all(CachedTranslator(marker, path), texts) == {
        t: t.replace("te", "<te").replace(" ", " <") for t in texts
    }
    assert [len(group) for group in marker.given] == [3], "only the last group was missing"
    assert all(json.loads(line).keys() == {"key", "text"} for line in path.read_text().splitlines())


def test_a_group_is_translated_whole_and_what_was_known_stays(tmp_path: Path) -> None:
    """A model's result may depend on what stands beside a text; the first one counts."""

    class Counting(Marker):
        def translate(self, texts: Sequence[str]) -> list[str]:
            return [f"{text} of {len(texts)}" for text in texts]

    path = tmp_path / "cache.jsonl"
    assert CachedTranslator(Counting("<"), path).translate(["a"]) == ["a of 1"]
    for _ in range(2):
        assert CachedTranslator(Counting("<"), path).translate(["a", "b"]) == ["a of 1", "b of 2"]
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["nonsense", '{"key": 1}', "[1]"])
def test_a_spoilt_cache_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "cache.jsonl"
    path.write_text(f'{{"key": "k", "text": "t"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"line 2: not a translation\. Delete the file"):
        read_cache(path)


# --- Marian ----------------------------------------------------------------------------------------------------------


def save_marian(folder: Path, seed: int = 0, positions: int = 64) -> str:
    """A tiny random Marian; its tokenizer is a WordPiece one, since Marian's own needs sentencepiece."""
    torch.manual_seed(seed)
    tokenizer = bases.word_pieces([CONTEXT])
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=tokenizer.sep_token_id,
        init_std=1.0,
    )
    MarianMTModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_marian(tmp_path_factory.mktemp("marian"))


def test_a_marian_model_translates_as_transformers_does(marian: str) -> None:
    translator = MarianTranslator(marian, beams=2)
    texts = ["The Normans came to France", "Rollo"]
    model, tokenizer = MarianMTModel.from_pretrained(marian).eval(), bases.word_pieces([CONTEXT])
    for text, translation in zip(texts, translator.translate(texts), strict=True):
        ids = model.generate(
            **tokenizer(text, return_tensors="pt", return_token_type_ids=False), num_beams=2, max_length=24
        )
        assert translation == tokenizer.decode(ids[0], skip_special_tokens=True)[: len(translation)] != ""
    assert translator.translate(texts) == translator.translate(texts)


def test_contexts_through_two_marian_models(marian: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    other = save_marian(tmp_path / "other", seed=1)
    made = back_translate([ask("Rollo")], load_translators([[marian, other]], cache))
    check_examples(made, "made")
    assert made[0].answers == ("Rollo",) and made[0].context != CONTEXT
    assert back_translate([ask("Rollo")], load_translators([[marian, other]])) == made, "the cache changes nothing"
    assert len(cache.read_text().splitlines()) == 4


def test_the_name_changes_with_weights_and_settings(marian: str, tmp_path: Path) -> None:
    names = [
        MarianTranslator(marian).name,
        MarianTranslator(marian, beams=2).name,
        MarianTranslator(save_marian(tmp_path / "a", seed=1)).name,
    ]
    assert len(set(names)) == 3 and MarianTranslator(save_marian(tmp_path / "b", seed=0)).name == names[0]
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.load_state_dict(first.state_dict())
    assert weights_sha256(first) == weights_sha256(second)
    with torch.no_grad():
        second.bias[1] += 1e-3
    assert weights_sha256(first) != weights_sha256(second)


def test_a_text_that_is_too_long_is_not_cut_silently(tmp_path: Path) -> None:
    translator = MarianTranslator(save_marian(tmp_path / "short", positions=8))
    with pytest.raises(ValueError, match=r"16 tokens are more than the 8 .*France France"):
        translator.translate([" ".join(["France"] * 14)])


def test_models_that_cannot_be_had(tmp_path: Path, marian: str) -> None:
    with pytest.raises(DataNotFoundError, match="the translation model 'Helsinki-NLP/none'"):
        MarianTranslator("Helsinki-NLP/none")
    with pytest.raises(ValueError, match="needs a model there and one back for each language, found"):
        load_translators([[marian]])
    with pytest.raises(ValueError, match="needs a model there and one back"):
        load_translators(["ab"])


def test_marians_own_tokenizer_asks_for_sentencepiece(tmp_path: Path, marian: str) -> None:
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("sentencepiece is installed, so its absence cannot be seen")
    folder = Path(save_marian(tmp_path / "spm"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}')
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(b"")
    (folder / "vocab.json").write_text(
        json.dumps({w: n for n, w in enumerate(["<unk>", "</s>", "<pad>", *string.ascii_letters])})
    )
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        MarianTranslator(str(folder))


def test_missing_weights_are_not_filled_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(save_marian(tmp_path / "broken"))
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "fc1.weight" in name)
    save_file({name: t for name, t in tensors.items() if name != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights: {gone}"):
        MarianTranslator(str(folder))
