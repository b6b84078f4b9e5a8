"""What a transformer reads of an example: one row of tokens, or one for each option, and what is scored of each row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tasks.multitask.examples import CHOICES, Example
from zoo.errors import UnknownNameError

# Of an example whose answer is not known.
UNKNOWN = -1
# What a causal model reads between an example and its answer: what this may be, and where it stands.
OPTIONS, ASK = "\nOptions: ", "\nAnswer:"


@dataclass(frozen=True, slots=True)
class Form:
    """How a model wants its examples.

    Attributes:
        base: The model whose tokenizer cuts them.
        tasks: What it knows, see `examples.Tasks`.
        causal: Whether the answer follows the example in one text.
        verbalised: Whether every class is read, as choices are, in place of a head that has one output for each.
    """

    base: str
    tasks: Mapping[str, list[str] | None]
    causal: bool = False
    verbalised: bool = False

    def options(self, example: Example) -> tuple[str, ...]:
        """What the answer to an example is chosen from; nothing where it is free text.

        Raises:
            UnknownNameError: The model does not know the task.
        """
        if example.kind == CHOICES:
            return example.choices
        if example.task not in self.tasks:
            raise UnknownNameError("task", example.task, self.tasks)
        return tuple(self.tasks[example.task] or ())


class Row(NamedTuple):
    """Tokens of one row.

    Attributes:
        ids: Of the vocabulary.
        types: 0 for the first segment, 1 for the second.
        scored: How many of the last are the answer, in a causal model.
    """

    ids: list[int]
    types: list[int]
    scored: int = 0


class Encoded(NamedTuple):
    """An example as rows.

    Attributes:
        rows: One, or one for each option.
        label: Place of the right option or class; `UNKNOWN` where it is not known, 0 where the only row is right.
    """

    rows: list[Row]
    label: int


@dataclass(slots=True)
class Batch:
    """B examples in R rows of L tokens.

    Attributes:
        input_ids: `(R, L)` int64.
        attention_mask: `(R, L)` bool; padding is on the right, in a causal model on the left.
        type_ids: `(R, L)` int64.
        scored: `(R,)` int64, how many of each row's last tokens are scored.
        owners: `(R,)` int64, the example of each row.
        options: `(R,)` int64, which of its options it holds.
        tasks: `(B,)` int64, places in the model's tasks.
        labels: `(B,)` int64, of `Encoded`.
        places: Of the examples in their dataset.
    """

    input_ids: Tensor
    attention_mask: Tensor
    type_ids: Tensor
    scored: Tensor
    owners: Tensor
    options: Tensor
    tasks: Tensor
    labels: Tensor
    places: list[int]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What `MultitaskModel` is called with."""
        return (
            self.input_ids,
            self.attention_mask,
            self.type_ids,
            self.scored,
            self.owners,
            self.options,
            self.tasks,
        )


class TaskDataset(Dataset[int]):
    """Examples, and what a model reads of them once `Form` is known.

    Attributes:
        examples: In their order.
        encoded: The same as rows.
        options: What each is chosen from.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: Any, form: Form, max_length: int, learning: bool = False
    ) -> None:
        """Cut the examples; the arguments are those of `encode`."""
        self.examples = examples
        self.form = form
        self.options = [form.options(example) for example in examples]
        self.encoded = encode(examples, tokenizer, form, max_length, learning)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> int:
        return index

    @property
    def costs(self) -> list[int]:
        """Tokens of each example's longest row."""
        return [max(len(row.ids) for row in example.rows) for example in self.encoded]

    def mean_rows(self) -> dict[str, float]:
        """How many rows an example of each task takes, in the order in which tasks first appear."""
        counts: dict[str, list[int]] = {}
        for example, encoded in zip(self.examples, self.encoded, strict=True):
            counts.setdefault(example.task, []).append(len(encoded.rows))
        return {task: sum(of) / len(of) for task, of in counts.items()}

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.ids) for example in self.encoded for row in example.rows)

    def collate(self, places: Sequence[int], pad_id: int) -> Batch:
        """Put examples together, padded to the longest row.

        Args:
            places: Of the examples.
            pad_id: The padding token.
        """
        encoded = [self.encoded[place] for place in places]
        rows = [row for example in encoded for row in example.rows]
        longest, names = max(len(row.ids) for row in rows), list(self.form.tasks)
        left = self.form.causal
        of = [len(example.rows) for example in encoded]
        return Batch(
            pad([row.ids for row in rows], longest, pad_id, left),
            pad([[1] * len(row.ids) for row in rows], longest, 0, left).bool(),
            pad([row.types for row in rows], longest, 0, left),
            torch.tensor([row.scored for row in rows]),
            torch.tensor([place for place, count in enumerate(of) for _ in range(count)]),
            torch.tensor([option for count in of for option in range(count)]),
            torch.tensor([names.index(self.examples[place].task) for place in places]),
            torch.tensor([example.label for example in encoded]),
            list(places),
        )


def pad(rows: Sequence[list[int]], length: int, value: int, left: bool) -> Tensor:
    """Rows of one length, `(rows, length)`.

    Args:
        rows: Numbers.
        length: Of the longest.
        value: What fills the others.
        left: Whether it stands before them.
    """
    fill = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([more + row if left else row + more for row, more in zip(rows, fill, strict=True)])


def padding_of(tokenizer: Any) -> int:
    """What fills a row: the token that ends a text, where there is none for padding, since it is in no answer.

    Args:
        tokenizer: Of the base.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((number for number in known if number is not None), 0)


def encode(
    examples: Sequence[Example], tokenizer: Any, form: Form, max_length: int, learning: bool = False
) -> list[Encoded]:
    """Cut examples into tokens.

    An encoder reads text and second text as its two segments where a head knows the classes; where options are read,
    the first segment is all of the example and the second one option. A causal model reads the example and the option
    after it; it learns from the right one alone.

    Args:
        examples: What to cut.
        tokenizer: Of the base.
        form: What the model wants.
        max_length: Tokens of a row; text is cut at its end, answers and options never.
        learning: Whether the rows are to be learned from.

    Raises:
        ValueError: An encoder is to give free text, or `max_length` leaves no room for a text.
    """
    make = causal_rows if form.causal else encoder_rows
    return list(make(examples, tokenizer, form, max_length, learning))


def encoder_rows(
    examples: Sequence[Example], tokenizer: Any, form: Form, max_length: int, learning: bool
) -> Iterator[Encoded]:
    """As `encode`, for an encoder."""
    first: list[str] = []
    second: list[str] = []
    # Of each row, how it is cut: options stay whole.
    cuts: list[str | None] = []
    counts, labels = [], []
    for example in examples:
        options = form.options(example)
        if not options:
            raise ValueError(
                f"The task {example.task!r} has free text for answers, which an encoder cannot give. Use a causal base "
                "(causal: true), or read the answers as classes: data.columns: {text: prompt, label: target}."
            )
        labels.append(UNKNOWN if example.label is None else options.index(example.label))
        read = options if form.verbalised or example.kind == CHOICES else ()
        first += [whole(example)] * len(read) or [example.text]
        second += [words(option) for option in read] or [example.text2]
        cuts += ["only_first"] * len(read) or ["longest_first" if example.text2 else None]
        counts.append(len(read) or 1)
    check_options([text for text, cut in zip(second, cuts, strict=True) if cut == "only_first"], tokenizer, max_length)
    # One call for each way: an empty second segment would be one more separator.
    rows: list[Row | None] = [None] * len(first)
    for way in dict.fromkeys(cuts):
        chosen = [place for place, cut in enumerate(cuts) if cut == way]
        if chosen:
            texts = ([first[place] for place in chosen], *([[second[place] for place in chosen]] if way else []))
            cut = tokenizer(*texts, truncation=way or True, max_length=max_length, return_token_type_ids=True)
            for place, ids, types in zip(chosen, cut["input_ids"], cut["token_type_ids"], strict=True):
                rows[place] = Row(ids, types)
    begin = 0
    for count, label in zip(counts, labels, strict=True):
        yield Encoded([row for row in rows[begin : begin + count] if row is not None], label)
        begin += count


def causal_rows(
    examples: Sequence[Example], tokenizer: Any, form: Form, max_length: int, learning: bool
) -> Iterator[Encoded]:
    """As `encode`, for a causal model."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for example in examples:
        options = form.options(example)
        # Free text is generated, so it has to be learned where it ends.
        answers = [words(option) for option in options] or [example.label or ""]
        label = UNKNOWN if example.label is None else options.index(example.label) if options else 0
        if learning:
            answers, label = [answers[label]], 0
        text = tokenizer("\n".join(filter(None, (example.text, example.text2))))["input_ids"]
        ask = tokenizer(asking(options), add_special_tokens=False)["input_ids"]
        rows = []
        for answer in answers:
            scored = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] + ([] if options else end)
            room = max_length - len(ask) - len(scored)
            if room < 1:
                raise ValueError(
                    f"max_length={max_length} leaves no room for the text of {example.id!r} beside {len(ask)} tokens "
                    f"of question and options and its answer of {len(scored)} tokens: raise data.max_length."
                )
            ids = text[:room] + ask + scored
            rows.append(Row(ids, [0] * len(ids), len(scored)))
        yield Encoded(rows, label)


def check_options(options: Sequence[str], tokenizer: Any, max_length: int) -> None:
    """Refuse options that leave no room for a text beside them in a row.

    Args:
        options: All of them, as they are read.
        tokenizer: Of the base.
        max_length: Tokens of a row.
    """
    if not options:
        return
    room, different = max_length - tokenizer.num_special_tokens_to_add(pair=True), list(dict.fromkeys(options))
    pieces = tokenizer(different, add_special_tokens=False)["input_ids"]
    option, longest = max(zip(different, pieces, strict=True), key=lambda found: len(found[1]))
    if len(longest) >= room:
        raise ValueError(
            f"max_length={max_length} leaves no room for a text beside the option {option[:60]!r} of {len(longest)} "
            "tokens: raise data.max_length."
        )


def asking(options: Sequence[str]) -> str:
    """What a causal model reads between an example's text and its answer.

    Args:
        options: What the answer is chosen from; none where it is free text.
    """
    return (OPTIONS + "; ".join(map(words, options)) if options else "") + ASK


def whole(example: Example) -> str:
    """Both texts as one."""
    return f"{example.text} {example.text2}".rstrip()


def words(option: str) -> str:
    """A class or choice as words: `not_entailment` is `not entailment`."""
    return option.replace("_", " ")
