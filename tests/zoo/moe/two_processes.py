"""One optimiser step of a balanced layer, in this process or as one of two: `python two_processes.py RANK FOLDER`."""

import sys

import torch
from torch import nn
from two_ranks import leave

from zoo.moe import (
    GroupedExperts,
    MoELayer,
    TopKRouter,
    collect_aux_losses,
    open_count_windows,
    update_selection_biases,
)


def balanced_layer(**options: object) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(
        TopKRouter(8, 4, 2, num_groups=2, **options),
        GroupedExperts(4, 8, 16),
        aux_losses={"load_balancing": 1.0, "group_balancing": 0.5, "z": 0.1},
    )


def train_share(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two micro-batches of one optimiser step; x is `(2, T, D)`."""
    layer = next(module for module in model.modules() if isinstance(module, MoELayer))
    open_count_windows(layer)
    values = []
    for part in x:
        out = model(part)
        losses = collect_aux_losses(layer)
        (out.square().mean() + losses.total).backward()
        values.append(losses.values["load_balancing"])
    update_selection_biases(layer, 0.1)
    return {
        "loss": torch.stack(values),
        "bias": layer.router.expert_bias,
        "counts": layer.count_window.total,
        **{name: parameter.grad for name, parameter in layer.named_parameters()},
    }


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(balanced_layer(selection_bias=True))
    results = train_share(model, torch.load(f"{folder}/x.pt")[:, rank])
    torch.distributed.all_reduce(results["loss"])
    results["loss"] /= 2
    leave(results, rank, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
