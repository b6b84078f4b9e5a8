"""Many tasks at once: the development data, official sources, files of the user's own, or a generated set."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import pandas as pd
from torch.utils.data import DataLoader, Dataset

from tasks.multitask.encode import Batch, Form, TaskDataset, padding_of
from tasks.multitask.evaluate import MAIN_METRICS, POSITIVE
from tasks.multitask.examples import (
    OWN_TASK,
    Example,
    Tasks,
    cap_tasks,
    check_examples,
    check_tasks,
    from_table,
    generate_examples,
    hold_out,
    load_official,
    plain_question,
    read_examples,
    split_choices,
    tasks_of,
)
from tasks.multitask.sampling import TaskSampler, task_probabilities
from zoo.base_models import load_tokenizer
from zoo.data import LateLoader, ZooDataModule, find
from zoo.errors import DataNotFoundError, UnknownNameError

Part = Literal["train", "test"]

SOURCES = ("nlp_tasks", "hub", "file", "generated")
# Of `nlp_tasks`, in the order of its README.
TASKS = ("cola", "rte", "mrpc", "sst2", "boolq", "openbookqa", "arc_easy", "arc_challenge", "scienceqa")
# What a source has where no tasks are named.
DEFAULT_TASKS = {"hub": ("cola", "rte", "mrpc", "sst2"), "generated": ("topic", "mood", "which")}
# Below the data root.
NLP_TASKS = {"train": "nlp_tasks/train.parquet", "test": "nlp_tasks/eval.parquet"}
HOW_TO_GET_TASKS = (
    "This file is part of the development data; for official tasks use data.source=hub, for examples of your own "
    "data.source=file with --data.file; data.source=generated needs none."
)
GENERATED_COUNTS = {"train": 400, "test": 100}
# Chooses what is held out and capped: the same whatever the run's seed, so that runs compare.
SPLIT_SEED = 0


class MultitaskDataModule(ZooDataModule):
    """Examples of many tasks for learning, validation and test, and those to predict.

    What a model reads of them depends on the model: `encode` cuts them, which the task of Lightning calls.

    Attributes:
        learned: Tasks and classes of what is learned from; set by `setup("fit")`.
        examples: Those of each part that `setup` has read: `train`, `val`, `test`, `predict`.
    """

    train_set: TaskDataset | None = None
    val_set: TaskDataset | None = None
    test_set: TaskDataset | None = None
    predict_set: TaskDataset | None = None

    def __init__(
        self,
        root: str | None = None,
        source: Literal["nlp_tasks", "hub", "file", "generated"] = "nlp_tasks",
        tasks: list[str] | None = None,
        file: str | None = None,
        test_file: str | None = None,
        columns: dict[str, str] | None = None,
        metrics: dict[str, str] | None = None,
        positive: dict[str, str] | None = None,
        choices_inside: bool = False,
        holdout: float = 0.1,
        cap: int | None = 4000,
        score_cap: int | None = None,
        sampling: Literal["proportional", "temperature", "uniform"] = "proportional",
        temperature: float = 2.0,
        share_rows: bool = False,
        epoch_size: int | None = None,
        max_length: int = 128,
        task: str | None = None,
        text: str | None = None,
        text2: str | None = None,
        choices: list[str] | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Describe the data; nothing is read before `setup`.

        Args:
            root: Data root with `nlp_tasks/`; else `MOE_ZOO_DATA`.
            source: `nlp_tasks`, the development data; `hub`, official sets through `datasets`; `file`, the user's own;
                `generated`, a synthetic set.
            tasks: Which to use; all of the source if left out, of `hub` cola, rte, mrpc and sst2.
            file: Examples to learn from, or to predict, as `read_examples` reads them.
            test_file: Examples to be scored.
            columns: What these files call our columns, see `read_examples`.
            metrics: Main metric by task, `accuracy`, `matthews` or `f1`, where it is not the usual one.
            positive: Class by task that F1 looks for, where it is not the usual one.
            choices_inside: Leave the options of openbookqa and the two arc inside the text, where their numbers are
                classes; else each option is read as a choice.
            holdout: Share of what is learned from to hold out for validation.
            cap: At most so many examples of a task to learn from and to hold out.
            score_cap: At most so many of a task in validation, and as many in the test; None scores all.
            sampling: How often each task is learned from, see `task_probabilities`.
            temperature: For `sampling: temperature`.
            share_rows: Whether tasks share rows in this way, and not examples: one with four options takes four rows.
            epoch_size: Examples of an epoch; as many as there are if left out.
            max_length: Tokens of a row.
            task: Of the text to predict; if left out, the model's only one.
            text: To predict.
            text2: Its second text.
            choices: Its choices.
            batch_size: Examples per batch.
            num_workers: Processes that load.
            seed: Seed of what is drawn in training.

        Raises:
            UnknownNameError: There is no such source or sampling.
            ValueError: An argument is out of its range, or has no effect beside the others.
        """
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.save_hyperparameters()
        self.root = root
        self.source = source
        self.names = tasks
        self.file = file
        self.test_file = test_file
        self.columns = columns
        self.metrics = metrics or {}
        self.positive = positive or {}
        self.choices_inside = choices_inside
        self.holdout = holdout
        self.cap = cap
        self.score_cap = score_cap
        self.sampling = sampling
        self.temperature = temperature
        self.share_rows = share_rows
        self.epoch_size = epoch_size
        self.max_length = max_length
        self.task = task
        self.text = text
        self.text2 = text2
        self.choices = choices
        self.learned: Tasks = {}
        self.examples: dict[str, list[Example]] = {}
        self.check_arguments()

    def check_arguments(self) -> None:
        """Refuse an unknown source, and arguments that are out of range or would have no effect."""
        if self.source not in SOURCES:
            raise UnknownNameError("source of tasks", self.source, SOURCES)
        task_probabilities([1], self.sampling, self.temperature)
        for name in ("file", "test_file", "columns"):
            if getattr(self, name) and self.source != "file":
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect on source={self.source!r}: it is for source='file'."
                )
        for name in ("cap", "score_cap", "epoch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1, or null for all.")
        given = [name for name in ("task", "text2", "choices") if getattr(self, name) is not None]
        if given and self.text is None:
            raise ValueError(f"data.{given[0]} says more of a text to predict: name it with --data.text TEXT.")

    def setup(self, stage: str | None = None) -> None:
        """Read the parts that the stage needs; `encode` makes datasets of them.

        Raises:
            DataNotFoundError: They are nowhere.
            UnknownNameError: There is no such task.
            ValueError: They cannot be learned from, see `check_examples`, `tasks_of` and `hold_out`.
        """
        if stage == "predict":
            self.examples["predict"] = self.read_asked()
        if stage in ("fit", "validate", None) and "train" not in self.examples:
            capped = cap_tasks(self.read("train"), self.cap, SPLIT_SEED)
            self.learned = tasks_of(capped)
            self.examples["train"], held_out = hold_out(capped, self.holdout, SPLIT_SEED)
            self.examples["val"] = cap_tasks(held_out, self.score_cap, SPLIT_SEED)
        if stage == "test":
            self.examples["test"] = cap_tasks(self.read("test"), self.score_cap, SPLIT_SEED)

    def encode(self, form: Form) -> None:
        """Cut all that `setup` has read into what a model reads.

        Args:
            form: What it wants, `MultitaskModel.form`.

        Raises:
            UnknownNameError: It does not know a task or a label.
            ValueError: It cannot learn or score a task.
        """
        self.tokenizer = load_tokenizer(form.base)
        for part, examples in self.examples.items():
            current = getattr(self, f"{part}_set")
            if current is not None and current.examples is examples and current.form == form:
                continue
            if part == "predict" and len(form.tasks) == 1:
                # A text that names no task is of the only one there is.
                (only,) = form.tasks
                examples = [replace(e, task=only) if e.task == OWN_TASK else e for e in examples]
            check_tasks(examples, form.tasks)
            dataset = TaskDataset(examples, self.tokenizer, form, self.max_length, learning=part == "train")
            setattr(self, f"{part}_set", dataset)
        for task in [*self.metrics, *self.positive]:
            if task not in form.tasks:
                raise UnknownNameError("task in data.metrics or data.positive", task, form.tasks)

    def metric_of(self, task: str, classes: Sequence[str] | None) -> tuple[str, int]:
        """A task's main metric, and the place of the class that F1 looks for.

        Args:
            task: Its name.
            classes: Its classes, if it has any.

        Raises:
            ValueError: The metric needs classes, or nobody says what F1 looks for.
        """
        metric = self.metrics.get(task) or (MAIN_METRICS.get(task, "accuracy") if classes else "accuracy")
        if metric == "accuracy":
            return metric, 1
        if not classes:
            raise ValueError(f"metrics={self.metrics}: the task {task!r} has no classes of its own; it takes accuracy.")
        known = [name for name in classes if name in (self.positive.get(task), *POSITIVE)]
        wanted = self.positive.get(task) or next(iter(known), None)
        if metric == "f1" and wanted not in classes:
            raise ValueError(
                f"F1 of the task {task!r} looks for one of its classes {', '.join(classes)}: say which by "
                f"data.positive: {{{task}: {classes[-1]}}}."
            )
        return metric, classes.index(wanted) if wanted in classes else 1

    def read(self, part: Part) -> list[Example]:
        """Examples of the tasks in use.

        Args:
            part: What to learn from and to hold out of, or what is scored.
        """
        examples = self.read_source(part)
        if self.names is None:
            return examples
        found = {example.task for example in examples}
        for name in self.names:
            if name not in found:
                raise UnknownNameError(f"task of the {part} part of {self.source}", name, found)
        return [example for example in examples if example.task in self.names]

    def read_source(self, part: Part) -> list[Example]:
        """All examples of the source, of `hub` and `generated` those of the named tasks."""
        if self.source == "file":
            name = {"train": "file", "test": "test_file"}[part]
            if getattr(self, name) is None:
                raise DataNotFoundError(f"the examples of {part}", [], f"Name their file with --data.{name} FILE.")
            return read_examples(getattr(self, name), self.columns)
        if self.source == "nlp_tasks":
            return self.read_nlp_tasks(part)
        names = self.names or DEFAULT_TASKS[self.source]
        if self.source == "hub":
            return [example for name in names for example in load_official(name, part)]
        return generate_examples(names, GENERATED_COUNTS[part], list(GENERATED_COUNTS).index(part))

    def read_nlp_tasks(self, part: Part) -> list[Example]:
        """The development data, without the wrapping that some of its questions have."""
        path = find(self.root, NLP_TASKS[part], HOW_TO_GET_TASKS)
        table = pd.read_parquet(path)
        table["id"] = [f"{task} {number}" for number, task in enumerate(table["task"])]
        examples = [plain_question(example) for example in from_table(table, str(path))]
        if not self.choices_inside:
            examples = [split_choices(example) for example in examples]
        check_examples(examples, str(path))
        return sorted(examples, key=lambda example: TASKS.index(example.task))

    def read_asked(self) -> list[Example]:
        """What prediction is about: the text, or the examples of the file.

        Raises:
            ValueError: Neither is there.
        """
        text, choices = self.text, tuple(self.choices or ())
        if text is not None:
            kind: Literal["choices", "classes"] = "choices" if choices else "classes"
            asked = [Example("text", self.task or OWN_TASK, text, self.text2 or "", None, kind, choices)]
            check_examples(asked, "The prediction", labelled=False)
            return asked
        if self.file is None:
            raise ValueError(
                "There is nothing to predict: give a text with --data.text TEXT (and --data.task TASK), or a file with "
                "--data.source file --data.file FILE."
            )
        return read_examples(self.file, self.columns, labelled=False)

    def loader(self, dataset: Dataset[Any], shuffle: bool = False, **options: Any) -> DataLoader[Any]:
        """A loader of `Batch`es: in training of tasks as often as `sampling` says, else the longest examples first."""
        encoded = cast(TaskDataset, dataset)
        costs = encoded.costs
        sampler: Any = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)
        if shuffle:
            tasks = [example.task for example in encoded.examples]
            rows = list(encoded.mean_rows().values()) if self.share_rows else None
            shares = task_probabilities(list(Counter(tasks).values()), self.sampling, self.temperature, rows)
            size = self.epoch_size or len(tasks)
            sampler = TaskSampler(tasks, shares, size, costs, self.batch_size, self.seed)
        return LateLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=partial(self.collate, encoded),
            **options,
        )

    def collate(self, dataset: TaskDataset, places: Sequence[int]) -> Batch:
        """Put examples together; see `TaskDataset.collate`."""
        return dataset.collate(places, padding_of(self.tokenizer))

    def describe(self) -> str:
        """What training uses, in words for a model card; after `setup` for fitting."""
        counts, held = (Counter(example.task for example in self.examples[part]) for part in ("train", "val"))
        synthetic = " (synthetic)" if self.source == "generated" else ""
        named = ", ".join(f"{task} {count}" for task, count in counts.items())
        of = " of rows" if self.share_rows else ""
        how = f"{self.sampling} sampling{of}" + (f" (T = {self.temperature})" if self.sampling == "temperature" else "")
        return (
            f"{counts.total()} examples of {self.source}{synthetic}, up to {self.max_length} tokens: {named}; {how}"
            f"; settings chosen on {held.total()} others"
        )


def count_repeated(examples: Sequence[Example]) -> int:
    """How many examples are known to repeat a text that is learned from.

    Args:
        examples: To be scored.
    """
    return sum(example.in_training for example in examples)
