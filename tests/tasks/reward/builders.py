"""Small bases made at run time: a BERT and a Llama over the words of generated pairs, and batches of random texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel

from tasks.reward.backbone import Backbone, Inputs, pool_states
from tasks.reward.examples import Pair, generate_pairs
from tests.helpers import bases

GROUPS = {"ground": ["synthetic_travel", "synthetic_speed"], "kitchen": ["synthetic_cooking"]}
EACH = {name: [name] for name in ("synthetic_travel", "synthetic_cooking", "synthetic_speed")}
CAPABILITIES = ["length", "no_repetition"]
SIZES = [str(size) for size in range(100)]


def words_of(pairs: list[Pair]) -> list[str]:
    """Texts to make a vocabulary from: those of pairs, and the sizes that answers may have."""
    return [text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)] + SIZES * 3


def save_base(folder: Path, width: int = 32) -> str:
    """A BERT with random weights and its tokenizer, as a folder that serves as a base."""
    tokenizer = bases.word_pieces(words_of(generate_pairs(300)), 500)
    # As large as this every part of the network matters.
    return bases.save_bert(folder, tokenizer, width, 3, 64, num_attention_heads=4, initializer_range=0.2)


def save_llama(folder: Path) -> str:
    """The same of a Llama."""
    return _save_llama(folder, LlamaModel, 3, 64)


def save_causal(folder: Path, letters: Sequence[str] = ("a", "b")) -> str:
    """A Llama that answers, and knows the two letters of a judge."""
    return _save_llama(folder, LlamaForCausalLM, 2, 512, letters)


def _save_llama(folder: Path, kind: type[PreTrainedModel], layers: int, length: int, more: Sequence[str] = ()) -> str:
    tokenizer = bases.whole_words([*words_of(generate_pairs(300)), *more])
    return bases.save_llama(folder, tokenizer, 32, layers, length, kind, num_attention_heads=4, num_key_value_heads=2)


def texts(count: int = 6, length: int = 12, vocabulary: int = 60) -> dict[str, torch.Tensor]:
    """Random texts of different lengths, and prompts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocabulary, (count, length), generator=generator)
    sizes = torch.randint(4, length + 1, (count, 1), generator=generator)
    sizes[0] = length
    mask = torch.arange(length) < sizes
    types = (torch.arange(length) >= 3).long().expand(count, -1)
    return {
        "input_ids": ids * mask,
        "mask": mask,
        "type_ids": types * mask,
        "prompt_ids": ids[:, :4],
        "prompt_mask": mask[:, :4],
    }


def inputs_of(model: Backbone, found: dict[str, torch.Tensor], groups: list[int]) -> Inputs:
    """What a model reads of texts."""
    hidden = model.prefix(found["input_ids"], found["mask"], found["type_ids"])
    prompts = model.read_prompts(found["prompt_ids"], found["prompt_mask"])
    means = pool_states(hidden, found["mask"], found["type_ids"])
    return Inputs(hidden, found["mask"], means, prompts, torch.tensor(groups))


@torch.no_grad()
def stir(model: Backbone, scale: float = 0.12) -> Any:
    """Give everything that is added to the base random values, so that all of it matters."""
    generator = torch.Generator().manual_seed(2)
    for phase in model.phases:
        for parameter in model.phase_parameters(phase):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model
