"""Tiny networks with random weights, built at run time, and configurations of both methods for them."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from zoo.lora import MolaConfig, SmoraConfig
from zoo.lora.config import MixtureConfig

LAYERS = 4
# Of the random weights: with the usual 0.02 nothing that an adapter does reaches the output of networks this small.
WIDE = 0.2

# PEFT 0.21, and so do the tests, uses names that transformers 5.24 has new ones for and older releases know.
old_name = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning")


class Mlp(nn.Module):
    """No transformer at all: PEFT adapts any module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(LAYERS))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def make_mlp() -> nn.Module:
    return Mlp()


def make_bert() -> nn.Module:
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=WIDE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def make_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        initializer_range=WIDE,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_gpt2() -> nn.Module:
    """Its layers are `Conv1D`, whose weights lie the other way round."""
    config = GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=LAYERS,
        n_head=2,
        initializer_range=WIDE,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


MAKERS = {"mlp": make_mlp, "bert": make_bert, "llama": make_llama, "gpt2": make_gpt2}
TARGETS = {
    "mlp": r"layers\.\d",
    "bert": ["query", "value", "intermediate.dense"],
    "llama": "all-linear",
    "gpt2": ["c_attn", "c_proj"],
}
# Outside of the adapters, and trained too.
HEADS = {"mlp": "head", "bert": "classifier", "llama": "lm_head", "gpt2": "ln_f"}


def make_base(network: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MAKERS[network]().eval()


def make_config(method: str, network: str, **options: Any) -> MixtureConfig:
    """An adapter that changes the output from the start."""
    options = {"target_modules": TARGETS[network], "init_weights": False, **options}
    if method == "smora":
        return SmoraConfig(**{"r": 8, "top_k": 4, **options})
    return MolaConfig(**{"r": 2, **options})


def make_inputs(network: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Three rows of seven positions; the first is padded, on the left for causal networks, on the right for BERT."""
    generator = torch.Generator().manual_seed(seed)
    if network == "mlp":
        return {"x": torch.randn(5, 8, generator=generator)}
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0 if network == "bert" else 1
    mask[0, :3] = 1 if network == "bert" else 0
    return {"input_ids": torch.randint(1, 40, (3, 7), generator=generator), "attention_mask": mask}


def output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the network gives, whatever it is wrapped in."""
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits
