"""Text with known domains: unique contexts, held-out documents, windows of token ids, batches of two objectives."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from zoo.data import check_disjoint, find

Objective = Literal["masked", "causal"]

MASK, SEPARATOR = 0, 1
SPECIAL_TOKENS = ["[MASK]", "[SEP]"]
MASK_RATE = 0.3
HELD_OUT = 0.1
# Contexts that begin alike are one text: reviews are there twice, with typing errors mended.
SAME_START = 100


@dataclass(frozen=True, slots=True)
class Document:
    """Some text of one document; texts of one document share its key."""

    key: str
    domain: str
    text: str


class Vocabulary(Protocol):
    """What turns text into token ids."""

    size: int

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""


@dataclass(frozen=True, slots=True)
class Windows:
    """N sequences of L tokens, each of one domain.

    Attributes:
        ids: `(N, L)` int64.
        domain: `(N,)` int64, index into `Corpus.domains`.
        keys: The documents they come from.
    """

    ids: Tensor
    domain: Tensor
    keys: frozenset[str]

    def take(self, index: Tensor) -> "Windows":
        """Some of the sequences."""
        return Windows(self.ids[index], self.domain[index], self.keys)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training and validation windows of different documents."""

    train: Windows
    val: Windows
    domains: list[str]
    vocab_size: int

    def frequencies(self, objective: Objective) -> list[float]:
        """How often the model reads each token id."""
        counts = torch.bincount(self.train.ids.flatten(), minlength=self.vocab_size).double()
        if objective == "masked":
            masked = MASK_RATE * counts.sum()
            counts *= 1 - MASK_RATE
            counts[MASK] += masked
        return [float(count) for count in counts]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward takes.

    Attributes:
        ids: `(B, L)` the tokens that the model reads.
        scored: `(B, L)` bool, the positions whose prediction counts.
        targets: `(scored.sum(),)` the right answers there.
    """

    ids: Tensor
    scored: Tensor
    targets: Tensor

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of so many sequences."""
        sizes = [int(part.sum()) for part in self.scored.split(size)]
        parts = zip(self.ids.split(size), self.scored.split(size), self.targets.split(sizes), strict=True)
        return (Batch(*part) for part in parts)


def make_batch(ids: Tensor, objective: Objective, generator: torch.Generator) -> Batch:
    """Hide random tokens (masked), or ask for the next one everywhere (causal).

    Args:
        ids: `(B, L)`.
        objective: What the model learns.
        generator: Chooses what is hidden.
    """
    if objective == "masked":
        scored = torch.rand(ids.shape, generator=generator) < MASK_RATE
        scored[:, 0] |= ~scored.any(1)
        return Batch(ids.masked_fill(scored, MASK), scored, ids[scored])
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, -1] = False
    return Batch(ids, scored, ids[:, 1:].flatten())


def question_answering_documents() -> list[Document]:
    """The unique contexts of `qa/*.parquet`; their titles tell the documents apart, reviews are their own.

    Raises:
        DataNotFoundError: There is no such data.
    """
    folder = find(None, "qa", "The study reads the contexts of its *.parquet; `--data generated` needs no data.")
    import pandas as pd

    columns = ["domain", "title", "context"]
    rows = pd.concat([pd.read_parquet(path, columns=columns) for path in sorted(folder.glob("*.parquet"))])
    documents: dict[str, Document] = {}
    for domain, title, context in rows.itertuples(index=False):
        text = " ".join(context.split())
        start = text[:SAME_START].lower()
        documents.setdefault(start, Document(title or start, domain, text))
    return list(documents.values())


def generated_documents(seed: int = 0, per_domain: int = 30, words: int = 60) -> list[Document]:
    """Three domains of made-up words; each prefers words of its own, and each word has a favourite successor."""
    random = torch.Generator().manual_seed(seed)
    successor = torch.randperm(48, generator=random)
    documents = []
    for domain in range(3):
        for number in range(per_domain):
            word, text = 0, []
            for _ in range(words):
                luck, own = torch.rand(2, generator=random).tolist()
                fresh = int(torch.randint(16, (), generator=random)) + 16 * domain if own < 0.7 else word
                word = int(successor[word]) if luck < 0.5 else fresh
                text.append(f"w{word}")
            documents.append(Document(f"{domain}-{number}", f"domain-{domain}", " ".join(text)))
    return documents


def hold_out(documents: Sequence[Document], share: float = HELD_OUT, seed: int = 0) -> dict[str, list[Document]]:
    """Split whole documents: of each domain, random ones until they hold this share of its text.

    Args:
        documents: All texts.
        share: Of the characters, for validation.
        seed: Of the choice.

    Raises:
        ValueError: A document or a text is in both parts.
    """
    length: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for document in documents:
        length[document.domain][document.key] += len(document.text)
    random = torch.Generator().manual_seed(seed)
    held: set[str] = set()
    for _, keys in sorted(length.items()):
        names, wanted = sorted(keys), share * sum(keys.values())
        for place in torch.randperm(len(names), generator=random).tolist():
            if wanted <= 0:
                break
            held.add(names[place])
            wanted -= keys[names[place]]
    parts = {
        "train": [document for document in documents if document.key not in held],
        "val": [document for document in documents if document.key in held],
    }
    check_disjoint({name: [document.key for document in part] for name, part in parts.items()})
    check_disjoint({name: [document.text for document in part] for name, part in parts.items()})
    return parts


class WordVocabulary:
    """One id per word, for generated text."""

    def __init__(self, documents: Sequence[Document]) -> None:
        """Number the words of some documents."""
        words = sorted({word for document in documents for word in document.text.split()})
        self.ids = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *words])}
        self.size = len(self.ids)

    def encode(self, text: str) -> list[int]:
        """The ids of the words; words that training did not have are left out."""
        return [self.ids[word] for word in text.split() if word in self.ids]


class BytePairVocabulary:
    """A byte-level BPE, learned from the training documents and kept in a folder."""

    def __init__(self, documents: Sequence[Document], size: int, cache: Path) -> None:
        """Read the vocabulary of these documents from the cache, or learn it.

        Args:
            documents: The training documents.
            size: Number of tokens.
            cache: Folder of what was learned before.

        Raises:
            ModuleNotFoundError: The library `tokenizers` is missing.
        """
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise ModuleNotFoundError("The study's BPE needs `tokenizers`: pip install 'moe-zoo[text]'.") from None
        texts = [document.text for document in documents]
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
        path = cache / f"bpe-{size}-{digest}.json"
        if not path.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            self.learn(texts, size).save(str(path))
        self.tokenizer = Tokenizer.from_file(str(path))
        self.size = self.tokenizer.get_vocab_size()

    def learn(self, texts: list[str], size: int) -> "Tokenizer":  # noqa: F821
        """Train a tokenizer."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.tokenizer.encode(text).ids


def cut(documents: Sequence[Document], vocabulary: Vocabulary, domains: Sequence[str], length: int) -> Windows:
    """Join the documents of each domain, with separators, and cut them into windows; the rest is dropped.

    Args:
        documents: Of one split.
        vocabulary: Encodes them.
        domains: Their names, in order.
        length: L.
    """
    streams: dict[str, list[int]] = {domain: [] for domain in domains}
    for document in documents:
        streams[document.domain] += [*vocabulary.encode(document.text), SEPARATOR]
    ids, labels = [], []
    for number, stream in enumerate(streams.values()):
        count = len(stream) // length
        ids.append(torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length))
        labels.append(torch.full((count,), number))
    return Windows(torch.cat(ids), torch.cat(labels), frozenset(document.key for document in documents))


def load_corpus(data: str, length: int, vocab_size: int, max_val: int, cache: Path) -> Corpus:
    """The windows of a study.

    Args:
        data: `qa` or `generated`.
        length: L, tokens per window.
        vocab_size: Of the BPE; generated text has a word-level vocabulary.
        max_val: At most this many validation windows, a fixed random choice.
        cache: Folder of learned vocabularies.

    Raises:
        DataNotFoundError: `qa` is not there.
    """
    documents = generated_documents() if data == "generated" else question_answering_documents()
    parts = hold_out(documents)
    domains = sorted({document.domain for document in documents})
    vocabulary: Vocabulary
    if data == "generated":
        vocabulary = WordVocabulary(parts["train"])
    else:
        vocabulary = BytePairVocabulary(parts["train"], vocab_size, cache)
    train, val = (cut(parts[name], vocabulary, domains, length) for name in ("train", "val"))
    chosen = torch.randperm(len(val.ids), generator=torch.Generator().manual_seed(0))[:max_val]
    return Corpus(train, val.take(chosen), domains, vocabulary.size)
