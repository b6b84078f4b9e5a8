"""Back-translation: new contexts by way of another language, the answers untouched.

What stands between the answers is cut into sentences, these go there and back, and all is put together again.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tasks.qa.examples import Example, read_text
from zoo.errors import DataNotFoundError

if TYPE_CHECKING:
    from torch import nn

# Shorter pieces are kept as they are: out of context they translate badly.
KEPT_WORDS = 5
# Longer sentences are cut, as models take 512 tokens.
MAX_WORDS = 100
# A sentence, with the space behind it.
SENTENCE = re.compile(r".+?(?:[.!?]+[\"')\]]*\s+|\n\s*|\Z)", re.DOTALL)


class Translator(Protocol):
    """What translates texts.

    Attributes:
        name: Tells it from all translators that may give other results: a hash of the weights, and the settings.
        group: How many texts it is given at a time.
    """

    name: str
    group: int

    def translate(self, texts: Sequence[str]) -> list[str]:
        """Translations of texts, which depend on these texts alone."""
        ...


# --- contexts --------------------------------------------------------------------------------------------------------


def back_translate(examples: Sequence[Example], pairs: Sequence[tuple[Translator, Translator]]) -> list[Example]:
    """New examples with contexts that went through other languages; what did not change at all is left out.

    Args:
        examples: Checked ones.
        pairs: A translator there and one back, for each language.

    Returns:
        At most one per example and language, with ids `<id>#bt1`, `<id>#bt2`, ...
    """
    parts = [list(cut_around_answers(example)) for example in examples]
    wanted = dict.fromkeys(part.text for cut in parts for part in cut if part.translate)
    translated: list[Example] = []
    for number, (there, back) in enumerate(pairs, start=1):
        abroad = translate_all(there, list(wanted))
        home = translate_all(back, list(dict.fromkeys(abroad.values())))
        # Nothing comes back of what a model has no words for; it stays as it was.
        table = {text: home[abroad[text]] or text for text in wanted}
        for example, cut in zip(examples, parts, strict=True):
            new = [replace(part, text=table[part.text]) if part.translate else part for part in cut]
            translated.append(join(example, f"{example.id}#bt{number}", new))
    old = {example.id: example.context for example in examples}
    return [example for example in translated if example.context != old[example.id.rpartition("#")[0]]]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a context.

    Attributes:
        text: Without space around it where it is translated.
        translate: Whether it is.
        answers: Which answers are in it, each with its character offset there.
    """

    text: str
    translate: bool = False
    answers: tuple[tuple[int, int], ...] = ()


def cut_around_answers(example: Example) -> Iterator[Part]:
    """Cut a context into answers (those that overlap are one piece), sentences, and the space between them.

    Args:
        example: With its answers.
    """
    context, done = example.context, 0
    for start, end in _merge(example):
        yield from _sentences(context[done:start])
        inside = tuple((n, place - start) for n, place in enumerate(example.starts) if start <= place < end)
        yield Part(context[start:end], answers=inside)
        done = end
    yield from _sentences(context[done:])


def _merge(example: Example) -> list[tuple[int, int]]:
    """Spans of the answers in order, overlapping ones as one; a word that begins or ends inside one belongs to it."""
    spans: list[tuple[int, int]] = []
    for answer, start in sorted(zip(example.answers, example.starts, strict=True), key=lambda pair: pair[1]):
        end = start + len(answer)
        while start and example.context[start - 1 : start + 1].isalnum():
            start -= 1
        while example.context[end - 1 : end + 1].isalnum() and end < len(example.context):
            end += 1
        if spans and start < spans[-1][1]:
            first, last = spans.pop()
            start, end = first, max(end, last)
        spans.append((start, end))
    return spans


def _sentences(text: str) -> Iterator[Part]:
    """Sentences of what stands between two answers, space apart; short ones are not to be translated."""
    for sentence in SENTENCE.findall(text):
        for piece in _shorten(sentence):
            body = piece.strip()
            before = piece[: len(piece) - len(piece.lstrip())]
            yield Part(before)
            yield Part(body, translate=len(body.split()) > KEPT_WORDS)
            yield Part(piece[len(before) + len(body) :])


def _shorten(sentence: str) -> list[str]:
    """Pieces of at most `MAX_WORDS` words."""
    return re.findall(rf"(?:\s*\S+){{1,{MAX_WORDS}}}\s*", sentence) or [sentence]


def join(example: Example, id_: str, parts: Iterable[Part]) -> Example:
    """Put pieces together again; where the answers are now follows from the pieces before them.

    Args:
        example: The one that was cut.
        id_: Of the new one.
        parts: Translated.
    """
    starts, context = list(example.starts), ""
    for part in parts:
        for number, offset in part.answers:
            starts[number] = len(context) + offset
        context += part.text
    return replace(example, id=id_, context=context, starts=tuple(starts))


def translate_all(translator: Translator, texts: Sequence[str]) -> dict[str, str]:
    """Translations of texts, similarly long ones together.

    Args:
        translator: Gets the same groups of the same texts every time, however far an earlier run came.
        texts: All different.
    """
    ordered = sorted(texts, key=lambda text: (len(text), text))
    table: dict[str, str] = {}
    for first in range(0, len(ordered), translator.group):
        group = ordered[first : first + translator.group]
        table |= zip(group, (text.strip() for text in translator.translate(group)), strict=True)
    return table


# --- translators -----------------------------------------------------------------------------------------------------


class MarianTranslator:
    """A Marian model with beam search, which gives the same every time."""

    def __init__(self, model: str, beams: int = 4, group: int = 16) -> None:
        """Load it.

        Args:
            model: A folder or a name on the hub, e.g. `Helsinki-NLP/opus-mt-en-fr`.
            beams: Hypotheses of the search; 1 is greedy.
            group: Texts at a time.

        Raises:
            DataNotFoundError: The model is nowhere.
            ValueError: Its tokenizer needs a package that is not installed, or it lacks weights.
        """
        import torch
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
            self.model, report = AutoModelForSeq2SeqLM.from_pretrained(
                model, dtype=torch.float32, output_loading_info=True
            )
        except ImportError as error:
            raise ValueError(f"The tokenizer of {model} needs sentencepiece: pip install sentencepiece.") from error
        except OSError as error:
            raise DataNotFoundError(
                f"the translation model {model!r}",
                ["the folder of that name", "the Hugging Face cache", "the hub"],
                "Name a folder that holds config, weights and tokenizer, or go where there is a network.",
            ) from error
        if missing := report["missing_keys"]:
            raise ValueError(f"The translation model {model} lacks weights: {', '.join(sorted(missing)[:5])}.")
        self.model.eval()
        self.group = group
        self.beams = beams
        self.name = f"{weights_sha256(self.model)} beams={beams}"

    def translate(self, texts: Sequence[str]) -> list[str]:
        """Translate texts.

        Args:
            texts: Any.

        Raises:
            ValueError: One is longer than the model can take.
        """
        import torch

        encoded = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        length, most = inputs["input_ids"].shape[1], self.model.config.max_position_embeddings
        if length > most:
            longest = max(texts, key=len)
            raise ValueError(f"{length} tokens are more than the {most} that the model can take: {longest[:80]!r}...")
        with torch.inference_mode():
            # Twice the source is ample; without a bound a bad model never ends.
            ids = self.model.generate(**inputs, num_beams=self.beams, max_length=min(most, 2 * length + 10))
        return list(self.tokenizer.batch_decode(ids, skip_special_tokens=True))


def weights_sha256(model: "nn.Module") -> str:
    """A hash of a network's weights, however they are stored.

    Args:
        model: On the CPU.
    """
    digest = sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


class CachedTranslator:
    """Keeps a translator's results in a file, each group once it is done, so that a killed run loses one group."""

    def __init__(self, translator: Translator, path: str | Path) -> None:
        """Read what is there.

        Args:
            translator: Translates what is not there yet.
            path: A JSONL file; made if it is not there. Several translators may share it.

        Raises:
            ValueError: A line of it is not one that was written here.
        """
        self.translator = translator
        self.name = translator.name
        self.group = translator.group
        self.path = Path(path)
        self.table = read_cache(self.path) if self.path.exists() else {}

    def translate(self, texts: Sequence[str]) -> list[str]:
        """Look up texts; where one is missing translate all, since results may depend on what is in a group."""
        keys = [sha256(f"{self.name}\n{text}".encode()).hexdigest() for text in texts]
        if not all(key in self.table for key in keys):
            fresh = dict(zip(keys, self.translator.translate(texts), strict=True))
            lines = [json.dumps({"key": key, "text": fresh[key]}) + "\n" for key in keys if key not in self.table]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # In one piece, since other runs may write to the same file.
            with self.path.open("ab", buffering=0) as file:
                file.write("".join(lines).encode())
            self.table = fresh | self.table
        return [self.table[key] for key in keys]


def read_cache(path: Path) -> dict[str, str]:
    """Translations by key. A last line that a killed run left incomplete is taken out of the file.

    Args:
        path: As `CachedTranslator` writes it.

    Raises:
        ValueError: Any other line is not one that was written there.
    """
    lines = read_text(path).split("\n")
    if torn := lines.pop():
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - len(torn.encode()))
    table = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            table[row["key"]] = row["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not a translation. Delete the file to translate anew.") from None
    return table


def load_translators(
    models: Sequence[Sequence[str]], cache: str | Path | None = None
) -> list[tuple[Translator, Translator]]:
    """Translators there and back for each language.

    Args:
        models: For each language two models, see `MarianTranslator`.
        cache: A JSONL file that keeps translations; without one they are made anew in every run.

    Raises:
        ValueError: There are not two models for a language.
        DataNotFoundError: A model is nowhere.
    """
    if wrong := [pair for pair in models if len(pair) != 2 or isinstance(pair, str)]:
        raise ValueError(f"back_translation: needs a model there and one back for each language, found {wrong[0]!r}.")

    def load(model: str) -> Translator:
        translator = MarianTranslator(model)
        return CachedTranslator(translator, cache) if cache else translator

    return [(load(there), load(back)) for there, back in models]
