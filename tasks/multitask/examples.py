"""Examples of many tasks: readers of files and official sources, a generated set, checks, splits.

A task is of one of three kinds: examples share its classes, or each brings choices, or the answer is free text.
"""

import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import pandas as pd

from zoo.data import check_fields
from zoo.errors import DataNotFoundError, UnknownNameError

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["classes", "choices", "text"]
CLASSES: Final = "classes"
CHOICES: Final = "choices"
TEXT: Final = "text"
# Of each task its classes; none where every example brings its choices, None where the answer is free text.
Tasks = dict[str, list[str] | None]

# The task of a user's own examples that name none.
OWN_TASK = "own"
COLUMNS = ("id", "task", "text", "text2", "choices", "label", "prompt", "target")
# What makes two examples the same.
Content = tuple[str, str, str, tuple[str, ...]]
# How many ids or names an error lists.
LISTED = 10
# Cells of JSONL and parquet files that are no text.
NESTED = (list, tuple, dict, np.ndarray)


@dataclass(frozen=True, slots=True)
class Example:
    """One example of one task.

    Attributes:
        id: Unique among the examples of a part.
        task: Its task.
        text: What is read.
        text2: What is read beside it, such as a second sentence or a context; may be empty.
        label: The right class, choice or text; None where it is not known.
        kind: Of its task.
        choices: What the answer is chosen from, where the task is of that kind.
        in_training: Whether the text is known to be among those learned from.
    """

    id: str
    task: str
    text: str
    text2: str = ""
    label: str | None = None
    kind: Kind = "classes"
    choices: tuple[str, ...] = ()
    in_training: bool = False


# --- files -----------------------------------------------------------------------------------------------------------


def read_examples(path: str | Path, columns: Mapping[str, str] | None = None, labelled: bool = True) -> list[Example]:
    """Read a file of examples, checked.

    Columns are `text` and `label`, and where wanted `id`, `task`, `text2` and `choices`; or `prompt` and `target`,
    where the answer is free text unless there are choices.

    Args:
        path: A `.csv`, `.jsonl` or `.parquet` file; UTF-8 where it is text.
        columns: What the file calls these columns, where it does not by these names: `{"text": "sentence"}`.
        labelled: Whether it has to hold the answers; for prediction it need not.

    Raises:
        DataNotFoundError: There is no such file.
        UnknownNameError: It is of another format, or `columns` renames what there is not.
        ValueError: It is not laid out or not encoded like this, or `check_examples` refuses its content.
    """
    file = Path(path)
    if not file.is_file():
        raise DataNotFoundError("the examples", [file], f"Name a {', '.join(READERS)} file.")
    if file.suffix not in READERS:
        raise UnknownNameError("format of examples", file.suffix, READERS)
    examples = from_table(rename(READERS[file.suffix](file), columns or {}, file), str(file), labelled)
    check_examples(examples, str(file), labelled)
    return examples


def read_text_file(path: Path) -> str:
    """The text of a UTF-8 file, with or without byte order mark.

    Raises:
        ValueError: It is encoded otherwise.
    """
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Convert it, e.g.: iconv -f WINDOWS-1252 "
            f"-t UTF-8 {path} > converted{path.suffix}"
        ) from None


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(io.StringIO(read_text_file(path)), dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path} is not a table of comma-separated values: {error}.") from None
    check_fields(table, path)
    return table


def _read_jsonl(path: Path) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(read_text_file(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise ValueError(f'{path}, line {number} is no JSON object such as {{"text": ..., "label": ...}}.')
            rows.append(row)
    return pd.DataFrame(rows, dtype=object)


READERS: Mapping[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": pd.read_parquet,
}


def rename(table: pd.DataFrame, columns: Mapping[str, str], path: Path) -> pd.DataFrame:
    """A table with our names of its columns.

    Args:
        table: As it was read.
        columns: Its names, by ours.
        path: For errors.

    Raises:
        UnknownNameError: One is none of our names.
        ValueError: The table has no such column.
    """
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise UnknownNameError("column", ours, COLUMNS, f"columns maps these to the names in {path}.")
        if theirs not in table:
            raise ValueError(f"columns={dict(columns)}: {path} has no column {theirs!r}: found {_named(table)}.")
    kept = table.drop(columns=[name for name in columns if name in table and name not in columns.values()])
    return kept.rename(columns={theirs: ours for ours, theirs in columns.items()})


def from_table(table: pd.DataFrame, where: str, labelled: bool = True) -> list[Example]:
    """Examples of a table with our columns; see `read_examples`.

    Args:
        table: One row per example.
        where: Its source, for errors.
        labelled: Whether it has to have a column of answers.

    Raises:
        ValueError: It has no rows, lacks a column, a cell of `choices` is no list of texts, or one of another column
            no text.
    """
    if table.empty:
        raise ValueError(f"{where} holds no example.")
    free = "prompt" in table or "target" in table
    text, label = ("prompt", "target") if free else ("text", "label")
    missing = [name for name in ((text, label) if labelled else (text,)) if name not in table]
    if missing:
        raise ValueError(
            f"{where} has no column {' and no column '.join(missing)}: found {_named(table)}. Needed are text and "
            "label (and where wanted id, task, text2, choices), or prompt and target; data.columns says what the file "
            "calls them."
        )
    rows = []
    for number, row in enumerate(table.to_dict("records")):
        place = f"{where}: row {number + 1} of the column"
        words = {name: _word(row.get(name), f"{place} {name!r}") for name in ("id", "task", text, "text2", label)}
        choices = _list(row.get("choices"), f"{place} 'choices'")
        rows.append(
            Example(
                id=words["id"] or str(number),
                task=words["task"] or OWN_TASK,
                text=words[text] or "",
                text2=words["text2"] or "",
                label=words[label],
                kind="choices" if choices else "text" if free else "classes",
                choices=choices,
                in_training=bool(row.get("dup_of_train", False)),
            )
        )
    return rows


def _named(table: pd.DataFrame) -> str:
    return ", ".join(map(str, table.columns)) or "none"


def _is_missing(cell: Any) -> bool:
    return cell is None or cell is pd.NA or (isinstance(cell, float) and np.isnan(cell))


def _word(cell: Any, where: str) -> str | None:
    """A cell in words; None where it is empty.

    Raises:
        ValueError: It holds more than a text or a number.
    """
    if _is_missing(cell):
        return None
    if isinstance(cell, NESTED):
        raise ValueError(f"{where} holds a {type(cell).__name__}, {_beginning(cell)}; each cell has to be a text.")
    if isinstance(cell, float) and cell.is_integer():
        # A column of whole numbers in which any is missing is read as floats.
        return str(int(cell))
    return str(cell) or None


def _list(cell: Any, where: str) -> tuple[str, ...]:
    """A cell's choices; none where it is empty.

    Raises:
        ValueError: It is no list of texts.
    """
    if _is_missing(cell) or (isinstance(cell, str) and not cell):
        return ()
    found = cell
    if isinstance(cell, str):
        try:
            found = json.loads(cell)
        except json.JSONDecodeError:
            found = None
    if not isinstance(found, list | tuple | np.ndarray) or any(
        _is_missing(one) or isinstance(one, NESTED) for one in found
    ):
        raise ValueError(
            f"{where} holds a {type(cell).__name__}, {_beginning(cell)}; choices must be a list of texts, in a CSV "
            'file as JSON: ["first", "second"].'
        )
    return tuple(str(choice) for choice in found)


def _beginning(cell: Any) -> str:
    """Of a cell, in one line for an error."""
    return repr(" ".join(str(cell).split())[:80])


# --- official sources ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Official:
    """A task on the hub.

    Attributes:
        path: Name of the data set.
        config: Of its part, or None.
        read: A row, and the names of its label's classes where it has a number, as an example without id and task.
        test: The split that is scored: the official test is unlabelled, or not there.
    """

    path: str
    config: str | None
    read: Callable[[Mapping[str, Any], list[str]], Example]
    test: str = "validation"


def _pair(first: str, second: str = "") -> Callable[[Mapping[str, Any], list[str]], Example]:
    """A reader of one or two texts with a numbered class."""

    def read(row: Mapping[str, Any], names: list[str]) -> Example:
        return Example("", "", row[first], row[second] if second else "", names[row["label"]])

    return read


def _question(text: str) -> Callable[[Mapping[str, Any], list[str]], Example]:
    """A reader of a question with lettered choices."""

    def read(row: Mapping[str, Any], names: list[str]) -> Example:
        choices = row["choices"]
        label = choices["text"][choices["label"].index(row["answerKey"])]
        return Example("", "", row[text], "", label, CHOICES, tuple(choices["text"]))

    return read


def _boolq(row: Mapping[str, Any], names: list[str]) -> Example:
    return Example("", "", row["question"], row["passage"], str(row["answer"]).lower())


GLUE = "nyu-mll/glue"
ARC = "allenai/ai2_arc"
OFFICIAL: Mapping[str, Official] = {
    "cola": Official(GLUE, "cola", _pair("sentence")),
    "sst2": Official(GLUE, "sst2", _pair("sentence")),
    "mrpc": Official(GLUE, "mrpc", _pair("sentence1", "sentence2"), "test"),
    "rte": Official(GLUE, "rte", _pair("sentence1", "sentence2")),
    "wnli": Official(GLUE, "wnli", _pair("sentence1", "sentence2")),
    "qnli": Official(GLUE, "qnli", _pair("question", "sentence")),
    "qqp": Official(GLUE, "qqp", _pair("question1", "question2")),
    "mnli": Official(GLUE, "mnli", _pair("premise", "hypothesis"), "validation_matched"),
    "boolq": Official("google/boolq", None, _boolq),
    "arc_easy": Official(ARC, "ARC-Easy", _question("question"), "test"),
    "arc_challenge": Official(ARC, "ARC-Challenge", _question("question"), "test"),
    "openbookqa": Official("allenai/openbookqa", "main", _question("question_stem"), "test"),
    "commonsenseqa": Official("tau/commonsense_qa", None, _question("question")),
}


def load_official(task: str, part: Literal["train", "test"]) -> list[Example]:
    """A task from the hub or the local cache of `datasets`.

    Args:
        task: A name in `OFFICIAL`.
        part: What to learn from, or what is scored.

    Raises:
        UnknownNameError: There is no such task.
        DataNotFoundError: It can be had from neither.
    """
    import datasets

    if task not in OFFICIAL:
        raise UnknownNameError("official task", task, OFFICIAL, "Examples of your own are read by source=file.")
    official = OFFICIAL[task]
    split = "train" if part == "train" else official.test
    try:
        rows = datasets.load_dataset(official.path, official.config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataNotFoundError(
            f"the split {split!r} of {task}",
            [f"the hub's {official.path}", datasets.config.HF_DATASETS_CACHE],
            f"It takes a network ({type(error).__name__}: {error}). Without one use source=file or source=generated.",
        ) from error
    return from_dataset(rows, task)


def from_dataset(rows: "Dataset", task: str) -> list[Example]:
    """Examples of an official task's rows, checked.

    Args:
        rows: A split as `datasets` loads it.
        task: A name in `OFFICIAL`.

    Raises:
        ValueError: `check_examples` refuses them.
    """
    names = getattr(rows.features.get("label"), "names", [])
    read = OFFICIAL[task].read
    examples = [replace(read(row, names), id=f"{task} {number}", task=task) for number, row in enumerate(rows)]
    check_examples(examples, f"{task} of {OFFICIAL[task].path}")
    return examples


# --- the development data --------------------------------------------------------------------------------------------

INSTRUCTIONS = (
    "Please choose the correct answer to the question: ",
    "Please answer the following question with true or false, question: ",
)
FORMAT = "\n\nAnswer format: "
OPTION = re.compile(r"\s+Answer(\d): ")


def plain_question(example: Example) -> Example:
    """Take the wrapping for chat models off a question of the development data.

    Args:
        example: Any; one without the wrapping stays as it is.
    """
    text = example.text.partition(FORMAT)[0]
    for instruction in INSTRUCTIONS:
        text = text.removeprefix(instruction)
    return replace(example, text=text)


def split_choices(example: Example) -> Example:
    """Make choices of the options that stand inside a question: `... Answer1: red Answer2: blue`, label `answer2`.

    Args:
        example: Any; one without options inside its text stays as it is.

    Raises:
        ValueError: The label names none of the options.
    """
    question, *parts = OPTION.split(example.text)
    numbers, options = parts[::2], tuple(part.strip() for part in parts[1::2])
    if len(options) < 2 or numbers != [str(number + 1) for number in range(len(options))]:
        return example
    places = {f"answer{number}": option for number, option in zip(numbers, options, strict=True)}
    if example.label is not None and example.label not in places:
        raise ValueError(f"{example.id}: the label {example.label!r} is none of {', '.join(places)} in its text.")
    return replace(
        example, text=question, kind="choices", choices=options, label=example.label and places[example.label]
    )


# --- a generated set -------------------------------------------------------------------------------------------------

THINGS = {
    "animal": ("cat", "horse", "wolf", "sheep", "eagle", "salmon"),
    "tool": ("hammer", "saw", "drill", "shovel", "wrench", "chisel"),
    "food": ("bread", "cheese", "soup", "apple", "rice", "honey"),
}
MOODS = {"positive": ("wonderful", "lovely", "great", "superb"), "negative": ("awful", "boring", "dreadful", "poor")}
COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "gold": "yellow"}
ASKED = ("what colour has {}", "which colour is {}", "what is the colour of {}", "say how {} looks")
SCENES = ("we saw the {} at last", "there was a {} near the house", "nobody had noticed the {} before")


def _topic(random: np.random.Generator) -> Example:
    name = str(random.choice(list(THINGS)))
    return Example("", "topic", str(random.choice(SCENES)).format(random.choice(THINGS[name])), label=name)


def _mood(random: np.random.Generator) -> Example:
    name = str(random.choice(list(MOODS)))
    subject = random.choice(["film", "book", "song", "play"])
    return Example("", "mood", f"the {subject} was {random.choice(MOODS[name])}", label=name)


def _which(random: np.random.Generator) -> Example:
    choices = tuple(str(random.choice(words)) for words in THINGS.values())
    place = int(random.integers(len(THINGS)))
    order = random.permutation(len(THINGS))
    text = f"which of these is a kind of {list(THINGS)[place]}"
    return Example("", "which", text, "", choices[place], CHOICES, tuple(choices[number] for number in order))


def _colour(random: np.random.Generator) -> Example:
    thing = str(random.choice(list(COLOURS)))
    return Example("", "colour", str(random.choice(ASKED)).format(thing), "", COLOURS[thing], TEXT)


GENERATED: Mapping[str, Callable[[np.random.Generator], Example]] = {
    "topic": _topic,
    "mood": _mood,
    "which": _which,
    "colour": _colour,
}


def generate_examples(tasks: Sequence[str], count: int, seed: int = 0) -> list[Example]:
    """Synthetic examples that a small network can learn.

    Args:
        tasks: Names in `GENERATED`: `topic` and `mood` have classes, `which` choices, the answer to `colour` is text.
        count: How many of each.
        seed: Of what is drawn.

    Raises:
        UnknownNameError: There is no such task.
    """
    examples = []
    for task in tasks:
        if task not in GENERATED:
            raise UnknownNameError("generated task", task, GENERATED)
        random = np.random.default_rng((seed, list(GENERATED).index(task)))
        examples += [replace(GENERATED[task](random), id=f"{task} {seed}-{number}") for number in range(count)]
    return examples


# --- checks ----------------------------------------------------------------------------------------------------------


def check_examples(examples: Sequence[Example], where: str, labelled: bool = True) -> None:
    """Refuse what nothing can be learned from or scored by.

    Args:
        examples: Those of one part.
        where: Their source, for the error.
        labelled: Whether each needs a label.

    Raises:
        ValueError: There is none; a text or label is missing; there are not two different choices, or the label is none
            of them; a task is of two kinds. One error lists the ids of all.
    """
    if not examples:
        raise ValueError(f"{where} holds no example.")
    problems: dict[str, list[str]] = defaultdict(list)
    shown = ""
    kinds: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        kinds[example.task].add(example.kind)
        if not example.text.strip():
            problems["without a text"].append(example.id)
        if labelled and not (example.label or "").strip():
            problems["without a label"].append(example.id)
        elif example.kind == CHOICES and example.label not in (*example.choices, None):
            problems["with a label that is none of the choices"].append(example.id)
            shown = shown or f" {example.id} has {example.label!r}, to choose from {', '.join(example.choices)}."
        if example.kind == CHOICES and len(set(example.choices)) < 2:
            problems["without two different choices"].append(example.id)
    if mixed := [task for task, found in kinds.items() if len(found) > 1]:
        raise ValueError(
            f"{where}: some examples of the task {mixed[0]!r} have choices of their own and others have none. Give "
            "these another task."
        )
    if problems:
        listed = "; ".join(f"{len(ids)} {what}: {_listing(ids)}" for what, ids in problems.items())
        raise ValueError(
            f"{where}: of {len(examples)} examples, {listed}.{shown} Correct these examples or leave them out."
        )


def _listing(ids: Sequence[str]) -> str:
    return ", ".join(ids[:LISTED]) + (", ..." if len(ids) > LISTED else "")


def tasks_of(examples: Iterable[Example]) -> Tasks:
    """The tasks of labelled examples and the classes of each, in alphabetical order.

    Args:
        examples: What is learned from.

    Raises:
        ValueError: A task has one class only.
    """
    labels: dict[str, dict[str, None]] = {}
    kinds: dict[str, str] = {}
    for example in examples:
        labels.setdefault(example.task, {})[example.label or ""] = None
        kinds[example.task] = example.kind
    tasks: Tasks = {}
    for task, found in labels.items():
        classes = sorted(found) if kinds[task] == CLASSES else []
        if len(classes) == 1:
            raise ValueError(
                f"All examples of the task {task!r} have the label {classes[0]!r}: with one class there is nothing to "
                "learn. Add examples of another, or leave the task out."
            )
        tasks[task] = None if kinds[task] == TEXT else classes
    return tasks


def check_tasks(examples: Iterable[Example], tasks: Mapping[str, list[str] | None]) -> None:
    """Refuse examples that a model of certain tasks does not know.

    Args:
        examples: To score or to predict.
        tasks: What the model knows.

    Raises:
        UnknownNameError: A task or a label is not among them.
        ValueError: A task is of another kind.
    """
    for example in examples:
        if example.task not in tasks:
            hint = "Fine-tune the model on it first (moe-zoo fit), or say by data.task which of these the text is of"
            hint += "; of the texts of a file its column task says so."
            raise UnknownNameError("task", example.task, tasks, hint)
        classes = tasks[example.task]
        kind = TEXT if classes is None else CLASSES if classes else CHOICES
        # A text to predict does not tell classes from free text.
        unlike = (example.kind == CHOICES) != (kind == CHOICES)
        if unlike or (example.label is not None and example.kind != kind):
            raise ValueError(
                f"The example {example.id!r} of the task {example.task!r} is of the kind {example.kind!r}, but the "
                f"model has learned it as {kind!r}: give it choices where it needs them, or another task."
            )
        if classes and example.label is not None and example.label not in classes:
            raise UnknownNameError(f"label of the task {example.task!r}", example.label, classes)


# --- splits ----------------------------------------------------------------------------------------------------------


def hold_out(examples: Sequence[Example], share: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Hold out a share of every class of every task; examples with the same text stay together.

    Args:
        examples: All.
        share: Of each class, how many to hold out, rounded; a class of one text stays in the first part.
        seed: Chooses them.

    Returns:
        Examples to learn from, and those held out, in the given order.

    Raises:
        ValueError: The share is not between 0 and 1, or a task is too small to hold out any of it.
    """
    if not 0 < share < 1:
        raise ValueError(f"holdout={share}: must be above 0 and below 1, e.g. 0.1.")
    groups: dict[tuple[str, str], dict[Content, None]] = defaultdict(dict)
    first: dict[Content, str] = {}
    for example in examples:
        stratum = first.setdefault(_content(example), (example.label or "") if example.kind == CLASSES else "")
        groups[example.task, stratum][_content(example)] = None
    random = np.random.default_rng(seed)
    held: set[Content] = set()
    for texts in groups.values():
        keys = list(texts)
        count = min(round(share * len(keys)), len(keys) - 1)
        held.update(keys[place] for place in random.permutation(len(keys))[:count])
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        parts[_content(example) in held].append(example)
    counts = [Counter(example.task for example in part) for part in parts]
    if small := [task for task in counts[0] | counts[1] if not all(of[task] for of in counts)]:
        raise ValueError(
            f"The task {small[0]!r} has too few examples ({counts[0][small[0]]}) to hold out {share:.0%} of them for "
            "validation: add examples, or raise data.holdout."
        )
    return parts


def _content(example: Example) -> Content:
    return example.task, example.text, example.text2, example.choices


def cap_tasks(examples: Sequence[Example], cap: int | None, seed: int = 0) -> list[Example]:
    """At most so many examples of each task, drawn from all over it, in the given order.

    Args:
        examples: All.
        cap: How many; None keeps all.
        seed: Of the draw.
    """
    if cap is None:
        return list(examples)
    taken: Counter[str] = Counter()
    kept = set()
    for place in np.random.default_rng(seed).permutation(len(examples)).tolist():
        task = examples[place].task
        if taken[task] < cap:
            taken[task] += 1
            kept.add(place)
    return [example for place, example in enumerate(examples) if place in kept]
