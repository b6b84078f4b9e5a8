"""Tiny tokenizers, encoders and causal models made at run time, as folders that serve as bases."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

OF_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
OF_LLAMA = ("<pad>", "<unk>", "<s>", "</s>")


def words_in(texts: Iterable[str]) -> list[str]:
    """Lower-case words and marks, one after another."""
    return re.findall(r"\w+|[^\w\s]", " ".join(texts).lower())


def word_pieces(texts: Iterable[str], vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer as BERT has it.

    Args:
        texts: Where its whole words come from, the most frequent first.
        vocab_size: At most so many pieces; words that are not among them are cut into characters.
    """
    words = words_in(texts)
    letters = {character for word in words for character in word} | set("abcdefghijklmnopqrstuvwxyz0123456789")
    frequent = [word for word, _ in sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))]
    characters = sorted(letters)
    pieces = dict.fromkeys([*OF_BERT, *characters, *(f"##{character}" for character in characters), *frequent])
    vocabulary = {piece: row for row, piece in enumerate(list(pieces)[:vocab_size])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, OF_BERT, strict=True)))


def whole_words(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A lower-case tokenizer of whole words and marks, as a causal model has it: texts are not marked.

    Args:
        texts: All of their words are known.
    """
    vocabulary = [*OF_LLAMA, *sorted(set(words_in(texts)))]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ("pad_token", "unk_token", "bos_token", "eos_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, OF_LLAMA, strict=True)))


def save_bert(
    folder: Path, tokenizer: PreTrainedTokenizerBase, width: int, layers: int, length: int, **more: Any
) -> str:
    """An encoder with random weights.

    Args:
        folder: Where.
        tokenizer: Saved beside it.
        width: Of its states; the feed-forward networks are twice as wide.
        layers: How many.
        length: Most tokens of a text.
        more: Of its config.
    """
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=2 * width,
        max_position_embeddings=length,
        **more,
    )
    torch.manual_seed(0)
    return save_both(folder, BertModel(config, add_pooling_layer=False), tokenizer)


def save_llama(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    width: int,
    layers: int,
    length: int,
    kind: type[PreTrainedModel] = LlamaForCausalLM,
    **more: Any,
) -> str:
    """A causal model with random weights, every part of which matters.

    Args:
        folder: Where.
        tokenizer: Saved beside it.
        width: Of its states; the feed-forward networks are twice as wide.
        layers: How many.
        length: Most tokens of a text.
        kind: With or without a head.
        more: Of its config.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=2 * width,
        max_position_embeddings=length,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        **more,
    )
    torch.manual_seed(0)
    return save_both(folder, kind(config), tokenizer)


def save_both(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write a model and its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
