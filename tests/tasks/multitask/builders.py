"""Tiny encoders and causal models with tokenizers that know the words of the generated tasks."""

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks.multitask.examples import GENERATED, generate_examples

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WIDTH, LAYERS, LENGTH = 32, 2, 64
# Weights as large as this make every part of the network matter.
SCALE = 0.2
# A question as the development data has it.
ARC = (
    "Please choose the correct answer to the question: What is hot?\n\nAnswer1: ice Answer2: fire, or so Answer3: snow"
    "\n\nAnswer format: answer1/answer2/answer3"
)


def words_of_generated_tasks() -> list[str]:
    """All words, in alphabetical order."""
    examples = generate_examples(list(GENERATED), 400)
    texts = [
        word for e in examples for word in (e.text, e.label, *e.choices, "Options Answer good bad : ; = not or and")
    ]
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})


def word_level(pairs: bool) -> PreTrainedTokenizerFast:
    """A lower-case tokenizer of whole words.

    Args:
        pairs: Whether it marks segments, as an encoder wants them.
    """
    vocabulary = [*SPECIAL, *words_of_generated_tasks()]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token=None if pairs else "[SEP]",
    )


def save_encoder(folder: Path) -> str:
    """A BERT and its tokenizer, as a folder that serves as a base."""
    tokenizer = word_level(pairs=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=LENGTH,
        initializer_range=SCALE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_causal(folder: Path) -> str:
    """A Llama with tied embeddings and its tokenizer, as a folder that serves as a base."""
    tokenizer = word_level(pairs=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=LENGTH,
        initializer_range=SCALE,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
