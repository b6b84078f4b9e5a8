"""One optimiser step of an adapted encoder, in this process or as one of two: `python two_adapters.py RANK FOLDER`."""

import sys
import warnings

import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertModel
from two_ranks import leave

from zoo.lora import SmoraConfig
from zoo.moe import collect_aux_losses, open_count_windows, routed_modules, update_selection_biases

# PEFT 0.21 asks transformers 5.24 for something by its old name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)


def adapted_encoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=40, initializer_range=0.2, hidden_dropout_prob=0.0, **sizes)
    config.attention_probs_dropout_prob = 0.0
    losses = {"load_balancing": 1.0, "z": 0.1}
    adapter = SmoraConfig(r=8, top_k=2, target_modules="all-linear", init_weights=False, aux_losses=losses)
    return get_peft_model(BertModel(config, add_pooling_layer=False), adapter).train()


def train_share(model: nn.Module, batches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two micro-batches of one optimiser step; the tensors are `(2, B, S)`."""
    inner = getattr(model, "module", model)
    open_count_windows(inner)
    values = []
    for ids, mask in zip(batches["input_ids"], batches["attention_mask"], strict=True):
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        losses = collect_aux_losses(inner)
        (hidden.square().mean() + losses.total).backward()
        values.append(losses.values["load_balancing"])
    update_selection_biases(inner, 0.1)
    biases = {name: module.router.expert_bias for name, module in routed_modules(inner).items()}
    gradients = {name: p.grad for name, p in inner.named_parameters() if p.requires_grad}
    return {"loss": torch.stack(values), **biases, **gradients}


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(adapted_encoder())
    batches = torch.load(f"{folder}/batches.pt")
    results = train_share(model, {name: value[:, rank] for name, value in batches.items()})
    torch.distributed.all_reduce(results["loss"])
    results["loss"] /= 2
    leave(results, rank, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
