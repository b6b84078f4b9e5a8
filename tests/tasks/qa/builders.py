"""Small tokenizers and encoders made at run time, and texts to make them from."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tasks.qa.examples import Example, generate_examples

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTEXT = "The Normans (French: Normands) came from Denmark. They gave their name to Normandy, a region in France."


def texts_of(examples: Iterable[Example]) -> list[str]:
    """Questions and contexts, to make a vocabulary from."""
    return [text for example in examples for text in (example.question, example.context)]


def word_pieces(texts: Sequence[str] | None = None, vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer as BERT has it; `save_pretrained` makes a folder of it.

    Args:
        texts: Where its whole words come from, the most frequent first; `CONTEXT` and generated examples by default.
        vocab_size: At most so many pieces; words that are not among them are cut into characters.
    """
    words = re.findall(r"\w+|[^\w\s]", " ".join(texts or [CONTEXT, *texts_of(generate_examples(500))]).lower())
    characters = sorted(
        {character for word in words for character in word} | set("abcdefghijklmnopqrstuvwxyz0123456789")
    )
    frequent = [word for word, _ in sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))]
    pieces = dict.fromkeys([*SPECIAL, *characters, *(f"##{character}" for character in characters), *frequent])
    tokenizer = Tokenizer(
        models.WordPiece({piece: row for row, piece in enumerate(list(pieces)[:vocab_size])}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
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
        mask_token="[MASK]",
    )


def save_base(folder: Path, width: int, length: int) -> str:
    """A BERT of two layers and the tokenizer of generated questions, as a folder that serves as a base.

    Args:
        folder: Where.
        width: Of its states; the feed-forward networks are twice as wide.
        length: Most tokens of a window.
    """
    tokenizer = word_pieces(texts_of(generate_examples(300)))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        intermediate_size=2 * width,
        max_position_embeddings=length,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
