"""From the checkpoint of a study's run to one that is shipped."""

from pathlib import Path

import torch
from torch import nn

from zoo import hub


def save_released(model: nn.Module, run: Path, out: Path, card: hub.Card) -> Path:
    """Write a run's network in half precision, with the config and the golden input of its own checkpoint.

    Args:
        model: Loaded from that checkpoint.
        run: Its folder.
        out: Folder of the new one.
        card: Of the new one.
    """
    from safetensors.torch import load_file

    golden = load_file(run / "golden.safetensors")
    count = sum(name.startswith("input.") for name in golden)
    inputs = [golden[f"input.{place}"] for place in range(count)]
    config = (run / "config.yaml").read_text()
    return hub.save(model, out, card=card, golden_input=inputs, config=config, dtype=torch.float16)
