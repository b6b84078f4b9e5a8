"""Prompts and answers as tokens, batches of them, and a store for what the frozen base makes of them."""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What stands between prompt and answer for a causal model, which has no tokens for it.
ANSWER = "\n\nassistant: "
# Who says the first turn of a prompt, which people leave out where there is no other.
SPEAKER = re.compile(r"^\s*(?:user|human|system|assistant): ?", re.IGNORECASE)
USER = "user: "
# Share of what stays of a part that is cut which is its beginning: a prompt says what to do first or last, an answer
# shows in its first words what it is, and in its last ones whether it came to an end.
PROMPT_HEAD, ANSWER_HEAD = 0.25, 0.75
# Stands for the end of lines where the tokenizer takes that for a space.
LINE = "\u00b6"
LINE_ENDS = re.compile(r"\s*\n\s*")
# An answer's length as a number of two digits, which has a token of its own in BERT's vocabulary: 9 for every doubling.
PER_DOUBLING, LONGEST = 9, 99


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text without padding.

    Attributes:
        ids: Its tokens.
        types: 0 for the prompt, 1 for the answer.
        cut_prompt: Tokens that its prompt has lost.
        cut_answer: Tokens that its answer has lost.
    """

    ids: list[int]
    types: list[int]
    cut_prompt: int = 0
    cut_answer: int = 0


def is_encoder(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether a tokenizer marks the start of a text and the end of its parts as BERT's does."""
    return tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None


def ends_of(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """What a text begins and ends with."""
    if is_encoder(tokenizer):
        return [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    before, after = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [] if before is None else [before], [] if after is None else [after]


def encode_texts(
    prompts: Sequence[str],
    answers: Sequence[str],
    tokenizer: "PreTrainedTokenizerFast",
    max_length: int = 256,
    least_prompt: int = 32,
) -> list[Tokens]:
    """Tokens of prompts with their answers, `[CLS] size prompt [SEP] answer [SEP]`, cut to a length.

    The prompt is cut first, and only when `least_prompt` tokens are left of it the answer. Both lose their middle. The
    size is that of the whole answer, see `size_of`: a reader cannot tell it from what is left, nor well by attention. A
    prompt that names no speaker is the user's.

    Args:
        prompts: One for each answer.
        answers: The answers.
        tokenizer: Of the base.
        max_length: Tokens of a text.
        least_prompt: Tokens of the prompt that stay, where it has so many.

    Raises:
        ValueError: The length leaves no room.
    """
    encoder = is_encoder(tokenizer)
    before, after = ends_of(tokenizer)
    between = after if encoder else tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    sizes = tokenizer([str(size) + ("" if encoder else "\n") for size in range(LONGEST + 1)], add_special_tokens=False)
    most = max(map(len, sizes["input_ids"]))
    room = max_length - len(before) - len(between) - len(after) - most
    if least_prompt < 0 or room <= least_prompt:
        raise ValueError(
            f"max_length={max_length} and least_prompt={least_prompt}: leave no room for an answer, or are negative."
        )
    # Equal prompts have several answers, and are cut up once.
    different = list(dict.fromkeys(prompts))
    whole_prompts = dict(zip(different, _pieces([with_speaker(one) for one in different], tokenizer), strict=True))
    found = []
    for prompt, answer in zip(prompts, _pieces(answers, tokenizer), strict=True):
        asked = whole_prompts[prompt]
        kept = without_middle(answer, room - min(len(asked), least_prompt), ANSWER_HEAD)
        left = without_middle(asked, room - len(kept), PROMPT_HEAD)
        ids = [*before, *sizes["input_ids"][size_of(len(answer))], *left, *between, *kept, *after]
        second = len(kept) + len(after)
        types = [0] * (len(ids) - second) + [1] * second
        found.append(Tokens(ids, types, len(asked) - len(left), len(answer) - len(kept)))
    return found


def encode_prompts(prompts: Sequence[str], tokenizer: "PreTrainedTokenizerFast", max_length: int = 256) -> list[Tokens]:
    """Tokens of prompts alone, which lose their middle where they are too long.

    Args:
        prompts: All different ones.
        tokenizer: Of the base.
        max_length: Tokens of a prompt.
    """
    before, after = ends_of(tokenizer)
    room = max_length - len(before) - len(after)
    found = []
    for asked in _pieces([with_speaker(one) for one in prompts], tokenizer):
        left = without_middle(asked, room, PROMPT_HEAD)
        ids = [*before, *left, *after]
        found.append(Tokens(ids, [0] * len(ids), len(asked) - len(left)))
    return found


def with_speaker(prompt: str) -> str:
    """A prompt whose first turn says whose it is: the user's, where nobody is named."""
    return prompt if SPEAKER.match(prompt) else USER + prompt


def size_of(count: int) -> int:
    """How long an answer is, on a scale that rises by 9 when it doubles: 0 to 99.

    Args:
        count: Its tokens.
    """
    return min(LONGEST, round(PER_DOUBLING * math.log2(1 + count)))


def without_middle(tokens: list[int], room: int, head: float) -> list[int]:
    """The beginning and the end of what does not fit.

    Args:
        tokens: The whole.
        room: How many may stay.
        head: Share of these from the beginning.
    """
    if len(tokens) <= room:
        return tokens
    first = round(head * room)
    return tokens[:first] + tokens[len(tokens) - (room - first) :]


def _pieces(texts: Sequence[str], tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
    """Tokens of whole texts."""
    if not texts:
        return []
    if is_blind_to_lines(tokenizer):
        texts = [LINE_ENDS.sub(f" {LINE} ", text.strip()) for text in texts]
    # Not verbose: they are cut afterwards, whatever is said about their length.
    pieces: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return pieces


def is_blind_to_lines(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether a tokenizer takes the end of a line, by which people see how a text is laid out, for a space.

    It also has to know the mark that would stand for it.

    Args:
        tokenizer: Of the base.
    """
    joined, broken, mark = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a b", "a\nb", LINE))
    return bool(joined == broken and mark and tokenizer.unk_token_id not in mark)


def pad(tokens: Sequence[Tokens], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `(B, L)`, mask `(B, L)` bool and types `(B, L)` of texts, padded on the right to the longest."""
    length = max(len(one.ids) for one in tokens)
    ids = torch.full((len(tokens), length), pad_id)
    types = torch.zeros(len(tokens), length, dtype=torch.long)
    mask = torch.zeros(len(tokens), length, dtype=torch.bool)
    for row, one in enumerate(tokens):
        size = len(one.ids)
        ids[row, :size] = torch.tensor(one.ids)
        types[row, :size] = torch.tensor(one.types)
        mask[row, :size] = True
    return ids, mask, types


@dataclass(slots=True)
class Batch:
    """Texts and their prompts; not frozen, since Lightning sets its fields when it moves it to a device.

    Attributes:
        input_ids: `(B, L)` int64. Of P pairs B is 2P: all chosen answers, then all rejected ones.
        mask: `(B, L)` bool.
        type_ids: `(B, L)` int64.
        prompt_ids: `(P, M)` int64, the prompts alone; of single answers P is B.
        prompt_mask: `(P, M)` bool.
        preferences: `(P, U)` int8, which answer is better in each of U capabilities; U is 0 for single answers.
        texts: B positions in the dataset's list of texts.
        prompts: P positions in its list of prompts.
        rows: P positions in its list of pairs or answers.
    """

    input_ids: Tensor
    mask: Tensor
    type_ids: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    preferences: Tensor
    texts: list[int]
    prompts: list[int]
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)


class StateStore:
    """States that do not change while models learn, in half precision, by the name of what they were made of.

    They are rounded when they come in, too, so that it makes no difference whether a state is new or was stored.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Begin.

        Args:
            folder: Where to keep them beyond this process, a file each, so that several may use it; None is memory.
        """
        self.folder = folder
        self.memory: dict[str, NDArray[np.float16]] = {}

    def path(self, folder: Path, name: str) -> Path:
        """The file of a text."""
        return folder / name[:2] / f"{name}.f16"

    def has(self, name: str) -> bool:
        """Whether a text's states are there."""
        return name in self.memory if self.folder is None else self.path(self.folder, name).is_file()

    def put(self, names: Sequence[str], lengths: Sequence[int], hidden: Tensor) -> None:
        """Keep `(B, L, D)`, of each text as many states as it is long."""
        values = hidden.detach().half().cpu().numpy()
        for name, length, of in zip(names, lengths, values, strict=True):
            if self.folder is None:
                self.memory[name] = of[:length].copy()
                continue
            path = self.path(self.folder, name)
            if path.is_file():
                # Another process has read it meanwhile, in another batch, where sums round otherwise.
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_suffix(f".{os.getpid()}")
            of[:length].tofile(whole)
            whole.replace(path)

    def get(self, names: Sequence[str], lengths: Sequence[int], dim: int) -> Tensor:
        """`(B, L, D)` float32 of some texts, zero in padding; L is the longest.

        Args:
            names: B of them.
            lengths: Of each text.
            dim: D.

        Raises:
            ValueError: A file holds more or less than the states of its text.
        """
        found = np.zeros((len(names), max(lengths), dim), np.float16)
        for row, name, length in zip(found, names, lengths, strict=True):
            kept = self.memory[name] if self.folder is None else np.fromfile(self.path(self.folder, name), np.float16)
            if kept.size != length * dim:
                raise ValueError(
                    f"The states of {name} in {self.folder or 'memory'} are {kept.size} numbers, not {length} x {dim}: "
                    "the file is damaged. Delete it, and it is computed anew."
                )
            row[:length] = kept.reshape(length, dim)
        return torch.from_numpy(found).float()


def fingerprint(*parts: Any) -> str:
    """A name for what a store holds, of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
