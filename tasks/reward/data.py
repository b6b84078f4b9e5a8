"""Preference pairs from the development data, an official source, a file of the user's own, or a generated set."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Subset

from tasks.reward.capabilities import PREFERENCE_ITSELF, capability_preferences
from tasks.reward.examples import (
    OFFICIAL,
    Candidate,
    Pair,
    check_apart,
    check_candidates,
    flip_labels,
    generate_pairs,
    load_official,
    prompt_key,
    read_candidates,
    read_pairs,
    read_preference,
    split_by_prompt,
    without_prompts_of,
)
from tasks.reward.groups import HOW_TO_GET_PREFERENCES, PREFERENCE
from tasks.reward.labelling import read_labels
from tasks.reward.texts import Batch, Tokens, encode_prompts, encode_texts, pad
from zoo.base_models import MINILM, load_tokenizer
from zoo.data import EpochSampler, ZooDataModule, epoch_seed, find
from zoo.errors import DataNotFoundError, UnknownNameError

SOURCES = ("preference", *OFFICIAL, "file", "generated")
# Pairs of the generated set.
GENERATED_COUNTS = {"train": 600, "val": 60, "test": 120}
# Chooses prompts to hold out and limited sets: the same whatever the run's seed, so that runs compare.
SPLIT_SEED = 0
# Phases that learn from what `aggregate_share` holds back, from one pair of each prompt, and from all pairs; the others
# learn from what is not held back. What a capability expert learns is not what people prefer, so that pairs that it has
# seen may teach how much it counts.
HELD_BACK, BY_PROMPT, EVERYTHING = ("aggregate", "gate"), ("router",), ("members", "capability", "weigh")
# Phases in which inner models learn apart. Each batch is of one of them: a step is as large however few pairs it has.
BY_GROUP = ("task", "capability", "weigh", "aggregate")


class TextDataset(Dataset[int]):
    """Texts, each once, and their prompts.

    Attributes:
        texts: Tokens of the different prompts with answers.
        prompts: Tokens of the different prompts.
        text_of: `(columns, n)` positions in `texts`: the chosen and rejected answers of n pairs, or n single answers.
        prompt_of: `(n,)` positions in `prompts`.
        categories: Of each of n.
        preferences: `(n, U)` int8.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        answers: Sequence[Sequence[str]],
        categories: Sequence[str],
        tokenizer: Any,
        max_length: int,
        least_prompt: int,
    ) -> None:
        """Cut texts into tokens.

        Args:
            prompts: n of them.
            answers: One or two columns of n answers each.
            categories: n of them.
            tokenizer: Of the base.
            max_length: Tokens of a text.
            least_prompt: See `encode_texts`.
        """
        different = sorted({(prompt, text) for column in answers for prompt, text in zip(prompts, column, strict=True)})
        places = {pair: place for place, pair in enumerate(different)}
        self.texts: list[Tokens] = encode_texts(*zip(*different, strict=True), tokenizer, max_length, least_prompt)
        self.text_of = np.array(
            [[places[pair] for pair in zip(prompts, column, strict=True)] for column in answers], dtype=np.intp
        )
        names = sorted(set(prompts))
        numbers = {name: number for number, name in enumerate(names)}
        self.prompts: list[Tokens] = encode_prompts(names, tokenizer, max_length)
        self.prompt_of = np.array([numbers[prompt] for prompt in prompts], dtype=np.intp)
        self.categories = list(categories)
        self.preferences: NDArray[np.int8] = np.zeros((len(self.categories), 0), dtype=np.int8)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def __len__(self) -> int:
        return len(self.categories)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, rows: list[int]) -> Batch:
        """A batch of some pairs or answers."""
        texts = self.text_of[:, rows].flatten().tolist()
        prompts = self.prompt_of[rows].tolist()
        ids, mask, types = pad([self.texts[place] for place in texts], self.pad_id)
        prompt_ids, prompt_mask, _ = pad([self.prompts[place] for place in prompts], self.pad_id)
        preferences = torch.from_numpy(self.preferences[rows])
        return Batch(ids, mask, types, prompt_ids, prompt_mask, preferences, texts, prompts, rows)


class PairDataset(TextDataset):
    """Pairs, see `TextDataset`; the first column of `text_of` is the chosen answers.

    Attributes:
        pairs: The pairs.
        held_back: `(n,)` bool, of which no LoRA learns what people prefer.
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: Any, max_length: int, least_prompt: int) -> None:
        self.pairs = list(pairs)
        columns = [[pair.chosen for pair in pairs], [pair.rejected for pair in pairs]]
        prompts, categories = [pair.prompt for pair in pairs], [pair.category for pair in pairs]
        super().__init__(prompts, columns, categories, tokenizer, max_length, least_prompt)
        self.held_back = np.zeros(len(pairs), dtype=np.bool_)

    def places(self, phase: str) -> list[int]:
        """Positions of the pairs that a phase learns from, see `HELD_BACK` and the like."""
        if phase in BY_PROMPT:
            return np.unique(self.prompt_of, return_index=True)[1].tolist()
        if phase in EVERYTHING or not self.held_back.any():
            return list(range(len(self)))
        return np.flatnonzero(self.held_back == (phase in HELD_BACK)).tolist()


class GroupSampler(EpochSampler):
    """A permutation per epoch in whole batches of one group each; what fills no batch of its own group comes last.

    It depends on the seed and the epoch alone, as the one that it begins with.
    """

    def __init__(self, groups: Sequence[int], batch_size: int, seed: int) -> None:
        """Store what orders them.

        Args:
            groups: Of each sample.
            batch_size: Samples that stand together.
            seed: Of the run.
        """
        super().__init__(len(groups), seed)
        self.groups = groups
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        by_group: dict[int, list[int]] = {}
        for place in super().__iter__():
            by_group.setdefault(self.groups[place], []).append(place)
        size = self.batch_size
        whole = {group: len(of) // size * size for group, of in by_group.items()}
        batches = [of[start : start + size] for group, of in by_group.items() for start in range(0, whole[group], size)]
        for number in np.random.default_rng(epoch_seed(self.seed, self.epoch)).permutation(len(batches)):
            yield from batches[number]
        for group, of in by_group.items():
            yield from of[whole[group] :]


class CandidateDataset(TextDataset):
    """Answers to be scored, see `TextDataset`."""

    def __init__(self, candidates: Sequence[Candidate], tokenizer: Any, max_length: int, least_prompt: int) -> None:
        self.candidates = list(candidates)
        prompts, categories = [one.prompt for one in candidates], [one.category for one in candidates]
        super().__init__(prompts, [[one.answer for one in candidates]], categories, tokenizer, max_length, least_prompt)


class RewardDataModule(ZooDataModule):
    """Pairs for learning, validation and test, and answers to be scored.

    Attributes:
        tokenizer: Of the base; set by `setup`.
    """

    train_set: PairDataset | None = None
    val_set: PairDataset | None = None
    test_set: PairDataset | None = None
    predict_set: CandidateDataset | None = None
    tokenizer: Any = None

    def __init__(
        self,
        root: str | None = None,
        source: Literal["preference", "hh_rlhf", "ultrafeedback", "rewardbench", "file", "generated"] = "preference",
        file: str | None = None,
        test_file: str | None = None,
        columns: dict[str, str] | None = None,
        holdout: float = 0.1,
        aggregate_share: float = 0.4,
        flip: float = 0.0,
        labels: str | None = None,
        limit: int | None = None,
        base: str = MINILM,
        max_length: int = 256,
        least_prompt: int = 32,
        prompt: str | None = None,
        answers: list[str] | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Describe the data; nothing is read before `setup`.

        Args:
            root: Data root with `preference/`; else `MOE_ZOO_DATA`.
            source: `preference`, the development data; `hh_rlhf`, `ultrafeedback` or `rewardbench` (a test alone), from
                the hub through `datasets`; `file`, the user's own; `generated`, a synthetic set.
            file: Pairs to learn from, or answers to score in prediction: a .parquet, .jsonl, .json or .csv file with
                the columns prompt, chosen, rejected, and where wanted category and id; in prediction prompt, answer,
                and where wanted category, which says which inner model reads them.
            test_file: Pairs to be scored.
            columns: What the file calls these columns, where otherwise.
            holdout: Share of the training pairs, by prompt and category, to validate on, where the source has none.
            aggregate_share: Share of the training pairs, by prompt and category, of which only phases in which experts
                are combined learn what people prefer (0.4 in the paper); 0 lets all phases learn from all, as they do
                where there is no such phase.
            flip: Share of the training pairs whose label is made wrong.
            labels: A file of capability labels, as `tasks.reward.labelling.read_labels` reads it, for the training
                pairs; without one labels are measurable properties of the answers, see `tasks.reward.capabilities`.
            limit: At most so many pairs of each part, whole prompts, for quick runs.
            base: The model whose tokenizer is used.
            max_length: Tokens of a text.
            least_prompt: Tokens of the prompt that a long answer leaves.
            prompt: Of prediction.
            answers: To it, to be scored.
            batch_size: Pairs per batch.
            num_workers: Processes that load.
            seed: Seed of the order, and of which labels are flipped.

        Raises:
            UnknownNameError: There is no such source.
            ValueError: An argument is out of its range, or has no effect beside the others.
        """
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.save_hyperparameters()
        self.root = root
        self.source = source
        self.file = file
        self.test_file = test_file
        self.columns = columns
        self.holdout = holdout
        self.aggregate_share = aggregate_share
        self.flip = flip
        self.labels = labels
        self.limit = limit
        self.base = base
        self.max_length = max_length
        self.least_prompt = least_prompt
        self.prompt = prompt
        self.answers = answers
        self.check()

    def check(self) -> None:
        """Refuse an unknown source, and arguments that would have no effect on the one that is named."""
        if self.source not in SOURCES:
            raise UnknownNameError("source of preferences", self.source, SOURCES)
        for name in ("file", "test_file", "columns"):
            if getattr(self, name) is not None and self.source != "file":
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect on source={self.source!r}: it is for source='file'."
                )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: must be at least 1.")
        if self.flip and self.labels:
            raise ValueError(f"flip={self.flip}: a file of labels says which answer is which, so none may be flipped.")
        if (self.prompt is None) != (self.answers is None):
            raise ValueError(f"prompt={self.prompt!r} and answers={self.answers!r} go together.")

    def setup(self, stage: str | None = None) -> None:
        """Read and cut the parts that the stage needs.

        Raises:
            DataNotFoundError: They are not there, or not named.
            ValueError: Parts share a prompt, or a pair cannot be used.
        """
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.base)
        if stage == "predict":
            self.predict_set = CandidateDataset(self.read_asked(), *self.cutting)
        if stage in ("fit", "validate", None):
            parts = self.read_training()
            self.val_set = PairDataset(parts["val"], *self.cutting)
            if stage != "validate":
                learned = flip_labels(parts["train"], self.flip, self.seed)
                self.train_set = PairDataset(learned, *self.cutting)
                held = {pair.id for pair in split_by_prompt(learned, self.aggregate_share, SPLIT_SEED)[1]}
                self.train_set.held_back = np.array([pair.id in held for pair in learned])
        if stage == "test" or (stage is None and self.has_test):
            self.test_set = PairDataset(self.read("test"), *self.cutting)

    @property
    def cutting(self) -> tuple[Any, int, int]:
        """How texts are cut."""
        return self.tokenizer, self.max_length, self.least_prompt

    @property
    def has_test(self) -> bool:
        """Whether the source has pairs to score; a file alone has none."""
        return self.source != "file" or self.test_file is not None

    def read_training(self) -> dict[str, list[Pair]]:
        """Pairs to learn from and to validate on, which share no prompt with each other or the test part.

        Official pairs that share one with the test part are left out, and counted.
        """
        parts = {"train": self.read("train")}
        tested = self.source in ("preference", "hh_rlhf", "generated") or self.test_file is not None
        test = {"test": self.read("test")} if tested else {}
        if tested and self.source in OFFICIAL:
            # Nobody can split these again.
            kept = without_prompts_of(parts["train"], test["test"])
            print(f"{len(parts['train']) - len(kept)} training pairs left out: the test part has their prompt.")
            parts["train"] = kept
        if self.source in ("preference", "generated"):
            parts["val"] = self.read("val")
        else:
            parts["train"], parts["val"] = split_by_prompt(parts["train"], self.holdout, SPLIT_SEED)
            if not parts["val"]:
                raise ValueError(
                    f"holdout={self.holdout} leaves nothing to validate on: it has to be above 0, and a category has "
                    "to have two prompts."
                )
        check_apart(parts | test)
        return parts

    def read(self, part: Literal["train", "val", "test"]) -> list[Pair]:
        """Pairs of a part."""
        pairs = self.read_source(part)
        return pairs if self.limit is None else limit_pairs(pairs, self.limit)

    def read_source(self, part: Literal["train", "val", "test"]) -> list[Pair]:
        """All pairs of a part of the source."""
        if self.source == "preference":
            paths = [find(self.root, path, HOW_TO_GET_PREFERENCES) for path in PREFERENCE[part]]
            return [pair for path in paths for pair in read_preference(path)]
        if self.source == "generated":
            return generate_pairs(GENERATED_COUNTS[part], list(GENERATED_COUNTS).index(part))
        if self.source == "file":
            name = {"train": "file", "test": "test_file"}[part]
            if getattr(self, name) is None:
                raise DataNotFoundError(f"the pairs of {part}", [], f"Name their file with --data.{name} FILE.")
            return read_pairs(getattr(self, name), self.columns)
        return load_official(self.source, part)

    def read_asked(self) -> list[Candidate]:
        """What prediction is about: the answers to the prompt, or those of the file.

        Raises:
            ValueError: Neither is there, or one is empty.
        """
        if self.prompt is not None:
            asked = [Candidate(self.prompt, answer) for answer in self.answers or []]
            check_candidates(asked, "The prediction")
            return asked
        if self.file is None:
            raise ValueError(
                "There is nothing to score: name a prompt and answers with --data.prompt TEXT --data.answers "
                '\'["one", "another"]\', or a file with --data.source file --data.file FILE.'
            )
        return read_candidates(self.file, self.columns)

    def label(self, names: Sequence[str]) -> None:
        """Say which answers are better in some capabilities, for the pairs to learn from and to validate on.

        A file's labels are for those to learn from; the others have none then.

        Args:
            names: U capabilities; `preference` has no labels, see `PREFERENCE_ITSELF`.

        Raises:
            UnknownNameError: There is no such capability.
            DataNotFoundError: There is no such file of labels.
            ValueError: It has none for these pairs, or contradicts itself.
        """
        asked = [name for name in names if name != PREFERENCE_ITSELF]
        for dataset in (self.train_set, self.val_set):
            if dataset is None:
                continue
            if not asked or (self.labels is not None and dataset is self.val_set):
                known = np.zeros((len(dataset), len(asked)), np.int8)
            elif self.labels is None:
                known = capability_preferences(dataset.pairs, asked)
            else:
                known = read_labels(Path(self.labels), dataset.pairs, asked)
            columns = dict(zip(asked, known.T, strict=True))
            nothing = np.zeros(len(dataset), np.int8)
            found = [columns.get(name, nothing) for name in names]
            dataset.preferences = np.stack(found, axis=1) if found else np.zeros((len(dataset), 0), np.int8)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the pairs that the task's phase learns from; all, if it has none."""
        dataset: PairDataset = self.require("train_set")  # type: ignore[assignment]
        task = self.trainer and self.trainer.lightning_module
        phase = getattr(task, "phase", None)
        places = dataset.places(phase) if phase else range(len(dataset))
        options: dict[str, Any] = {"collate_fn": dataset.collate}
        if phase in BY_GROUP:
            groups = [task.model.group_of.get(dataset.categories[place], 0) for place in places]  # type: ignore[union-attr]
            options["sampler"] = GroupSampler(groups, self.batch_size, self.seed)
        return super().loader(Subset(dataset, places), shuffle=True, **options)

    def loader(self, dataset: Dataset[Any], shuffle: bool = False, **options: Any) -> DataLoader[Any]:
        """A loader of `Batch`es."""
        return super().loader(dataset, shuffle, collate_fn=dataset.collate, **options)  # type: ignore[attr-defined]

    def describe(self, with_capabilities: bool) -> str:
        """What training uses, in words for a model card; after `setup` for fitting.

        Args:
            with_capabilities: Whether the model has any.
        """
        learned, held_out = self.require("train_set"), self.require("val_set")
        counts = Counter(pair.category for pair in learned.pairs)  # type: ignore[attr-defined]
        named = ", ".join(f"{name or 'no category'} {count}" for name, count in counts.most_common())
        texts = learned.texts  # type: ignore[attr-defined]
        cut = {part: sum(getattr(one, part) > 0 for one in texts) for part in ("cut_prompt", "cut_answer")}
        synthetic = " (synthetic)" if self.source == "generated" else ""
        wrong = f"; {self.flip:.0%} of their labels made wrong" if self.flip else ""
        judged = f", capabilities from {'a file of labels' if self.labels else 'measurable properties of the answers'}"
        return (
            f"{len(learned)} pairs of {self.source}{synthetic} ({named}){wrong}{judged * with_capabilities}; "  # type: ignore[arg-type]
            f"texts of up to {self.max_length} tokens ({cut['cut_prompt']} of {len(texts)} lost part of the prompt, "
            f"{cut['cut_answer']} part of the answer); watched on {len(held_out)} pairs"  # type: ignore[arg-type]
        )


def limit_pairs(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    """At most so many pairs, of prompts drawn from all over them; while there is room a prompt keeps all its pairs.

    Args:
        pairs: All.
        limit: How many.
    """
    by_prompt: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        by_prompt.setdefault(prompt_key(pair.prompt), []).append(place)
    names = list(by_prompt)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(names))
    kept = [place for number in order for place in by_prompt[names[number]]][:limit]
    return [pairs[place] for place in sorted(kept)]


def number_prompts(pairs: Sequence[Pair]) -> NDArray[np.intp]:
    """The number of each pair's prompt, from 0, `(n,)`."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt_key(pair.prompt), len(numbers)) for pair in pairs], dtype=np.intp)
