"""Time and memory of a reader with experts on one batch of windows, against the plain encoder.

    python -m benchmarks.qa [--json FILE] [--rounds N] [--batch WINDOWSxTOKENS]

All have MiniLM-L6's size and random weights, and take turns in one process; the table shows medians and ratios over
`dense`, the plain encoder, which is the twin of `top1`. Four experts: `top1` and `top2` are networks as large as the
encoder's own in its last two layers, `adapters` are narrow ones beside these, `head` stands behind the last layer.
`twin-top2` and `twin-head` have one network as large as the active ones. A training step is forward, backward and
AdamW, auxiliary losses included, embeddings frozen. Memory is the peak of a process that does nothing else, after a
batch is read and after two steps.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from tasks.qa.model import QAReader
from zoo.base_models import quiet_transformers
from zoo.moe import collect_aux_losses
from zoo.report import print_table

CONTENDERS: dict[str, dict[str, Any]] = {
    "dense": {"moe_layers": [], "mixture": False},
    "top1": {},
    "top2": {"top_k": 2},
    "twin-top2": {"top_k": 2, "mixture": False},
    "adapters": {"experts": "adapters"},
    "head": {"placement": "head"},
    "twin-head": {"placement": "head", "mixture": False},
}
# How much longer than the plain encoder it may take to answer.
TARGETS = {"top1": 1.15}
WARM_UP = 1


def save_base(folder: str) -> None:
    """An encoder of MiniLM-L6's size."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    with quiet_transformers():
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)


def build(name: str, base: str) -> QAReader:
    """A contender; the same number of parameters is drawn anew for all, in the span's layer."""
    torch.manual_seed(0)
    return QAReader(base, **CONTENDERS[name])


class Batch:
    """Windows of random tokens without padding, and the two things that are done with them.

    Attributes:
        ids: `(B, L)` tokens.
        mask: `(B, L)`, all real.
        places: `(B,)` of starts and ends.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1000, 30000, (rows, tokens), generator=generator)
        self.mask = torch.ones(rows, tokens, dtype=torch.bool)
        self.places = torch.randint(tokens, (rows,), generator=generator)

    @torch.no_grad()
    def answer(self, model: QAReader) -> tuple[Tensor, Tensor]:
        """Read the windows."""
        return model.eval()(self.ids, self.mask)

    def stepper(self, model: QAReader) -> Callable[[], None]:
        """A training step: forward, backward, update."""
        optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)

        def step() -> None:
            logits = model.train()(self.ids, self.mask)
            loss = sum(nn.functional.cross_entropy(of, self.places) for of in logits) / 2
            (loss + collect_aux_losses(model).total).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step


def check_equal(models: dict[str, QAReader], batch: Batch) -> None:
    """Copies of a network compute what it does, or their times mean nothing."""
    dense = models["dense"]
    for name in ("top1", "top2", "twin-top2", "adapters"):
        models[name].span.load_state_dict(dense.span.state_dict())
        torch.testing.assert_close(batch.answer(models[name]), batch.answer(dense), atol=1e-4, rtol=1e-4)


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds over rounds in which all take turns, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-WARM_UP, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(name: str, base: str, batch: Batch) -> list[float]:
    """Resident memory of this process in MiB at its peak, after it has read a batch, and after two training steps."""
    model = build(name, base)
    step = batch.stepper(model)
    peaks = []
    for calls in ([lambda: batch.answer(model)], [step, step]):
        for call in calls:
            call()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks


def memory_alone(name: str, base: str, size: str) -> list[float]:
    """As `peak_memory`, of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.qa", "--batch", size, "--memory-of", name, base]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(base: str, size: str, rounds: int) -> list[dict[str, Any]]:
    """Medians and memory, a row for reading and one for training."""
    memory = {name: memory_alone(name, base, size) for name in CONTENDERS}
    models = {name: build(name, base) for name in CONTENDERS}
    batch = Batch(*sizes(size))
    check_equal(models, batch)
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "inference": {name: (lambda model=model: batch.answer(model)) for name, model in models.items()},
        "train": {name: batch.stepper(model) for name, model in models.items()},
    }
    return [
        {
            "case": size,
            "mode": mode,
            "seconds": take_turns(of, rounds),
            "peak_mib": {name: peaks[place] for name, peaks in memory.items()},
        }
        for place, (mode, of) in enumerate(calls.items())
    ]


def sizes(batch: str) -> tuple[int, int]:
    """Windows and tokens of each, of e.g. `16x256`."""
    rows, tokens = batch.split("x")
    return int(rows), int(tokens)


def main() -> None:
    """Measure, print a table each for reading and training, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", default="16x256", help="windows x tokens")
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "BASE"), help="print the memory of this one alone")
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(peak_memory(*options.memory_of, Batch(*sizes(options.batch)))))
        return
    with tempfile.TemporaryDirectory() as base:
        save_base(base)
        rows = measure(base, options.batch, options.rounds)
    for row in rows:
        seconds, memory = row["seconds"], row["peak_mib"]
        lines = [
            {
                "reader": name,
                "ms": 1e3 * seconds[name],
                "over dense": seconds[name] / seconds["dense"],
                "allowed": TARGETS.get(name, "") if row["mode"] == "inference" else "",
                "peak MiB": memory[name],
                "memory over dense": memory[name] / memory["dense"],
            }
            for name in CONTENDERS
        ]
        print_table(f"{row['mode']}, {row['case']} tokens, {torch.get_num_threads()} threads", lines)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
