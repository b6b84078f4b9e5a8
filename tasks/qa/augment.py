"""EDA: new contexts by small edits that leave the answers alone, and a command that shows them beside the old ones.

Source: Wei and Zou, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification Tasks",
2019.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.qa.examples import Example, read_examples, read_text
from zoo.base_models import MINILM, load_encoder, load_tokenizer
from zoo.data import find
from zoo.errors import DataNotFoundError

if TYPE_CHECKING:
    from rich.text import Text
    from torch import Tensor

# A word in, what may stand in its place out, best first.
Synonyms = Callable[[str], Sequence[str]]

TECHNIQUES = ("synonym", "insert", "swap", "delete")
WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
FUNCTION_WORDS = """
a about above after again against all also am an and any are as at be because been before being below between both but
by can could did do does doing don't down during each either else ever few for from further had has have having he her
here hers herself him himself his how i if in into is it its itself just may me might mine more most must my myself
neither no nor not now of off on once only onto or other our ours ourselves out over own per same shall she should so
some such than that the their theirs them themselves then there these they this those through to too under until up
upon us very was we were what when where whether which while who whom whose why will with within without would you
your yours yourself yourselves
"""
# These have no synonyms.
STOP_WORDS = frozenset(FUNCTION_WORDS.split())
# What words begin with in the vocabularies of byte-level tokenizers, as RoBERTa has one, and of SentencePiece.
BYTES, SENTENCEPIECE = WORD_MARKS = ("\u0120", "\u2581")
# Neighbours of a word in the embedding table that may stand in its place: this many, this close.
NEIGHBOURS = 5
MIN_COSINE = 0.5


@dataclass(frozen=True, slots=True)
class Eda:
    """How contexts are edited. A share of 0 turns a technique off; each copy uses one technique, by turns.

    Attributes:
        copies: New contexts per example.
        synonym: Share of the words that are replaced by a synonym.
        insert: Share of the words of which a synonym is inserted somewhere.
        swap: Share of the words that change places, two at a time.
        delete: Probability that a word is left out.
        synonyms: Where synonyms come from, see `load_synonyms`.
        keep_question_words: Whether words that the question has too are left alone, as answers are.
        seed: Determines the edits, together with the example's id and the number of the copy.
    """

    copies: int = 4
    synonym: float = 0.1
    insert: float = 0.1
    swap: float = 0.1
    delete: float = 0.1
    synonyms: str = "embedding"
    keep_question_words: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what would do nothing or leave nothing.

        Raises:
            ValueError: A number is out of its range, or all techniques are off.
        """
        shares = {name: getattr(self, name) for name in TECHNIQUES}
        if wrong := [name for name, share in shares.items() if not 0 <= share < 1]:
            raise ValueError(f"{wrong[0]}={shares[wrong[0]]}: must be at least 0 and below 1, e.g. 0.1.")
        if self.copies < 1 or not any(shares.values()):
            raise ValueError(f"{self}: needs at least one copy and one technique with a share above 0.")

    @property
    def techniques(self) -> tuple[str, ...]:
        """Names of those that are on."""
        return tuple(name for name in TECHNIQUES if getattr(self, name))

    @property
    def needs_synonyms(self) -> bool:
        """Whether a technique is on that needs them."""
        return bool(self.synonym or self.insert)


@dataclass(frozen=True, slots=True)
class Piece:
    """A word of a context, or an answer with the words that it is part of.

    Attributes:
        gap: What stands between the piece before and this one.
        text: What may be edited.
        locked: Whether it must stay.
        answers: Which answers are in it, each with its character offset there.
    """

    gap: str
    text: str
    locked: bool = False
    answers: tuple[tuple[int, int], ...] = ()


# --- editing ---------------------------------------------------------------------------------------------------------


def augment(examples: Iterable[Example], eda: Eda, synonyms: Synonyms | None = None) -> list[Example]:
    """New examples with edited contexts; what did not change at all is left out.

    Args:
        examples: Checked ones.
        eda: How to edit.
        synonyms: Needed by the techniques `synonym` and `insert`.

    Returns:
        At most `eda.copies` per example, with ids `<id>#eda1`, `<id>#eda2`, ...

    Raises:
        ValueError: A technique is on that needs synonyms, but there is no source.
    """
    if synonyms is None and eda.needs_synonyms:
        raise ValueError(
            "The techniques 'synonym' and 'insert' need synonyms: name a file of them, 'wordnet' or 'embedding', or "
            "set both to 0."
        )
    return [
        edited
        for example in examples
        for copy in range(1, eda.copies + 1)
        if (edited := _edit(example, eda, copy, synonyms)).context != example.context
    ]


def is_copy(example: Example) -> bool:
    """Whether an example was made by augmentation."""
    return re.search(r"#(eda|bt)\d+$", example.id) is not None


def _edit(example: Example, eda: Eda, copy: int, synonyms: Synonyms | None) -> Example:
    """One copy."""
    first = _generator(eda.seed, example.id, 0).integers(len(eda.techniques))
    technique = eda.techniques[(first + copy) % len(eda.techniques)]
    kept = {word.lower() for word in WORD.findall(example.question)} if eda.keep_question_words else set()
    pieces, rest = cut(example, kept)
    generator, share = _generator(eda.seed, example.id, copy), getattr(eda, technique)
    if technique == "delete":
        pieces, rest = delete_words(pieces, rest, share, generator)
    else:
        count = max(1, int(share * len(pieces)))
        edit = {"synonym": replace_words, "insert": insert_words, "swap": swap_words}[technique]
        pieces = edit(pieces, count, generator, synonyms)
    return join(example, f"{example.id}#eda{copy}", pieces, rest)


def _generator(seed: int, id_: str, copy: int) -> np.random.Generator:
    """Random numbers that depend on these three alone."""
    return np.random.default_rng([seed, copy, int.from_bytes(sha256(id_.encode()).digest()[:8])])


def cut(example: Example, kept: Iterable[str] = ()) -> tuple[list[Piece], str]:
    """Cut a context into words; words that an answer touches are one piece with it, and locked.

    Args:
        example: With its answers.
        kept: Further words to lock, in lower case.

    Returns:
        The pieces, and what stands behind the last.
    """
    context, kept = example.context, frozenset(kept)
    spans = [(match.start(), match.end(), False) for match in WORD.finditer(context)]
    spans += [(start, start + len(a), True) for a, start in zip(example.answers, example.starts, strict=True)]
    merged: list[tuple[int, int, bool]] = []
    for start, end, locked in sorted(spans):
        if merged and start < merged[-1][1]:
            before = merged.pop()
            start, end, locked = before[0], max(end, before[1]), locked or before[2]
        merged.append((start, end, locked))
    pieces, done = [], 0
    for start, end, locked in merged:
        inside = tuple((n, place - start) for n, place in enumerate(example.starts) if start <= place < end)
        text = context[start:end]
        pieces.append(Piece(context[done:start], text, locked or text.lower() in kept, inside))
        done = end
    return pieces, context[done:]


def join(example: Example, id_: str, pieces: Sequence[Piece], rest: str) -> Example:
    """Put pieces together again; where the answers are now follows from the pieces before them.

    Args:
        example: The one that was cut.
        id_: Of the new one.
        pieces: Edited.
        rest: What stands behind the last.
    """
    starts, parts, length = list(example.starts), [], 0
    for piece in pieces:
        length += len(piece.gap)
        for number, offset in piece.answers:
            starts[number] = length + offset
        length += len(piece.text)
        parts += [piece.gap, piece.text]
    return replace(example, id=id_, context="".join(parts) + rest, starts=tuple(starts))


def _free(pieces: Sequence[Piece]) -> list[int]:
    """Places of the pieces that may be edited."""
    return [place for place, piece in enumerate(pieces) if not piece.locked]


def _like(word: str, model: str) -> str:
    """A word, with a capital where the one in whose place it stands has one."""
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def _draw_synonyms(
    pieces: Sequence[Piece], count: int, generator: np.random.Generator, synonyms: Synonyms
) -> Iterator[tuple[int, str]]:
    """Up to `count` words that have synonyms, each with one of them."""
    candidates = [place for place in _free(pieces) if pieces[place].text.lower() not in STOP_WORDS]
    for place in generator.permutation(candidates).astype(int):
        if count and (choices := synonyms(pieces[place].text.lower())):
            count -= 1
            yield place, choices[generator.integers(len(choices))]


def replace_words(
    pieces: Sequence[Piece], count: int, generator: np.random.Generator, synonyms: Synonyms
) -> list[Piece]:
    """Put synonyms in the place of words that are not stop words.

    Args:
        pieces: Of a context.
        count: How many to replace, if so many have synonyms.
        generator: Of the random choices.
        synonyms: Their source.
    """
    edited = list(pieces)
    for place, word in _draw_synonyms(pieces, count, generator, synonyms):
        edited[place] = replace(pieces[place], text=_like(word, pieces[place].text))
    return edited


def insert_words(
    pieces: Sequence[Piece], count: int, generator: np.random.Generator, synonyms: Synonyms
) -> list[Piece]:
    """Put synonyms of random words in front of other random words.

    Args:
        pieces: Of a context.
        count: How many to insert.
        generator: Of the random choices.
        synonyms: Their source.
    """
    edited = list(pieces)
    for _, word in list(_draw_synonyms(pieces, count, generator, synonyms)):
        place = int(generator.integers(len(edited)))
        before = edited[place]
        edited[place : place + 1] = [Piece(before.gap, word), replace(before, gap=" ")]
    return edited


def swap_words(pieces: Sequence[Piece], count: int, generator: np.random.Generator, _: Synonyms | None) -> list[Piece]:
    """Let pairs of words change places.

    Args:
        pieces: Of a context.
        count: How many pairs.
        generator: Of the random choices.
    """
    edited, free = list(pieces), _free(pieces)
    for _ in range(count if len(free) > 1 else 0):
        one, other = map(int, generator.choice(free, size=2, replace=False))
        texts = edited[one].text, edited[other].text
        edited[one], edited[other] = replace(edited[one], text=texts[1]), replace(edited[other], text=texts[0])
    return edited


def delete_words(
    pieces: Sequence[Piece], rest: str, share: float, generator: np.random.Generator
) -> tuple[list[Piece], str]:
    """Leave words out.

    Args:
        pieces: Of a context.
        rest: What stands behind the last.
        share: Probability that a word goes.
        generator: Of the random choices.

    Returns:
        What is left of both.
    """
    edited: list[Piece] = []
    gap: str | None = None
    for piece, draw in zip(pieces, generator.random(len(pieces)), strict=True):
        gap = piece.gap if gap is None else _close(gap, piece.gap)
        if piece.locked or draw >= share:
            edited.append(replace(piece, gap=gap))
            gap = None
    return edited, rest if gap is None else _close(gap, rest)


def _close(before: str, after: str) -> str:
    """What stood on both sides of a word that is gone, without space twice or in front of punctuation."""
    if not after[:1].isspace():
        return before.rstrip() + after
    return before + (after.lstrip() if not before or before[-1].isspace() else after)


# --- synonyms --------------------------------------------------------------------------------------------------------


def load_synonyms(source: str, base: str) -> Synonyms:
    """A source of synonyms.

    Args:
        source: `wordnet`, through nltk; `embedding`, see `nearest_words`; else a file, see `read_synonyms`.
        base: The model whose embedding table is meant.

    Raises:
        DataNotFoundError: It is not there.
        ValueError: The file is not laid out as it should be.
    """
    if source == "wordnet":
        return wordnet_synonyms()
    if source == "embedding":
        return embedding_synonyms(base)
    return read_synonyms(source)


def read_synonyms(path: str | Path) -> Synonyms:
    """Synonyms of a UTF-8 file with lines `word<TAB>synonym,synonym`.

    Args:
        path: The file.

    Raises:
        DataNotFoundError: There is no such file.
        ValueError: A line is not like this.
    """
    table: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        word, tab, listed = line.partition("\t")
        choices = [choice.strip() for choice in listed.split(",") if choice.strip()]
        if line.strip() and not (tab and word.strip() and choices):
            raise ValueError(f"{path}, line {number}: expected word<TAB>synonym,synonym, found {line[:60]!r}.")
        table.setdefault(word.strip().lower(), []).extend(choices)
    return lambda word: table.get(word, ())


def wordnet_synonyms() -> Synonyms:
    """Synonyms of WordNet, where the user has nltk and its copy.

    Raises:
        DataNotFoundError: One of the two is missing.
    """
    how = "pip install nltk, then python -m nltk.downloader wordnet; or name a file of synonyms, or 'embedding'."
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except (ImportError, LookupError) as error:
        raise DataNotFoundError("WordNet", ["nltk"], f"{type(error).__name__}. {how}") from None

    @cache
    def look_up(word: str) -> tuple[str, ...]:
        names = (name.replace("_", " ") for synset in wordnet.synsets(word) for name in synset.lemma_names())
        return tuple(dict.fromkeys(name for name in names if name.lower() != word))

    return look_up


def embedding_synonyms(base: str) -> Synonyms:
    """`nearest_words` of a base model.

    Args:
        base: Its name, as for `zoo.base_models.load_encoder`.
    """
    table = load_encoder(base).get_input_embeddings().weight.detach()
    return nearest_words(load_tokenizer(base).get_vocab(), table)


def nearest_words(vocabulary: Mapping[str, int], table: "Tensor") -> Synonyms:
    """Words whose embeddings are close to that of a word: kindred words that fit in its place, not always synonyms.

    Forms of the word itself (one begins with the other) are left out.

    Args:
        vocabulary: Rows of the table by piece; only those of `whole_words` are used.
        table: `(V, D)` embeddings.
    """
    rows = whole_words(vocabulary)
    words = [word for word in rows if len(word) > 2 and word not in STOP_WORDS]
    vectors = table[[rows[word] for word in words]].float()
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    places = {word: place for place, word in enumerate(words)}

    @cache
    def look_up(word: str) -> tuple[str, ...]:
        if word not in places:
            return ()
        cosines = vectors @ vectors[places[word]]
        # More than are wanted, since forms of the word are among them.
        values, near = cosines.topk(min(50, len(words)))
        others = [words[place] for value, place in zip(values, near, strict=True) if value >= MIN_COSINE]
        return tuple([other for other in others if not (other.startswith(word) or word.startswith(other))][:NEIGHBOURS])

    return look_up


def whole_words(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Numbers of the pieces that are words of lower-case letters, by the word; continuations of words are none.

    Args:
        vocabulary: Numbers by piece: of WordPiece, whose continuations begin with `##`, or with marks of beginnings.
    """
    begins = {mark: [piece for piece in vocabulary if piece.startswith(mark)] for mark in WORD_MARKS}
    # Of a vocabulary without them a few pieces may begin with these characters.
    mark = next((mark for mark, pieces in begins.items() if len(pieces) > len(vocabulary) / 10), "")
    words = {piece.removeprefix(mark): row for piece, row in vocabulary.items() if piece.startswith(mark)}
    if mark == BYTES:
        # Other letters stand there as bytes.
        words = {word: row for word, row in words.items() if word.isascii()}
    return {word: row for word, row in words.items() if word.isalpha() and word == word.lower()}


# --- the command that shows them -------------------------------------------------------------------------------------


def mark_changes(before: Example, after: Example) -> tuple["Text", "Text"]:
    """Both contexts, with `[-what is gone-]`, `{+what is new+}` and `<<the first answer>>`.

    Args:
        before: An example.
        after: Its copy.
    """
    from rich.text import Text

    old, new = _words(before), _words(after)
    left, right = Text(), Text()
    for kind, i1, i2, j1, j2 in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = "".join(old[i1:i2]), "".join(new[j1:j2])
        left.append(gone if kind == "equal" or not gone else f"[-{gone}-]", None if kind == "equal" else "red")
        right.append(come if kind == "equal" or not come else f"{{+{come}+}}", None if kind == "equal" else "green")
    for text in (left, right):
        text.highlight_regex(r"<<.*?>>", "bold cyan")
    return left, right


def _words(example: Example) -> list[str]:
    """Words and what is between them; the first answer is one of them."""
    context = example.context
    if not example.answers:
        return re.findall(r"\w+|\W+", context)
    start, end = example.starts[0], example.starts[0] + len(example.answers[0])
    cut_up = [re.findall(r"\w+|\W", part) for part in (context[:start], context[end:])]
    return [*cut_up[0], f"<<{context[start:end]}>>", *cut_up[1]]


def main(args: Sequence[str] | None = None) -> None:
    """Print examples beside their augmented copies.

    Args:
        args: Words of the command line; those of the process by default.

    Raises:
        SystemExit: An argument is wrong, or data are missing; the message says what to do.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    parser = argparse.ArgumentParser(
        "python -m tasks.qa.augment", description="Augmented contexts beside the old ones."
    )
    parser.add_argument(
        "--file", help="questions, as for --data.file; by default qa/ood_train.parquet of the data root"
    )
    parser.add_argument("--root", help="the data root; else MOE_ZOO_DATA names it")
    parser.add_argument("--count", type=int, default=3, help="how many questions, drawn at random")
    parser.add_argument("--copies", type=int, default=4, help="new contexts for each")
    parser.add_argument(
        "--synonyms", default="embedding", help="this, 'wordnet', or a file of word<TAB>synonym,synonym"
    )
    for name in TECHNIQUES:
        parser.add_argument(f"--{name}", type=float, default=0.1, help=f"share of words; 0 turns {name} off")
    parser.add_argument("--keep-question-words", action="store_true", help="leave words of the question alone")
    parser.add_argument("--back-translation", nargs=2, metavar=("THERE", "BACK"), help="two Marian models: shown too")
    parser.add_argument("--cache", help="file that keeps translations")
    parser.add_argument("--base", default=MINILM, help="whose embeddings are meant")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    try:
        examples = read_examples(options.file or find(options.root, "qa/ood_train.parquet", "Or name a --file."))
        places = np.random.default_rng(options.seed).permutation(len(examples))[: options.count]
        chosen = [examples[place] for place in sorted(places)]
        copies = _copies(chosen, options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    console = Console()
    for example in chosen:
        console.print(Text(f"{example.id} ({example.domain}): {example.question}", "bold"))
        for copy in copies:
            if copy.id.startswith(f"{example.id}#"):
                table = Table("before", copy.id.removeprefix(example.id), show_lines=True, expand=True)
                table.add_row(*mark_changes(example, copy))
                console.print(table)


def _copies(examples: Sequence[Example], options: argparse.Namespace) -> list[Example]:
    """What the command shows."""
    shares = {name: getattr(options, name) for name in TECHNIQUES}
    eda = Eda(options.copies, **shares, synonyms=options.synonyms, seed=options.seed)
    eda = replace(eda, keep_question_words=options.keep_question_words)
    copies = augment(examples, eda, load_synonyms(options.synonyms, options.base) if eda.needs_synonyms else None)
    if options.back_translation:
        from tasks.qa.back_translation import back_translate, load_translators

        copies += back_translate(examples, load_translators([options.back_translation], options.cache))
    return copies


if __name__ == "__main__":
    main()
