"""From the checkpoint of a study's run to one that is shipped."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from zoo import hub
from zoo.errors import DataNotFoundError


def find_run(folder: Path, method: str, seed: int) -> Path:
    """The checkpoint of a run.

    Args:
        folder: Where it has to be.
        method: Of the run.
        seed: Likewise.

    Raises:
        DataNotFoundError: The run has not been made on this machine.
    """
    if not (folder / "metadata.json").is_file():
        hint = f"Run it: --methods {method} --seeds {seed}; delete its row in results/ if it has one."
        raise DataNotFoundError(f"what {method} of seed {seed} has learned", [folder], hint)
    return folder


def result_of(
    study: str,
    options: argparse.Namespace,
    scores: Mapping[str, float],
    methods: Iterable[str] = (),
    seeds: Iterable[int] | None = None,
) -> hub.Result:
    """What a card says of a study: its scores with the command that makes them.

    Args:
        study: Module of it, as in `studies.qa.study`.
        options: Its command line: the seeds of the table, and the commit that its rows were made on.
        scores: By their names.
        methods: Those that they are about, where some are not run unless they are named.
        seeds: Those that these have, where they have not all of the table.
    """
    command = f"python -m {study} --seeds {' '.join(map(str, options.seeds if seeds is None else seeds))}"
    if named := " ".join(methods):
        command += f" --methods {named}"
    return hub.Result(scores, command, options.commit)


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
