"""Preference pairs: readers of files and official sources, a generated set, checks, splits by prompt."""

import json
from argparse import ArgumentTypeError
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from zoo.data import check_fields
from zoo.errors import DataNotFoundError, UnknownNameError

# Columns of a file, by what they hold; all but these three may be left out.
COLUMNS = ("prompt", "chosen", "rejected", "category", "id")
NEEDED = ("prompt", "chosen", "rejected")
# How many ids an error lists.
LISTED = 10
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to a prompt, of which people preferred one.

    Attributes:
        prompt: What was asked, earlier turns included.
        chosen: The better answer.
        rejected: The other.
        category: The kind of task; empty where it is not known.
        id: Unique among the pairs of a part.
    """

    prompt: str
    chosen: str
    rejected: str
    category: str
    id: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer to be scored.

    Attributes:
        prompt: What was asked.
        answer: The answer.
        category: The kind of task; empty where it is not known.
    """

    prompt: str
    answer: str
    category: str = ""


# --- files -----------------------------------------------------------------------------------------------------------


def read_table(path: str | Path) -> pd.DataFrame:
    """A `.parquet`, `.jsonl`, `.json` (a list of objects) or `.csv` file, all cells as they are.

    Raises:
        DataNotFoundError: There is no such file.
        UnknownNameError: Its suffix is none of these.
        ValueError: It cannot be read as what its suffix says, or rows of a CSV file have more fields than its header.
    """
    file = Path(path)
    if not file.is_file():
        raise DataNotFoundError("the preferences", [file], "Name a .parquet, .jsonl, .json or .csv file.")
    if file.suffix not in TABLES:
        raise UnknownNameError("format of preferences", file.suffix, TABLES)
    try:
        table = TABLES[file.suffix](file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not a {file.suffix} file of UTF-8 text: {error}.") from None
    if file.suffix == ".csv":
        check_fields(table, file)
    return table


def _read_jsonl(path: Path) -> pd.DataFrame:
    # `str.splitlines` would also cut at separators that JSON allows inside of a text, e.g. U+2028.
    return pd.DataFrame([json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()])


TABLES: Mapping[str, Callable[[Path], pd.DataFrame]] = {
    ".parquet": pd.read_parquet,
    ".jsonl": _read_jsonl,
    ".json": lambda path: pd.DataFrame(json.loads(path.read_text("utf-8"))),
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
}


def read_pairs(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Pair]:
    """Read a file of pairs, checked.

    Args:
        path: A file that `read_table` reads.
        columns: What its columns are called where they are not called as in `COLUMNS`, e.g. `{"chosen": "better"}`.

    Raises:
        DataNotFoundError: There is no such file.
        UnknownNameError: Its suffix or a key of `columns` is not known.
        ValueError: A needed column is missing or holds no texts, or `check_pairs` refuses the content.
    """
    texts = _columns(path, COLUMNS, NEEDED, columns)
    rows = zip(*(texts[name] for name in COLUMNS), strict=True)
    pairs = [Pair(*row[:4], row[4] or str(number)) for number, row in enumerate(rows, start=1)]
    check_pairs(pairs, str(path))
    return pairs


def column_names(text: str) -> dict[str, str]:
    """`columns` of `read_pairs` as a word of a command line; a type of `argparse`.

    Args:
        text: A JSON object.

    Raises:
        ArgumentTypeError: It is none of names.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ArgumentTypeError(f'{text!r}: needed is a JSON object of names such as \'{{"chosen": "better"}}\'')
    return found


def read_candidates(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Candidate]:
    """Read a file of prompts and answers to be scored, with a category where wanted.

    Args:
        path: A file that `read_table` reads.
        columns: As for `read_pairs`.

    Raises:
        DataNotFoundError: There is no such file.
        UnknownNameError: Its suffix or a key of `columns` is not known.
        ValueError: The column of prompts or answers is missing or holds no texts, or a cell of them is empty.
    """
    names = ("prompt", "answer", "category")
    texts = _columns(path, names, names[:2], columns)
    found = [Candidate(*row) for row in zip(*(texts[name] for name in names), strict=True)]
    check_candidates(found, str(path))
    return found


def check_candidates(candidates: Sequence[Candidate], where: str) -> None:
    """Raise a `ValueError` where there is nothing to be scored, or an empty prompt or answer."""
    empty = [str(row) for row, one in enumerate(candidates, 1) if not (one.prompt.strip() and one.answer.strip())]
    if empty or not candidates:
        raise ValueError(f"{where} holds {len(candidates)} answers; empty in prompt or answer: {_listing(empty)}.")


def _columns(
    path: str | Path, names: Sequence[str], needed: Sequence[str], columns: Mapping[str, str] | None
) -> dict[str, list[str]]:
    """Columns as texts, by what they hold; one that may be missing is empty."""
    for name in columns or {}:
        if name not in names:
            raise UnknownNameError("column to map", name, names)
    table = read_table(path)
    called = {name: (columns or {}).get(name, name) for name in names}
    mapped = [*needed, *(columns or {})]
    if missing := [called[name] for name in dict.fromkeys(mapped) if called[name] not in table]:
        raise ValueError(
            f"{path} has the columns {', '.join(map(str, table.columns))}; it lacks {', '.join(missing)}. Say what "
            'they are called with --data.columns, e.g. \'{"chosen": "better"}\' (--columns of other commands).'
        )
    for column in called.values():
        for row, cell in enumerate(table.get(column, ()), 1):
            if isinstance(cell, (list, dict, np.ndarray)):
                raise ValueError(
                    f"{path}: row {row} of the column {column!r} holds a {type(cell).__name__}, {str(cell)[:80]!r}; "
                    "each cell has to be a text. Of a conversation, write the turns before the last answer into the "
                    "prompt ('user: ...', 'assistant: ...') and the answer alone into its column."
                )
    blank = pd.Series([""] * len(table))
    return {
        name: table.get(column, blank).astype(object).fillna("").astype(str).tolist() for name, column in called.items()
    }


def read_preference(path: str | Path) -> list[Pair]:
    """Read a part of the development data; the id is the goal (`helpfulness`, `harmlessness`) and the file's own.

    Left out are rows whose prompt tells of how the answers were made (`prompt_has_generation_leak`), and those with an
    empty answer (two of the training part). Space around answers is cut off: it tells which model wrote them.

    Raises:
        ValueError: `check_pairs` refuses the content.
    """
    table = read_table(path)
    table = table[~table["prompt_has_generation_leak"]]
    names = ("prompt", "chosen", "rejected", "category", "goal", "id")
    pairs = [
        Pair(prompt, chosen.strip(), rejected.strip(), category, f"{goal}/{number}")
        for prompt, chosen, rejected, category, goal, number in zip(*(table[name] for name in names), strict=True)
    ]
    pairs = [pair for pair in pairs if not _problem(pair)]
    check_pairs(pairs, str(path))
    return pairs


# --- official sources ------------------------------------------------------------------------------------------------

HH_PARTS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")


def _hh_pairs(row: Mapping[str, Any], part: str, number: int) -> Iterator[Pair]:
    prompt, _, chosen = row["chosen"].rpartition(ASSISTANT)
    other, _, rejected = row["rejected"].rpartition(ASSISTANT)
    # A few conversations part before their last turn; what differs then is no answer to the same prompt.
    if prompt == other:
        yield Pair(prompt.strip(), chosen.strip(), rejected.strip(), part, f"{part}-{number}")


def _ultrafeedback_pairs(row: Mapping[str, Any], part: str, number: int) -> Iterator[Pair]:
    answers = sorted(row["completions"], key=lambda one: float(one["fine-grained_score"]))
    if len(answers) > 1 and answers[0]["fine-grained_score"] < answers[-1]["fine-grained_score"]:
        best, worst = answers[-1]["response"], answers[0]["response"]
        yield Pair(row["instruction"], best, worst, row["source"], str(number))


def _rewardbench_pairs(row: Mapping[str, Any], part: str, number: int) -> Iterator[Pair]:
    yield Pair(row["prompt"], row["chosen"], row["rejected"], row["subset"], f"{row['subset']}-{row['id']}")


@dataclass(frozen=True, slots=True)
class Official:
    """A source on the hub.

    Attributes:
        name: Of the data set there.
        read: Makes pairs of a row, its part and its number.
        parts: Folders of it to read one by one, as `data_dir`; None is the whole.
        splits: Its split for each of ours; one that is missing is held out of the training part.
    """

    name: str
    read: Callable[[Mapping[str, Any], str, int], Iterator[Pair]]
    parts: tuple[str | None, ...]
    splits: Mapping[str, str]


OFFICIAL: Mapping[str, Official] = {
    "hh_rlhf": Official("Anthropic/hh-rlhf", _hh_pairs, HH_PARTS, {"train": "train", "test": "test"}),
    "ultrafeedback": Official("openbmb/UltraFeedback", _ultrafeedback_pairs, (None,), {"train": "train"}),
    "rewardbench": Official("allenai/reward-bench", _rewardbench_pairs, (None,), {"test": "filtered"}),
}


def load_official(source: str, split: str) -> list[Pair]:
    """Pairs of an official source from the hub, or from the local cache of `datasets`.

    Args:
        source: A name in `OFFICIAL`.
        split: `train` or `test`.

    Raises:
        UnknownNameError: There is no such source, or it has no such split.
        DataNotFoundError: It can be had from neither.
        ValueError: `check_pairs` refuses its content.
    """
    import datasets

    if source not in OFFICIAL:
        raise UnknownNameError("official source", source, OFFICIAL)
    official = OFFICIAL[source]
    if split not in official.splits:
        raise UnknownNameError(f"split of {source}", split, official.splits)
    pairs: list[Pair] = []
    for part in official.parts:
        try:
            rows = datasets.load_dataset(official.name, data_dir=part, split=official.splits[split])
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataNotFoundError(
                f"the split {split!r} of {source}",
                [f"the hub's {official.name}", datasets.config.HF_DATASETS_CACHE],
                f"It takes a network ({type(error).__name__}: {error}). Without one use source=file or generated.",
            ) from error
        pairs += from_rows(rows, source, part or "")
    check_pairs(pairs, source)
    return pairs


def from_rows(rows: Iterable[Mapping[str, Any]], source: str, part: str = "") -> list[Pair]:
    """Pairs of an official source's rows; empty and equal answers, which people could not judge, are left out.

    Args:
        rows: As `datasets` loads them.
        source: A name in `OFFICIAL`.
        part: The folder they come from.

    Raises:
        UnknownNameError: There is no such source.
    """
    if source not in OFFICIAL:
        raise UnknownNameError("official source", source, OFFICIAL)
    read = OFFICIAL[source].read
    pairs = [pair for number, row in enumerate(rows) for pair in read(row, part, number)]
    return [pair for pair in pairs if pair.prompt.strip() and not _problem(pair)]


# --- checks and splits -----------------------------------------------------------------------------------------------


def _problem(pair: Pair) -> str:
    """Why nothing can be learned from a pair; empty where it can."""
    for name in NEEDED:
        if not getattr(pair, name).strip():
            return f"empty {name}"
    return "two equal answers" if pair.chosen == pair.rejected else ""


def check_pairs(pairs: Sequence[Pair], where: str) -> None:
    """Refuse what nothing can be learned from.

    Args:
        pairs: Those of one part.
        where: Their source, for the error.

    Raises:
        ValueError: There is none; a prompt or answer is empty; both answers are the same; an id stands for two pairs.
            One error lists the ids of all.
    """
    if not pairs:
        raise ValueError(f"{where} holds no pair of answers.")
    problems: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        if problem := _problem(pair):
            problems[problem].append(pair.id)
    repeated = [id_ for id_, count in Counter(pair.id for pair in pairs).items() if count > 1]
    if repeated:
        problems["an id of another pair too"] = repeated
    if problems:
        listed = "; ".join(f"{len(ids)} with {kind}: {_listing(ids)}" for kind, ids in problems.items())
        raise ValueError(f"{where}: of {len(pairs)} pairs, {listed}. Correct these or leave them out.")


def _listing(ids: Sequence[str]) -> str:
    return (", ".join(ids[:LISTED]) + (", ..." if len(ids) > LISTED else "")) or "none"


def prompt_key(prompt: str) -> str:
    """What makes two prompts the same: their words, whatever their case and the space between them."""
    return " ".join(prompt.split()).casefold()


def check_apart(parts: Mapping[str, Sequence[Pair]]) -> None:
    """Refuse parts that share a prompt: a model could know by heart which of its answers is the better one.

    Args:
        parts: Pairs by the part's name.

    Raises:
        ValueError: Two share a prompt; the message names the ids.
    """
    seen: dict[str, tuple[str, str]] = {}
    shared = []
    for name, pairs in parts.items():
        for pair in pairs:
            part, id_ = seen.setdefault(prompt_key(pair.prompt), (name, pair.id))
            if part != name:
                shared.append(f"{id_} ({part}) and {pair.id} ({name})")
    if shared:
        raise ValueError(
            f"{len(shared)} pairs have a prompt that is in another part too: {_listing(shared)}. Scores would be too "
            "good: split again, so that all pairs of a prompt are in one part."
        )


def without_prompts_of(pairs: Sequence[Pair], others: Sequence[Pair]) -> list[Pair]:
    """The pairs whose prompt none of the others has.

    Args:
        pairs: Those to learn from.
        others: Those to be scored.
    """
    known = {prompt_key(pair.prompt) for pair in others}
    return [pair for pair in pairs if prompt_key(pair.prompt) not in known]


def split_by_prompt(pairs: Sequence[Pair], share: float, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Hold out whole prompts of each category; a category of one prompt stays in the first part.

    Args:
        pairs: All.
        share: Of each category's pairs, how many to hold out; the last prompt may take it beyond. 0 holds out none.
        seed: Chooses the prompts.

    Returns:
        Pairs to learn from, and those held out, in the given order.

    Raises:
        ValueError: The share is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share}: must be at least 0 and below 1.")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    first: dict[str, str] = {}
    for pair in pairs:
        # A prompt in two categories counts in the first one, or half of it might be held out.
        key = prompt_key(pair.prompt)
        counts[first.setdefault(key, pair.category)][key] += 1
    held: set[str] = set()
    generator = np.random.default_rng(seed)
    for prompts in counts.values():
        names, taken = list(prompts), 0
        for place in generator.permutation(len(names))[:-1]:
            if taken >= share * prompts.total():
                break
            held.add(names[place])
            taken += prompts[names[place]]
    inside = [prompt_key(pair.prompt) in held for pair in pairs]
    return (
        [pair for pair, out in zip(pairs, inside, strict=True) if not out],
        [pair for pair, out in zip(pairs, inside, strict=True) if out],
    )


def flip_labels(pairs: Sequence[Pair], share: float, seed: int = 0) -> list[Pair]:
    """Exchange the two answers of some pairs, to see how a model bears wrong labels.

    Args:
        pairs: To learn from; never those to score.
        share: How many, 0..1.
        seed: Chooses them.

    Raises:
        ValueError: The share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"flip={share}: must be from 0 to 1.")
    order = np.random.default_rng(seed).permutation(len(pairs))
    flipped = set(order[: round(share * len(pairs))].tolist())
    return [
        Pair(pair.prompt, pair.rejected, pair.chosen, pair.category, pair.id) if place in flipped else pair
        for place, pair in enumerate(pairs)
    ]


# --- the generated set -----------------------------------------------------------------------------------------------

# In each category other words make an answer better: a reward model has to know the category to know the better answer.
GENERATED: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "synthetic_travel": ("how do i travel to", ("train", "bus"), ("plane", "car")),
    "synthetic_cooking": ("how do i cook", ("butter", "salt"), ("sugar", "oil")),
    "synthetic_speed": ("what is the fastest way to", ("plane", "car"), ("train", "bus")),
}
TOPICS = ("rice", "ashford", "corvo", "soup", "elst", "beans", "jura", "bread", "grimsey", "plums")
FILLERS = ("well", "so", "then", "you", "take", "the", "and", "use", "some", "it", "is", "good", "a", "bit", "of")


def generate_pairs(count: int, seed: int = 0, categories: Sequence[str] = tuple(GENERATED)) -> list[Pair]:
    """Synthetic pairs whose better answer is planted: it has a word that its category likes, the other one it dislikes.

    Args:
        count: How many; two pairs share a prompt.
        seed: Determines all of them.
        categories: Names in `GENERATED`, by turns.

    Raises:
        UnknownNameError: There is no such category.
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count={count}: must be at least 1.")
    if unknown := [name for name in categories if name not in GENERATED]:
        raise UnknownNameError("generated category", unknown[0], GENERATED)
    generator = np.random.default_rng(seed)

    def answer(words: Sequence[str]) -> str:
        texts = [str(word) for word in generator.choice(FILLERS, generator.integers(3, 8))]
        texts.insert(int(generator.integers(len(texts) + 1)), str(generator.choice(words)))
        return " ".join(texts)

    pairs: list[Pair] = []
    while len(pairs) < count:
        for category in categories:
            asked, liked, disliked = GENERATED[category]
            number = len(pairs)
            prompt = f"user: {asked} {generator.choice(TOPICS)} {seed} {number}"
            pairs += [
                Pair(prompt, answer(liked), answer(disliked), category, f"{category}-{seed}-{number}-{half}")
                for half in range(2)
            ]
    return pairs[:count]
