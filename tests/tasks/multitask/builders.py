"""Tiny encoders and causal models with tokenizers that know the words of the generated tasks."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tasks.multitask.examples import GENERATED, generate_examples
from tests.helpers import bases

WIDTH, LAYERS, LENGTH = 32, 2, 64
# Weights as large as this make every part of the network matter.
SCALE = 0.2
# A question as the development data has it.
ARC = (
    "Please choose the correct answer to the question: What is hot?\n\nAnswer1: ice Answer2: fire, or so Answer3: snow"
    "\n\nAnswer format: answer1/answer2/answer3"
)


def texts() -> list[str]:
    """All that generated tasks say, and what is said around them."""
    examples = generate_examples(list(GENERATED), 400)
    around = "Options Answer good bad : ; = not or and"
    return [around, *(text for e in examples for text in (e.text, e.label, *e.choices))]


def tokenizer(causal: bool = False) -> PreTrainedTokenizerFast:
    """That of an encoder, which marks segments, or of a causal model."""
    return bases.whole_words(texts()) if causal else bases.word_pieces(texts())


def save_encoder(folder: Path) -> str:
    """A BERT and its tokenizer, as a folder that serves as a base."""
    more = {"initializer_range": SCALE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return bases.save_bert(folder, tokenizer(), WIDTH, LAYERS, LENGTH, num_attention_heads=2, **more)


def save_causal(folder: Path) -> str:
    """A Llama with tied embeddings and its tokenizer, as a folder that serves as a base."""
    more = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    return bases.save_llama(folder, tokenizer(causal=True), WIDTH, LAYERS, LENGTH, **more)
