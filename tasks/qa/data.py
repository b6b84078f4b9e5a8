"""Windows of questions from the development data, an official source, a file of the user's own, or a generated set.

Domains are learned from, out of domain (few or no questions to learn from), or both parts of a test, never mixed up.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset

from tasks.qa.augment import Eda, augment, is_copy, load_synonyms
from tasks.qa.back_translation import back_translate, load_translators
from tasks.qa.examples import (
    GENERATED,
    GENERATED_OOD,
    OFFICIAL,
    OWN_DOMAIN,
    Example,
    check_examples,
    count_repeated,
    folds,
    generate_examples,
    load_official,
    read_examples,
    read_text,
    split_by_document,
)
from tasks.qa.windows import Window, collate, count_windows, make_windows, thin_out
from zoo.base_models import MINILM, load_tokenizer
from zoo.data import EpochSampler, LateLoader, ZooDataModule, check_disjoint, epoch_seed, find
from zoo.errors import DataNotFoundError, UnknownNameError

Part = Literal["train", "test"]

SOURCES = ("robustqa", *OFFICIAL, "file", "generated")
STAGES = ("in_domain", "joint", "ood")
# Below the data root.
ROBUSTQA = {
    "train": ("qa/train.parquet", "qa/ood_train.parquet"),
    "test": ("qa/test.parquet", "qa/ood_val.parquet"),
}
HOW_TO_GET_QUESTIONS = (
    "This file is part of the development data; for questions of your own use source=file with --data.file, for "
    "official data source=squad, squad_v2 or mrqa; source=generated needs none."
)
# Splits of the official sources, and which of their domains are out of domain.
OFFICIAL_SPLITS = {
    "squad": {"train": ("train",), "test": ("validation",)},
    "squad_v2": {"train": ("train",), "test": ("validation",)},
    "mrqa": {"train": ("train",), "test": ("validation", "test")},
}
OOD_DOMAINS = {
    "robustqa": ("race", "duorc", "relation_extraction"),
    "mrqa": ("BioASQ", "DROP", "DuoRC.ParaphraseRC", "RACE", "RelationExtraction", "TextbookQA"),
    "generated": GENERATED_OOD,
}
# Questions of the generated set in domain, and out of domain.
GENERATED_COUNTS = {"train": (1800, 80), "test": (300, 200)}
# Chooses documents to hold out, folds and limited sets: the same whatever the run's seed, so that runs compare.
SPLIT_SEED = 0
# Batches whose windows are sorted by length together; more pad less, and mix less.
POOL = 50


class WindowDataset(Dataset[tuple[int, Window]]):
    """Windows with their positions.

    Attributes:
        examples: Questions.
        windows: Their windows, whose `example` is a position in `examples`.
    """

    def __init__(self, examples: Sequence[Example], windows: Sequence[Window]) -> None:
        self.examples = examples
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[int, Window]:
        return index, self.windows[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window."""
        return [len(window.input_ids) for window in self.windows]


class LengthSampler(EpochSampler):
    """A permutation per epoch in which windows of similar length stand together, so that batches need little padding.

    It depends on the seed and the epoch alone, as the one that it begins with.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """Store what orders them.

        Args:
            lengths: Tokens of each window.
            batch_size: Windows that stand together.
            seed: Of the run.
        """
        super().__init__(len(lengths), seed)
        self.lengths = lengths
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        order, size = list(super().__iter__()), self.batch_size
        pools = (order[first : first + POOL * size] for first in range(0, len(order), POOL * size))
        alike = [place for pool in pools for place in sorted(pool, key=self.lengths.__getitem__)]
        batches = [alike[first : first + size] for first in range(0, len(alike), size)]
        # An incomplete batch has to be the last one.
        whole = len(alike) // size
        shuffled = np.random.default_rng(epoch_seed(self.seed, self.epoch)).permutation(whole)
        for number in [*shuffled, *range(whole, len(batches))]:
            yield from batches[number]


class QADataModule(ZooDataModule):
    """Windows for learning, validation and test, and those of a question to predict.

    Validation is on documents of the in-domain questions that are held out, or on a fold of the out-of-domain ones.

    Attributes:
        tokenizer: Of the base model; set by `setup`.
        ood_domains: Which domains are out of domain.
        seen: How many test questions are about a context that is learned from; set by `setup` for fitting, None where
            there is no test part.
    """

    train_set: WindowDataset | None = None
    val_set: WindowDataset | None = None
    test_set: WindowDataset | None = None
    predict_set: WindowDataset | None = None
    tokenizer: Any = None
    seen: int | None = None

    def __init__(
        self,
        root: str | None = None,
        source: Literal["robustqa", "squad", "squad_v2", "mrqa", "file", "generated"] = "robustqa",
        file: str | None = None,
        test_file: str | None = None,
        domains: list[str] | None = None,
        ood_domains: list[str] | None = None,
        stage: Literal["in_domain", "joint", "ood"] = "in_domain",
        replay: int | None = None,
        holdout: float = 0.1,
        fold: int | None = None,
        folds: int = 5,
        augment: dict[str, Any] | None = None,
        limit: int | None = None,
        keep_empty: float = 1.0,
        base: str = MINILM,
        max_length: int = 256,
        stride: int = 64,
        question: str | None = None,
        context: str | None = None,
        context_file: str | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Describe the data; nothing is read before `setup`.

        Args:
            root: Data root with `qa/`; else `MOE_ZOO_DATA`.
            source: `robustqa`, the development data; `squad`, `squad_v2` or `mrqa`, from the hub through `datasets`;
                `file`, the user's own; `generated`, a synthetic set.
            file: Questions to learn from, or to answer in prediction, as `read_examples` reads them.
            test_file: Questions to be scored.
            domains: In-domain ones to use; all if left out.
            ood_domains: Those that are out of domain; the source's own if left out, of which a file has none.
            stage: What is learned from: `in_domain`; `joint`, these and the out-of-domain questions; `ood`, only those.
            replay: Of a joint stage, at most so many questions per in-domain domain; all if left out. In a second stage
                few are enough that the domains of the first are not forgotten.
            holdout: Share of the in-domain questions whose documents are held out for validation, whatever is learned.
            fold: Validate on this fold of the out-of-domain questions, from 0, and do not learn from it. Without one
                all of them may be learned from, and validation is on what is held out in domain.
            folds: How many there are.
            augment: New contexts of the out-of-domain questions that are learned: arguments of `Eda`, and
                `back_translation`, a list of pairs of models as for `load_translators`, with `cache`, a file for its
                translations.
            limit: At most so many questions per domain, for quick runs.
            keep_empty: Share of the windows without their question's answer that are learned from.
            base: The model whose tokenizer is used.
            max_length: Tokens of a window.
            stride: Tokens of context that neighbours share.
            question: Of prediction.
            context: The text that answers it.
            context_file: A file of that text instead.
            batch_size: Windows per batch.
            num_workers: Processes that load.
            seed: Seed of the order, and of which empty windows are kept.

        Raises:
            UnknownNameError: There is no such source, stage or argument of `augment`.
            ValueError: An argument is out of its range, or has no effect beside the others.
        """
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.save_hyperparameters()
        self.root = root
        self.source = source
        self.file = file
        self.test_file = test_file
        self.domains = domains
        self.stage = stage
        self.replay = replay
        self.holdout = holdout
        self.fold = fold
        self.folds = folds
        self.limit = limit
        self.keep_empty = keep_empty
        self.base = base
        self.max_length = max_length
        self.stride = stride
        self.question = question
        self.context = context
        self.context_file = context_file
        self.check_source()
        self.ood_domains = tuple(OOD_DOMAINS.get(source, ()) if ood_domains is None else ood_domains)
        self.check_stage(augment)
        self.eda, self.back_translation, self.cache = choose_augmentation(augment or {})

    def check_source(self) -> None:
        """Refuse an unknown source, and arguments that would have no effect on the one that is named."""
        if self.source not in SOURCES:
            raise UnknownNameError("source of questions", self.source, SOURCES)
        for name in ("file", "test_file"):
            if getattr(self, name) is not None and self.source != "file":
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect on source={self.source!r}: it is for source='file'."
                )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: must be at least 1.")
        contexts = [name for name in ("context", "context_file") if getattr(self, name) is not None]
        if len(contexts) != (self.question is not None):
            raise ValueError(
                f"A question takes a context or a context_file, one of them; found question={self.question!r} and "
                f"{' and '.join(contexts) or 'neither'}."
            )

    def check_stage(self, augment: dict[str, Any] | None) -> None:
        """Refuse an unknown stage, a fold that does not exist, and augmentation of what is not learned from."""
        if self.stage not in STAGES:
            raise UnknownNameError("stage", self.stage, STAGES)
        if self.fold is not None and not 0 <= self.fold < self.folds:
            raise ValueError(f"fold={self.fold}: must be from 0 to {self.folds - 1}, as folds={self.folds}.")
        if self.replay is not None and (self.stage != "joint" or self.replay < 1):
            raise ValueError(
                f"replay={self.replay} with stage={self.stage!r}: a joint stage learns from at least 1 question of "
                "each in-domain domain; another stage has no replay."
            )
        if augment and self.stage == "in_domain":
            raise ValueError(
                "augment makes new contexts of the out-of-domain questions, which stage='in_domain' does not learn "
                "from: use 'joint' or 'ood'."
            )

    def setup(self, stage: str | None = None) -> None:
        """Read and cut the parts that the stage needs.

        Raises:
            ValueError: The data do not have what is asked for, see `read_training`.
            DataNotFoundError: They are not there, or a `test_file` is not, also where it is only counted for the card.
        """
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.base)
        if stage == "predict":
            self.predict_set = self.cut(self.read_asked())
        if stage in ("fit", "validate", None):
            learned, held_out = self.read_training()
            self.val_set = self.cut(held_out)
            if stage != "validate":
                # Before anything takes long.
                scored = self.read_scored()
                whole = self.cut([*learned, *self.augmented(learned)])
                kept = thin_out(whole.examples, whole.windows, self.keep_empty, self.seed)
                self.train_set = WindowDataset(whole.examples, kept)
                contexts = {example.context for example in whole.examples}
                self.seen = None if scored is None else sum(example.context in contexts for example in scored)
        if stage == "test" or (stage is None and self.has_test):
            self.test_set = self.cut(self.read("test"))

    @property
    def uses_ood(self) -> bool:
        """Whether out-of-domain questions are learned from or validated on."""
        return self.stage != "in_domain" or self.fold is not None

    @property
    def has_test(self) -> bool:
        """Whether the source has questions to score; a file alone has none."""
        return self.source != "file" or self.test_file is not None

    def cut(self, examples: Sequence[Example]) -> WindowDataset:
        """Windows of questions."""
        return WindowDataset(examples, make_windows(examples, self.tokenizer, self.max_length, self.stride))

    def is_ood(self, example: Example) -> bool:
        """Whether a question is out of domain."""
        return example.domain in self.ood_domains

    def read_training(self) -> tuple[list[Example], list[Example]]:
        """Questions to learn from and to validate on, which share no document and no context.

        Raises:
            ValueError: There are none of those that the stage or the validation needs, or both share a context.
        """
        if self.uses_ood and not self.ood_domains:
            raise ValueError(
                f"stage={self.stage!r} and fold={self.fold} need out-of-domain questions, but source={self.source!r} "
                "has none: name their domains with ood_domains."
            )
        examples = self.read("train")
        inside = [example for example in examples if not self.is_ood(example)]
        outside = [example for example in examples if self.is_ood(example)]
        held_out: list[Example] = []
        if inside:
            inside, held_out = split_by_document(inside, self.holdout, SPLIT_SEED)
        if self.fold is not None:
            numbers = folds(outside, self.folds, SPLIT_SEED)
            held_out = [example for example, number in zip(outside, numbers, strict=True) if number == self.fold]
            outside = [example for example, number in zip(outside, numbers, strict=True) if number != self.fold]
        if self.replay is not None:
            inside = limit_domains(inside, self.replay)
        parts = {"in_domain": [inside], "joint": [inside, outside], "ood": [outside]}[self.stage]
        if not all(parts):
            raise ValueError(
                f"stage={self.stage!r} has nothing to learn from: the training part of source={self.source!r} has "
                f"{len(inside)} in-domain and {len(outside)} out-of-domain questions."
            )
        if not held_out:
            raise ValueError("There is nothing to validate on: without in-domain questions choose a fold, e.g. fold=0.")
        learned = [example for part in parts for example in part]
        check_apart(learned, held_out)
        return learned, held_out

    def augmented(self, learned: Sequence[Example]) -> list[Example]:
        """New contexts of the out-of-domain questions."""
        outside = [example for example in learned if self.is_ood(example)]
        copies: list[Example] = []
        if self.eda:
            synonyms = load_synonyms(self.eda.synonyms, self.base) if self.eda.needs_synonyms else None
            copies += augment(outside, self.eda, synonyms)
        if self.back_translation:
            copies += back_translate(outside, load_translators(self.back_translation, self.cache))
        return copies

    def read_asked(self) -> list[Example]:
        """What prediction is about: the question, or those of the file.

        Raises:
            ValueError: Neither is there.
        """
        if self.question is not None:
            text = self.context if self.context_file is None else read_text(self.context_file)
            asked = [Example("question", OWN_DOMAIN, text, self.question, text)]
            check_examples(asked, "The prediction")
            return asked
        if self.file is None:
            raise ValueError(
                "There is nothing to predict: name a question and its text with --data.question TEXT and "
                "--data.context_file FILE, or a file of questions with --data.source file --data.file FILE."
            )
        return read_examples(self.file, answered=False)

    def read(self, part: Part) -> list[Example]:
        """Questions of the domains in use.

        Args:
            part: `train`, out-of-domain ones included, or `test`.

        Raises:
            DataNotFoundError: They are not there, or not named.
            UnknownNameError: A domain in use is not among those to learn from, or none of them among those to score.
        """
        examples = self.read_source(part)
        found = {example.domain for example in examples}
        inside = found - set(OOD_DOMAINS.get(self.source, ())) if self.domains is None else set(self.domains)
        used = inside | set(self.ood_domains)
        needed = {*(self.domains or ()), *((self.hparams.ood_domains or ()) if self.uses_ood else ())}
        if part == "train" and (unknown := sorted(needed - found)):
            raise UnknownNameError("domain of the training part", unknown[0], found)
        if not used & found:
            raise UnknownNameError(f"domain of the {part} part", min(used), found)
        kept = [example for example in examples if example.domain in used]
        return kept if self.limit is None else limit_domains(kept, self.limit)

    def read_scored(self) -> list[Example] | None:
        """The test part; None where the source has none, or has it elsewhere: training can do without.

        Raises:
            DataNotFoundError: The user's own is not there.
        """
        if not self.has_test:
            return None
        try:
            return self.read("test")
        except DataNotFoundError:
            if self.source == "file":
                raise
            return None

    def read_source(self, part: Part) -> list[Example]:
        """All questions of the source."""
        if self.source == "file":
            name = {"train": "file", "test": "test_file"}[part]
            if getattr(self, name) is None:
                raise DataNotFoundError(f"the questions of {part}", [], f"Name their file with --data.{name} FILE.")
            return read_examples(getattr(self, name))
        if self.source == "generated":
            inside, outside = GENERATED_COUNTS[part]
            seed = list(GENERATED_COUNTS).index(part)
            in_domain = [name for name in GENERATED if name not in GENERATED_OOD]
            return generate_examples(inside, seed, in_domain) + generate_examples(outside, seed, GENERATED_OOD)
        if self.source == "robustqa":
            lists = [read_examples(find(self.root, path, HOW_TO_GET_QUESTIONS)) for path in ROBUSTQA[part]]
        else:
            lists = [load_official(self.source, split) for split in OFFICIAL_SPLITS[self.source][part]]
        return [example for examples in lists for example in examples]

    def loader(self, dataset: Dataset[Any], shuffle: bool = False, **options: Any) -> DataLoader[Any]:
        """A loader of `Batch`es of similarly long windows, the longest first where they are not shuffled."""
        lengths = dataset.lengths  # type: ignore[attr-defined]
        fixed = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        return LateLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=LengthSampler(lengths, self.batch_size, self.seed) if shuffle else fixed,
            num_workers=self.num_workers,
            collate_fn=partial(collate, pad_id=self.tokenizer.pad_token_id),
            **options,
        )

    def describe(self) -> str:
        """What training uses, in words for a model card; after `setup` for fitting."""
        learned, held_out = self.train_set.examples, self.val_set.examples
        counts = count_windows(learned, self.train_set.windows)
        given = [example for example in learned if not is_copy(example)]
        synthetic = " (synthetic)" if self.source == "generated" else ""
        replayed = f" (at most {self.replay} of each in-domain one)" if self.replay else ""
        copies = f" and {len(learned) - len(given)} augmented ones" if len(learned) > len(given) else ""
        seen = "" if self.seen is None else f"; {self.seen} test questions are about a context learned from"
        return (
            f"{len(given)} questions of {name_domains(given)}{replayed}{synthetic}{copies}, in {counts.windows} "
            f"windows of up to {self.max_length} tokens, {counts.empty} of them without the answer (of the questions "
            f"{counts.unanswerable} have no answer, {counts.lost} one that fits in no window, {counts.widened} one "
            f"widened to whole tokens, {count_repeated(learned)} one that the context repeats); settings chosen on "
            f"{len(held_out)} questions of {name_domains(held_out)}{seen}"
        )


def name_domains(examples: Iterable[Example]) -> str:
    """Domains in the order in which they appear."""
    return ", ".join(dict.fromkeys(example.domain for example in examples))


def check_apart(learned: Iterable[Example], held_out: Iterable[Example]) -> None:
    """Refuse parts that share a document or a context.

    Args:
        learned: What is learned from.
        held_out: What is validated on.

    Raises:
        ValueError: They share one; the message names the first question about it.
    """
    for what in ("document", "context"):
        first: dict[str, str] = {}
        names = [{first.setdefault(getattr(e, what), e.id) for e in part} for part in (learned, held_out)]
        check_disjoint({f"train ({what}s)": names[0], f"validation ({what}s)": names[1]})


def choose_augmentation(arguments: dict[str, Any]) -> tuple[Eda | None, list[list[str]] | None, str | None]:
    """EDA, the models of back-translation and the file for its translations, of a datamodule's `augment`.

    Args:
        arguments: As `QADataModule` describes them.

    Raises:
        UnknownNameError: There is no such argument.
        ValueError: One is out of its range, or `cache` is there without `back_translation`.
    """
    known = {field.name for field in fields(Eda)}
    other = {"back_translation", "cache"}
    if unknown := sorted(arguments.keys() - known - other):
        raise UnknownNameError("argument of augment", unknown[0], known | other)
    if "cache" in arguments and not arguments.get("back_translation"):
        raise ValueError(f"cache={arguments['cache']!r} has no effect without back_translation.")
    eda = {name: value for name, value in arguments.items() if name in known}
    return Eda(**eda) if eda else None, arguments.get("back_translation"), arguments.get("cache")


def limit_domains(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most so many examples of each domain, drawn from all over it.

    Args:
        examples: All.
        limit: How many.
    """
    kept: set[int] = set()
    taken: dict[str, int] = {}
    for place in np.random.default_rng(SPLIT_SEED).permutation(len(examples)).tolist():
        domain = examples[place].domain
        if taken.setdefault(domain, 0) < limit:
            taken[domain] += 1
            kept.add(place)
    return [example for place, example in enumerate(examples) if place in kept]
