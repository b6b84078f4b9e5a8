"""A tokenizer and an encoder that know the words of generated questions."""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tasks.qa.examples import Example, generate_examples
from tests.helpers import bases

CONTEXT = "The Normans (French: Normands) came from Denmark. They gave their name to Normandy, a region in France."


def texts_of(examples: Iterable[Example]) -> list[str]:
    """Questions and contexts, to make a vocabulary from."""
    return [text for example in examples for text in (example.question, example.context)]


def word_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer of `CONTEXT` and generated questions."""
    return bases.word_pieces([CONTEXT, *texts_of(generate_examples(500))])


def save_base(folder: Path, width: int, length: int) -> str:
    """A BERT of two layers and the tokenizer of generated questions, as a folder that serves as a base.

    Args:
        folder: Where.
        width: Of its states.
        length: Most tokens of a window.
    """
    tokenizer = bases.word_pieces(texts_of(generate_examples(300)))
    return bases.save_bert(folder, tokenizer, width, 2, length, num_attention_heads=width // 16)
