"""Time of scoring one day's stocks by MIGA, against a GRU baseline and against its own twin.

    python -m benchmarks.stocks [--json FILE] [--stocks N] [--rounds N]

All take turns in one process with random weights; the table shows medians. `gru` is the study's baseline, two layers
and one head; `dense` is our twin, one head of equal active size in place of the experts. `ensemble` is what a study
releases: five networks.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.stocks.model import Miga, MigaEnsemble
from zoo.report import print_table

FEATURES, WINDOW, SEEDS = 158, 5, 5


def contenders() -> dict[str, nn.Module]:
    """All by name, in eval mode."""
    torch.manual_seed(0)
    network: dict[str, Any] = {"features": FEATURES, "window": WINDOW, "linear_path": True}
    models: dict[str, nn.Module] = {
        "ours": Miga(**network),
        "dense": Miga(**network, mixture=False),
        "gru": Miga(**network, encoder="gru", mixture=False),
        "ensemble": MigaEnsemble(network, SEEDS),
    }
    return {name: model.eval() for name, model in models.items()}


@torch.no_grad()
def measure(stocks: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which all take turns.

    Args:
        stocks: Of the day.
        rounds: After three to warm up.
    """
    models = contenders()
    day = torch.randn(stocks, WINDOW, FEATURES)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(-3, rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model(day)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"case": f"{stocks} stocks", "mode": "inference", "seconds": medians}


def main() -> None:
    """Measure, print one table, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--stocks", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    row = measure(options.stocks, options.rounds)
    gru = row["seconds"]["gru"]
    lines = [
        {"network": name, "ms": 1e3 * value, "over the GRU": value / gru} for name, value in row["seconds"].items()
    ]
    print_table(f"Scoring one day of {row['case']}, {torch.get_num_threads()} threads", lines)
    if options.json:
        options.json.write_text(json.dumps({"rows": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
