"""The protocol of customization: what a user gains, what everybody else loses, and what it costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tasks.customization.characters import MERGED_CHARACTERS
from tasks.customization.model import GREY_LEVELS, CustomizedLeNet, Features
from zoo.moe import RoutingOutput
from zoo.report import PALETTE, plot_style, save_figure

# Energy of one operation at 45 nm and 32 bits in picojoule (Horowitz, ISSCC 2014): a multiply-accumulate is a
# multiplication and an addition, a parameter is read from a small on-chip memory once per image.
PICOJOULE = {"multiplication": 3.7, "addition": 0.9, "read": 5.0}
# An exponential is counted as this many multiply-accumulates.
EXPONENTIAL_MACS = 10

Row = dict[str, Any]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers in percent; logits are `(N, C)`."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def both_experts(model: CustomizedLeNet, features: Features) -> tuple[Tensor, Tensor, RoutingOutput]:
    """Logits of the local expert, logits of the mixture, and the gate's decision."""
    mixed, routing = model.classify(features, return_routing=True)
    return model.local_expert((features.logits, features.hidden)), mixed, routing


def score_user(model: CustomizedLeNet, own: tuple[Features, Tensor], generic: tuple[Features, Tensor]) -> Row:
    """Score a customised model on its user's test part and on generic images, accuracies and rates in percent.

    Args:
        model: The customised model.
        own: Features and merged labels of the user's test part.
        generic: Features and merged labels of generic test images.

    Returns:
        Accuracy of the global expert (`ge`), the local expert alone (`le`), the mixture (`moe`), an oracle gate that
        always picks a right expert if there is one (`oracle`), a gate that routes the same share at random
        (`random`, in expectation), the same on generic images (`generic_ge`, `generic_le`, `generic_moe`), and how
        often the gate chose the local expert (`route`, `generic_route`).
    """
    row: Row = {}
    for prefix, (features, labels) in (("", own), ("generic_", generic)):
        local, mixed, routing = both_experts(model, features)
        ge, le = accuracy(features.logits, labels), accuracy(local, labels)
        either = (features.logits.argmax(1) == labels) | (local.argmax(1) == labels)
        route = 100 * (routing.expert_index[:, 0] == 1).float().mean().item()
        row |= {
            f"{prefix}ge": ge,
            f"{prefix}le": le,
            f"{prefix}moe": accuracy(mixed, labels),
            f"{prefix}oracle": 100 * either.float().mean().item(),
            f"{prefix}random": ge + route / 100 * (le - ge),
            f"{prefix}route": route,
        }
    return row


def summarize(rows: Sequence[Mapping[str, Any]], model: CustomizedLeNet) -> dict[str, float]:
    """The metrics of a checkpoint: means over all users and seeds, worst cases, and the overhead.

    Args:
        rows: From `score_user`, with `seconds`.
        model: For sizes.
    """

    def mean(key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    gains = [row["moe"] - row["ge"] for row in rows]
    drops = [row["generic_ge"] - row["generic_moe"] for row in rows]
    available = sum(row["oracle"] - row["ge"] for row in rows)
    cost = overhead(model)
    return {
        "custom_acc_ge": mean("ge"),
        "custom_acc_moe": mean("moe"),
        "custom_acc_le": mean("le"),
        "custom_acc_oracle": mean("oracle"),
        "custom_acc_random": mean("random"),
        "custom_gain": sum(gains) / len(gains),
        "custom_gain_std": torch.tensor(gains).std(correction=0).item(),
        "custom_gain_worst": min(gains),
        "generic_acc_ge": mean("generic_ge"),
        "generic_acc_moe": mean("generic_moe"),
        "generic_acc_le": mean("generic_le"),
        "generic_drop": sum(drops) / len(drops),
        "generic_drop_worst": max(drops),
        "oracle_share": 100 * sum(gains) / available if available else 100.0,
        "route": mean("route"),
        "generic_route": mean("generic_route"),
        "overhead_params": 100 * cost["added"]["parameters"] / cost["global"]["parameters"],
        "overhead_macs": 100 * cost["added"]["macs"] / cost["global"]["macs"],
        "overhead_energy": 100 * cost["added"]["picojoule"] / cost["global"]["picojoule"],
        "replay_bytes": float(replay_bytes(model)),
        "seconds_per_user": mean("seconds"),
    }


def replay_bytes(model: CustomizedLeNet) -> int:
    """Size of the replay buffer that travels with a checkpoint."""
    buffers = (model.replay_early, model.replay_hidden, model.replay_labels)
    return sum(buffer.numel() * buffer.element_size() for buffer in buffers)


@torch.no_grad()
def overhead(model: CustomizedLeNet) -> dict[str, dict[str, float]]:
    """Parameters, multiply-accumulates, additions and energy per image, of the global expert and of what is added.

    What is added is the local expert, always run, and the gate with all it pools and compares. The global expert's
    own additions, poolings and activations are left out, which makes the overhead look larger, not smaller.

    Args:
        model: Any customised or fresh model.

    Returns:
        `{"global": ..., "added": ...}`.
    """
    image = torch.zeros(1, 1, 28, 28)
    features = model.features(image)
    local = model.local_expert((features.logits, features.hidden))
    first, second = (pooled.numel() for pooled in model.global_expert.stages(image)[:2])
    levels = len(GREY_LEVELS) if model.grey_levels else 0
    classes = features.logits.numel()
    added_macs = (
        matrix_macs(model.local_expert, (features.logits, features.hidden))
        + matrix_macs(model.gate, features.early, torch.stack([features.logits, local], 1))
        + first
        + second
        + image.numel()  # mean squares
        + classes * (2 * EXPONENTIAL_MACS + 3)  # two softmaxes, two entropies, one divergence
    )
    # Means, maxima and grid means; comparing and counting grey levels; the two best classes of each expert.
    added_additions = 3 * first + second + (1 + 2 * levels) * image.numel() + 6 * classes
    parts = {
        "global": (model.global_expert, matrix_macs(model.global_expert, image), 0),
        "added": (nn.ModuleList([model.local_expert, model.gate]), added_macs, added_additions),
    }
    table = {}
    for name, (module, macs, additions) in parts.items():
        parameters = sum(parameter.numel() for parameter in module.parameters())
        picojoule = (
            macs * (PICOJOULE["multiplication"] + PICOJOULE["addition"])
            + additions * PICOJOULE["addition"]
            + parameters * PICOJOULE["read"]
        )
        table[name] = {
            "parameters": float(parameters),
            "macs": float(macs),
            "additions": float(additions),
            "picojoule": picojoule,
        }
    return table


def matrix_macs(module: nn.Module, *inputs: Any) -> int:
    """Multiply-accumulates of a module's convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // 2


def plot_repairs(images: Tensor, labels: Tensor, before: Tensor, after: Tensor, title: str, path: Path) -> Path:
    """Draw up to 32 samples that were wrong before and are right after, with both answers.

    Args:
        images: `(N, 28, 28)`.
        labels: `(N,)` merged labels.
        before: `(N,)` answers of the global expert.
        after: `(N,)` answers of the customised model.
        title: Over the figure.
        path: File to write.
    """
    from matplotlib.figure import Figure

    repaired = ((before != labels) & (after == labels)).nonzero().flatten()[:32].tolist()
    columns = 8
    lines = max(-(-len(repaired) // columns), 1)
    with plot_style():
        figure = Figure(figsize=(1.15 * columns, 1.45 * lines + 0.8))
        figure.suptitle(title)
        for place in range(lines * columns):
            axes = figure.add_subplot(lines, columns, place + 1)
            axes.axis("off")
            if place < len(repaired):
                sample = repaired[place]
                axes.imshow(images[sample].numpy(), cmap="gray", vmin=0, vmax=255)
                wrong, right = MERGED_CHARACTERS[before[sample]], MERGED_CHARACTERS[after[sample]]
                axes.set_title(f"{wrong}  \N{RIGHTWARDS ARROW}  {right}", fontsize=13)
        return save_figure(figure, path)


def plot_users(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw each user's accuracy before and after, mean over seeds, sorted, beside what an oracle gate would reach.

    Args:
        rows: From `score_user`, with `user`.
        path: File to write.
    """
    from matplotlib.figure import Figure

    users = sorted({row["user"] for row in rows})
    means = {
        user: {key: _mean([row[key] for row in rows if row["user"] == user]) for key in ("ge", "moe", "oracle")}
        for user in users
    }
    users.sort(key=lambda user: means[user]["moe"])
    with plot_style():
        figure = Figure(figsize=(7, 0.4 * len(users) + 1.6))
        axes = figure.add_subplot()
        for height, user in enumerate(users):
            axes.plot([means[user]["ge"], means[user]["moe"]], [height, height], color="0.75", zorder=1)
        for key, label, color, marker in (
            ("ge", "global expert alone", PALETTE[4], "o"),
            ("moe", "customised", PALETTE[0], "o"),
            ("oracle", "with an oracle gate", PALETTE[2], "|"),
        ):
            values = [means[user][key] for user in users]
            axes.scatter(values, range(len(users)), color=color, marker=marker, s=60, label=label, zorder=2)
        axes.set_yticks(range(len(users)), users)
        axes.set_xlabel("accuracy on the user's own test samples (%)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        return save_figure(figure, path)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
