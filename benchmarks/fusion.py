"""Time and memory of fusing one pair, against the arrangement of MoE-Fusion's released code.

    python -m benchmarks.fusion [--json FILE] [--size WIDTHxHEIGHT] [--rounds N]

All take turns in one process; the table shows medians. `reference` is that arrangement with random weights and without
its detectors: dense encoders at full resolution, two mixtures of local experts of which two of four run, and two of
four global experts of 160, 64, 32, 16 and 1 channels at full resolution. Gates cost nothing there: which experts run
does not change the time. `dense` is our twin, one expert of equal active size in place of each mixture.
"""

import argparse
import json
import resource
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tasks.fusion.model import MoEFusion
from zoo.report import print_table

CHANNELS = 16
ACTIVE = 2


class ReferenceArrangement(nn.Module):
    """The released code's head with two chosen experts in each mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(conv(1, CHANNELS) for _ in range(2))
        self.dense = nn.ModuleList(
            nn.ModuleList(conv(depth * CHANNELS, CHANNELS) for depth in (1, 2, 3)) for _ in range(2)
        )
        self.local = nn.ModuleList(
            nn.ModuleList(nn.Sequential(conv(CHANNELS, 8), nn.ReLU(), conv(8, CHANNELS)) for _ in range(ACTIVE))
            for _ in range(2)
        )
        widths = (160, 64, 32, 16)
        self.whole = nn.ModuleList(
            nn.Sequential(
                *(part for pair in pairwise(widths) for part in (conv(*pair), nn.ReLU())),
                conv(widths[-1], 1),
            )
            for _ in range(ACTIVE)
        )

    def forward(self, infrared: Tensor, visible: Tensor) -> Tensor:
        """Fuse `(B, 1, H, W)` to the same shape; half of what the encoders see is foreground."""
        features = []
        for band, first, dense in zip((infrared, visible), self.first, self.dense, strict=True):
            own = [torch.relu(first(band))]
            for layer in dense:
                own.append(layer(torch.cat(own, 1)))
            features.append(own)
        parts = [mix([expert(own[-1] / 2) for expert, own in zip(pair, features, strict=True)]) for pair in self.local]
        everything = torch.cat([*features[0], *features[1], *parts], 1)
        return mix([expert(everything) for expert in self.whole])


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def mix(images: list[Tensor]) -> Tensor:
    """Logsumexp of equally weighted images."""
    return torch.logsumexp(torch.stack(images), 0) - torch.tensor(float(len(images))).log()


def contenders() -> dict[str, nn.Module]:
    """All by name, in eval mode."""
    torch.manual_seed(0)
    models = {"ours": MoEFusion(), "dense": MoEFusion(mixture=False), "reference": ReferenceArrangement()}
    return {name: model.eval() for name, model in models.items()}


@torch.no_grad()
def measure(width: int, height: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which all take turns.

    Args:
        width: Of the pair.
        height: Of the pair.
        rounds: After one to warm up.
    """
    models = contenders()
    pair = torch.rand(1, 1, height, width), torch.rand(1, 1, height, width)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    gmac = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            model(*pair)
        gmac[name] = counter.get_total_flops() / 2e9
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(*pair)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"case": f"{width}x{height}", "mode": "inference", "seconds": medians, "gmac": gmac}


def peak_memory(width: int, height: int) -> float:
    """Resident memory of this process in MiB at its peak, after our network alone has fused one such pair."""
    with torch.no_grad():
        MoEFusion().eval()(torch.rand(1, 1, height, width), torch.rand(1, 1, height, width))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure, print one table, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--size", default="640x480", help="of the pair that is timed")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    width, height = (int(side) for side in options.size.split("x"))
    # First, while nothing larger has been in memory.
    memory = peak_memory(1280, 1024)
    row = measure(width, height, options.rounds)
    lines = [
        {"network": name, "ms": 1e3 * value, "over ours": value / row["seconds"]["ours"], "GMAC": row["gmac"][name]}
        for name, value in row["seconds"].items()
    ]
    print_table(f"Fusing one {row['case']} pair, {torch.get_num_threads()} threads", lines)
    print(f"Peak resident memory of a process that fuses one 1280x1024 pair with ours: {memory:.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps({"rows": [{**row, "peak_mib_1280x1024": memory}]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
