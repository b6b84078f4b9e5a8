"""Questions with their contexts and answers: readers of files and official sources, a generated set, checks, splits."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from zoo.data import check_fields
from zoo.errors import DataNotFoundError, UnknownNameError

if TYPE_CHECKING:
    from datasets import Dataset

# The domain of a user's own questions that name none.
OWN_DOMAIN = "own"
# Stands for the offset of an answer that was looked for in its context and is not there.
NOT_FOUND = -1
# How many ids an error lists.
LISTED = 20


@dataclass(frozen=True, slots=True)
class Example:
    """A question about a text.

    Attributes:
        id: Unique among the examples of a part.
        domain: What scores are reported by.
        document: What splits keep together: the title, or the context where there is none (see `name_documents`).
        question: The question.
        context: The text that holds the answer.
        answers: Accepted answers, the first of which is learned; none where the context does not say, and in
            prediction.
        starts: Character offsets of the answers in the context.
    """

    id: str
    domain: str
    document: str
    question: str
    context: str
    answers: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse answers without a place."""
        if len(self.answers) != len(self.starts):
            raise ValueError(
                f"The question {self.id!r} has {len(self.answers)} answers, but {len(self.starts)} offsets."
            )


# --- files -----------------------------------------------------------------------------------------------------------


def read_examples(path: str | Path, answered: bool = True) -> list[Example]:
    """Read a file of questions, checked; its suffix says how it is laid out.

    - `.parquet`: columns domain, id, title, context, question, answers (list), answer_starts (list).
    - `.json`: SQuAD, version 1 or 2 (`is_impossible`).
    - `.csv`: columns question, context, answer, and where wanted domain, id, title, start. Without a start the answer's
      first occurrence is taken; an empty answer says that the context has none.

    Rows that share id, question and context are one example with the answers of all.

    Args:
        path: The file, UTF-8 where it is text.
        answered: Whether it has to hold answers; for prediction it need not.

    Raises:
        DataNotFoundError: There is no such file.
        UnknownNameError: The suffix is none of these.
        ValueError: The file is not laid out or not encoded like this, a cell holds something else, or `check_examples`
            refuses its content.
    """
    file = Path(path)
    if not file.is_file():
        raise DataNotFoundError("the questions", [file], "Name a .parquet, .json or .csv file.")
    if file.suffix not in READERS:
        raise UnknownNameError("format of questions", file.suffix, READERS)
    return _complete(READERS[file.suffix](file, answered), str(file))


def read_text(path: str | Path) -> str:
    r"""The text of a UTF-8 file, with or without byte order mark; line ends stay as they are, since offsets count them.

    Raises:
        DataNotFoundError: There is no such file.
        ValueError: It is encoded otherwise, wholly or in part; the message says where and how to convert it.
    """
    file = Path(path)
    if not file.is_file():
        raise DataNotFoundError("the text", [file], "Name a UTF-8 text file.")
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        likely = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise ValueError(
            f"{file} is not UTF-8: byte 0x{content[error.start]:02x} at position {error.start} (line {line}) is not "
            f"part of a character. Convert it, e.g. if it is {likely}: iconv -f {likely} -t UTF-8 {file} > converted"
            f"{file.suffix}; if encodings are mixed, correct that line."
        ) from None


def _read_parquet(path: Path, answered: bool) -> list[Example]:
    table = pd.read_parquet(path)
    needed = ("domain", "id", "title", "context", "question")
    _need_columns(path, table, (*needed, "answers", "answer_starts") if answered else needed)
    texts = (_texts(path, table, name) for name in needed)
    answers = _lists(path, table, "answers", _is_text, "texts")
    starts = _lists(path, table, "answer_starts", _is_offset, "whole numbers")
    return [
        Example(id_, domain, title, question, context, answer, tuple(map(int, places)))
        for domain, id_, title, context, question, answer, places in zip(*texts, answers, starts, strict=True)
    ]


def _texts(path: Path, table: pd.DataFrame, name: str) -> list[str]:
    """A column of texts; a missing one is empty.

    Raises:
        ValueError: A cell holds more than a text or a number.
    """
    for row, cell in enumerate(table[name], start=1):
        if isinstance(cell, (list, dict, np.ndarray)):
            raise ValueError(f"{_found(path, name, row, cell)}; each cell has to be a text.")
    return table[name].astype(object).fillna("").astype(str).tolist()


def _lists(path: Path, table: pd.DataFrame, name: str, fits: Callable[[Any], bool], what: str) -> list[tuple[Any, ...]]:
    """A column of lists; a missing one is empty, and so are those of a missing column.

    Args:
        path: For errors.
        table: The file's.
        name: Of the column.
        fits: Says whether an entry is as it has to be.
        what: Entries, for errors.

    Raises:
        ValueError: A cell holds something else.
    """
    found: list[tuple[Any, ...]] = []
    for row, cell in enumerate(table.get(name, [None] * len(table)), start=1):
        many = isinstance(cell, (list, np.ndarray))
        if not (all(map(fits, cell)) if many else pd.isna(cell)):
            raise ValueError(f"{_found(path, name, row, cell)}; each cell has to be a list of {what}.")
        found.append(tuple(cell) if many else ())
    return found


def _found(path: Path, name: str, row: int, cell: Any) -> str:
    """What an error says of a cell."""
    return f"{path}: row {row} of the column {name!r} holds a {type(cell).__name__}, {str(cell)[:80]!r}"


def _is_text(entry: Any) -> bool:
    return isinstance(entry, str)


def _is_offset(entry: Any) -> bool:
    return isinstance(entry, (int, float, np.number)) and entry % 1 == 0


def _read_csv(path: Path, answered: bool) -> list[Example]:
    try:
        table = pd.read_csv(io.StringIO(read_text(path)), dtype=str, keep_default_na=False)
    except pd.errors.ParserError as error:
        raise ValueError(f"{path} is not a table of comma-separated values: {error}.") from None
    check_fields(table, path)
    _need_columns(path, table, ("question", "context", "answer") if answered else ("question", "context"))
    examples = []
    for number, row in enumerate(table.to_dict("records"), start=1):
        answer, start, context = row.get("answer", ""), row.get("start", ""), row["context"]
        if start and not start.isdecimal():
            raise ValueError(f"{path}, row {number}: start={start!r} is not a number of characters from 0 on.")
        example = Example(
            row.get("id") or str(number),
            row.get("domain") or OWN_DOMAIN,
            row.get("title", ""),
            row["question"],
            context,
        )
        if answer:
            place = int(start) if start else context.find(answer)
            example = replace(example, answers=(answer,), starts=(place,))
        examples.append(example)
    return examples


def _read_json(path: Path, answered: bool) -> list[Example]:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    return [
        _squad_example(question, _title(article, path), _entry(paragraph, "context", str, path), path, answered)
        for article in _entry(content, "data", list, path)
        for paragraph in _entry(article, "paragraphs", list, path)
        for question in _entry(paragraph, "qas", list, path)
    ]


def _title(article: Any, path: Path) -> str:
    """Of an article, empty where it has none."""
    return _entry(article, "title", (str, type(None)), path) or "" if "title" in article else ""


def _squad_example(question: Mapping[str, Any], title: str, context: str, path: Path, answered: bool) -> Example:
    text, id_ = _entry(question, "question", str, path), str(_entry(question, "id", (str, int), path))
    without = question.get("is_impossible", False) or ("answers" not in question and not answered)
    answers = [] if without else _entry(question, "answers", list, path)
    return Example(
        id_,
        OWN_DOMAIN,
        title,
        text,
        context,
        tuple(_entry(answer, "text", str, path) for answer in answers),
        tuple(_entry(answer, "answer_start", int, path) for answer in answers),
    )


def _entry(mapping: Any, key: str, kind: type | tuple[type, ...], path: Path) -> Any:
    """An entry of a SQuAD file.

    Raises:
        ValueError: It is not there, or of another kind.
    """
    if isinstance(mapping, dict) and isinstance(mapping.get(key), kind):
        return mapping[key]
    raise ValueError(
        f"{path} is not laid out like SQuAD (data > paragraphs > context, qas > id, question, answers > text, "
        f"answer_start): no proper {key!r} in {str(mapping)[:80]}."
    )


def _need_columns(path: Path, table: pd.DataFrame, needed: Sequence[str]) -> None:
    """Compare a table's columns with what is read of them.

    Raises:
        ValueError: One is missing.
    """
    if missing := [name for name in needed if name not in table]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}: found {', '.join(map(str, table.columns))}; needed are "
            f"{', '.join(needed)}."
        )


READERS: Mapping[str, Callable[[Path, bool], list[Example]]] = {
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".csv": _read_csv,
}


# --- official sources ------------------------------------------------------------------------------------------------


def _squad_row(row: Mapping[str, Any], source: str) -> Example:
    answers = row["answers"]
    return Example(
        row["id"],
        source,
        row["title"],
        row["question"],
        row["context"],
        tuple(answers["text"]),
        tuple(answers["answer_start"]),
    )


def _mrqa_row(row: Mapping[str, Any], source: str) -> Example:
    """A row of MRQA, whose spans are inclusive; of an answer that occurs several times the first place is taken."""
    spans = [(span["start"][0], span["end"][0] + 1) for span in row["detected_answers"]["char_spans"]]
    return Example(
        row["qid"],
        row["subset"],
        "",
        row["question"],
        row["context"],
        tuple(row["context"][start:end] for start, end in spans),
        tuple(start for start, _ in spans),
    )


# Name on the hub, and how a row is read.
OFFICIAL: Mapping[str, tuple[str, Callable[[Mapping[str, Any], str], Example]]] = {
    "squad": ("rajpurkar/squad", _squad_row),
    "squad_v2": ("rajpurkar/squad_v2", _squad_row),
    "mrqa": ("mrqa-workshop/mrqa", _mrqa_row),
}


def load_official(source: str, split: str) -> list[Example]:
    """A split of an official source, from the hub or the local cache of `datasets`.

    Args:
        source: A name in `OFFICIAL`; the domain is this name, or MRQA's subset.
        split: `train`, `validation` or (MRQA's domains that are not in its `train`) `test`.

    Raises:
        DataNotFoundError: It can be had from neither.
    """
    import datasets

    name = OFFICIAL[source][0]
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataNotFoundError(
            f"the split {split!r} of {source}",
            [f"the hub's {name}", datasets.config.HF_DATASETS_CACHE],
            f"It takes a network ({type(error).__name__}: {error}). Without one use source=file or source=generated.",
        ) from error
    return from_dataset(rows, source)


def from_dataset(rows: "Dataset", source: str) -> list[Example]:
    """Examples of an official source's rows, checked.

    Args:
        rows: A split as `datasets` loads it.
        source: A name in `OFFICIAL`.

    Raises:
        UnknownNameError: There is no such source.
        ValueError: `check_examples` refuses them.
    """
    if source not in OFFICIAL:
        raise UnknownNameError("official source", source, OFFICIAL)
    read = OFFICIAL[source][1]
    return _complete([read(row, source) for row in rows], source)


# --- checks ----------------------------------------------------------------------------------------------------------


def _complete(examples: Sequence[Example], where: str) -> list[Example]:
    """What all readers end with: merge rows, check them, name documents."""
    merged = merge_rows(examples)
    check_examples(merged, where)
    return name_documents(merged)


def merge_rows(examples: Iterable[Example]) -> list[Example]:
    """Make one example of those that share id, question and context, each of its answers once, the first one first.

    Args:
        examples: In the order of the file.
    """
    groups: dict[tuple[str, str, str], list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.id, example.question, example.context].append(example)
    merged = []
    for group in groups.values():
        pairs = dict.fromkeys(pair for example in group for pair in zip(example.answers, example.starts, strict=True))
        merged.append(
            replace(group[0], answers=tuple(answer for answer, _ in pairs), starts=tuple(start for _, start in pairs))
        )
    return merged


def name_documents(examples: Sequence[Example]) -> list[Example]:
    """Take the context for the document where the title says too little: it is missing, or all of the domain share it.

    Args:
        examples: With titles for documents.
    """
    titles: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        titles[example.domain].add(example.document)
    return [
        example if example.document and len(titles[example.domain]) > 1 else replace(example, document=example.context)
        for example in examples
    ]


def check_examples(examples: Sequence[Example], where: str) -> None:
    """Find every answer again at its offset, and refuse what nothing can be learned from.

    Args:
        examples: Those of one part.
        where: Their source, for the error.

    Raises:
        ValueError: There is none; a question, context or answer is empty; an id stands for two questions; an answer is
            outside its context or not at its offset. One error lists the ids of all.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    shown = ""
    seen: set[str] = set()
    if not examples:
        raise ValueError(f"{where} holds no question.")
    for example in examples:
        if example.id in seen:
            problems["id used for another question too"].append(example.id)
        seen.add(example.id)
        if not example.question.strip():
            problems["empty question"].append(example.id)
        if not example.context.strip():
            problems["empty context"].append(example.id)
        for answer, start in zip(example.answers, example.starts, strict=True):
            found = example.context[start : start + len(answer)] if start >= 0 else ""
            if not answer.strip():
                problems["empty answer"].append(example.id)
            elif start == NOT_FOUND:
                problems["answer that does not occur in its context"].append(example.id)
            elif start < 0 or start + len(answer) > len(example.context):
                problems["answer outside its context"].append(example.id)
            elif found != answer:
                problems["answer that is not at its offset"].append(example.id)
                shown = shown or f" {example.id} has {answer!r} at {start}, where the context says {found!r}."
    if problems:
        listed = "; ".join(f"{len(ids)} with {kind}: {_listing(ids)}" for kind, ids in problems.items())
        raise ValueError(
            f"{where}: of {len(examples)} questions, {listed}.{shown} Offsets count characters from 0. Correct "
            "these questions or leave them out."
        )


def _listing(ids: Sequence[str]) -> str:
    return ", ".join(ids[:LISTED]) + (", ..." if len(ids) > LISTED else "")


def count_repeated(examples: Iterable[Example]) -> int:
    """How many examples have a first answer that occurs more than once in the context, so that its place may be wrong.

    Args:
        examples: Any.
    """
    return sum(example.context.count(example.answers[0]) > 1 for example in examples if example.answers)


# --- splits ----------------------------------------------------------------------------------------------------------


def split_by_document(examples: Sequence[Example], share: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Hold out whole documents of each domain; a domain of one document stays in the first part.

    Args:
        examples: All.
        share: Of each domain's examples, how many to hold out; the last document may take it beyond.
        seed: Chooses the documents.

    Returns:
        Examples to learn from, and those held out, in the given order.

    Raises:
        ValueError: The share is not between 0 and 1, or no domain has two documents.
    """
    if not 0 < share < 1:
        raise ValueError(f"holdout={share}: must be above 0 and below 1, e.g. 0.1.")
    held: set[str] = set()
    generator = np.random.default_rng(seed)
    for documents in _documents_by_domain(examples).values():
        wanted = share * sum(documents.values())
        names = list(documents)
        taken = 0
        for place in generator.permutation(len(names))[:-1]:
            if taken >= wanted:
                break
            held.add(names[place])
            taken += documents[names[place]]
    if not held:
        raise ValueError(
            "No domain has two documents, so none can be held out for validation: add questions on another text."
        )
    return [e for e in examples if e.document not in held], [e for e in examples if e.document in held]


def folds(examples: Sequence[Example], count: int, seed: int = 0) -> list[int]:
    """Deal out whole documents into folds that have about as many examples of each domain.

    Args:
        examples: All.
        count: Folds, at least 2.
        seed: Which of two equally large documents comes first.

    Returns:
        The fold of each example, from 0.

    Raises:
        ValueError: There are fewer documents of a domain than folds.
    """
    if count < 2:
        raise ValueError(f"folds={count}: must be at least 2.")
    fold: dict[str, int] = {}
    generator = np.random.default_rng(seed)
    for domain, documents in _documents_by_domain(examples).items():
        if len(documents) < count:
            raise ValueError(f"folds={count}: the domain {domain!r} has only {len(documents)} documents.")
        names = [list(documents)[place] for place in generator.permutation(len(documents))]
        sizes = [0] * count
        # The largest first, each to the fold that has least.
        for name in sorted(names, key=documents.__getitem__, reverse=True):
            fold[name] = int(np.argmin(sizes))
            sizes[fold[name]] += documents[name]
    return [fold[example.document] for example in examples]


def _documents_by_domain(examples: Iterable[Example]) -> dict[str, Counter[str]]:
    """Examples per document."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        counts[example.domain][example.document] += 1
    return counts


# --- the generated set -----------------------------------------------------------------------------------------------

YEARS = tuple(str(year) for year in range(1801, 1999, 3))
PLACES = (
    "Ashford",
    "Brindle Bay",
    "Corvo",
    "Dunmore",
    "Elst",
    "Fort Hallam",
    "Grimsey",
    "Harrow Hill",
    "Istria",
    "Jura",
)
COLOURS = ("red", "blue", "dark green", "yellow", "white", "black", "pale grey", "orange", "purple", "brown")
THINGS = (
    "a brass key",
    "an old map",
    "a silver bell",
    "a glass lamp",
    "a drum",
    "a wooden chest",
    "a kite",
    "a violin",
)
WORK = ("baker", "sailor", "judge", "night watchman", "weaver", "teacher", "stone mason", "doctor", "printer", "farmer")
FOODS = (
    "barley bread",
    "honey",
    "smoked fish",
    "plums",
    "goat cheese",
    "rice",
    "mushrooms",
    "onion soup",
    "nuts",
    "tea",
)
FIRST = ("Ada", "Boris", "Clara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kiran", "Lena")
LAST = ("Moss", "Norton", "Okafor", "Petrov", "Quist", "Rossi", "Sato", "Tanaka", "Ueda", "Vance", "Weiss", "Young")


@dataclass(frozen=True, slots=True)
class _Fact:
    """What is said of a subject, how it is asked for, and what it may be."""

    sentence: str
    question: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Domain:
    """Facts about one kind of subject."""

    subject: str
    facts: tuple[_Fact, ...]


GENERATED: Mapping[str, _Domain] = {
    "synthetic_people": _Domain(
        "{first} {last}",
        (
            _Fact("{name} was born in {value}.", "Where was {name} born?", PLACES),
            _Fact("{name} worked as a {value} for many years.", "What did {name} work as?", WORK),
            _Fact("Friends gave {name} {value} as a gift.", "Which gift did {name} get?", THINGS),
            _Fact("What {name} likes to eat is {value}.", "What does {name} eat?", FOODS),
            _Fact("In {value} {name} got married.", "When did {name} marry?", YEARS),
        ),
    ),
    "synthetic_towns": _Domain(
        "{last}ville",
        (
            _Fact("The town of {name} was founded in {value}.", "When was {name} founded?", YEARS),
            _Fact("The flag of {name} is {value}.", "What colour is the flag of {name}?", COLOURS),
            _Fact("Farms around {name} sell {value}.", "What do farms around {name} sell?", FOODS),
            _Fact("A road leads from {name} to {value}.", "Where does the road from {name} lead?", PLACES),
            _Fact("The mayor of {name} is a {value}.", "What is the mayor of {name} by trade?", WORK),
        ),
    ),
    "synthetic_machines": _Domain(
        "{first}-{number}",
        (
            _Fact("The machine {name} was built in {value}.", "When was {name} built?", YEARS),
            _Fact("A yard in {value} makes parts for {name}.", "Where are parts for {name} made?", PLACES),
            _Fact("The doors of {name} are painted {value}.", "What colour are the doors of {name}?", COLOURS),
            _Fact("Only a {value} may repair {name}.", "Who may repair {name}?", WORK),
        ),
    ),
    "synthetic_animals": _Domain(
        "{first} the {animal}",
        (
            _Fact("Keepers found {name} near {value}.", "Where was {name} found?", PLACES),
            _Fact("Every morning {name} is fed {value}.", "What is {name} fed?", FOODS),
            _Fact("The fur of {name} is {value}.", "What colour is the fur of {name}?", COLOURS),
            _Fact("Visitors first saw {name} in {value}.", "When did visitors first see {name}?", YEARS),
        ),
    ),
    "synthetic_ships": _Domain(
        "{first} of {last}",
        (
            _Fact("The ship {name} sank in {value}.", "When did {name} sink?", YEARS),
            _Fact(
                "Its last harbour was {value}, says the log of {name}.", "What was the last harbour of {name}?", PLACES
            ),
            _Fact("Divers brought up {value} from {name}.", "What did divers bring up from {name}?", THINGS),
            _Fact("The hold of {name} was full of {value}.", "What was the hold of {name} full of?", FOODS),
        ),
    ),
}
GENERATED_OOD = ("synthetic_animals", "synthetic_ships")
ANIMALS = ("otter", "lynx", "heron", "badger", "mole", "seal")


def generate_examples(count: int, seed: int = 0, domains: Sequence[str] = tuple(GENERATED)) -> list[Example]:
    """Synthetic questions about facts in short texts, each of one subject, in the given domains by turns.

    Args:
        count: How many.
        seed: Determines all of them.
        domains: Names in `GENERATED`; those of `GENERATED_OOD` use other words about the same kinds of values.

    Raises:
        UnknownNameError: There is no such domain.
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count={count}: must be at least 1.")
    if unknown := [name for name in domains if name not in GENERATED]:
        raise UnknownNameError("generated domain", unknown[0], GENERATED)
    generator = np.random.default_rng(seed)
    examples: list[Example] = []
    while len(examples) < count:
        for domain in domains:
            examples += _generate_document(domain, f"{domain}-{seed}-{len(examples)}", generator)
    return examples[:count]


def _generate_document(domain: str, name: str, generator: np.random.Generator) -> list[Example]:
    """Two questions about one text."""

    def pick(values: Sequence[str]) -> str:
        return values[generator.integers(len(values))]

    kind = GENERATED[domain]
    subject = kind.subject.format(
        first=pick(FIRST), last=pick(LAST), animal=pick(ANIMALS), number=generator.integers(10, 100)
    )
    context = ""
    asked = []
    for place in generator.permutation(len(kind.facts)):
        fact, value = kind.facts[place], pick(kind.facts[place].values)
        before = fact.sentence[: fact.sentence.index("{value}")].format(name=subject)
        start = len(context) + len(before)
        context += fact.sentence.format(name=subject, value=value) + " "
        asked.append((fact.question.format(name=subject), value, start))
    chosen = generator.permutation(len(asked))[:2]
    return [
        Example(
            f"{name}-{number}", domain, name, asked[place][0], context.rstrip(), (asked[place][1],), (asked[place][2],)
        )
        for number, place in enumerate(chosen)
    ]
