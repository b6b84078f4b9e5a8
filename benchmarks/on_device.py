"""Time, memory and size of learning one hand: ExecuTorch's runtime against PyTorch.

    python -m benchmarks.on_device [--json FILE] [--program FILE] [--user NAME] [--rounds N]

Both take turns in one process, one thread each, with the same samples, batches and steps; the table shows medians of
CPU time, and what each then makes of the writer's test samples. An epoch is as many steps of the local expert as show
every sample once. Memory is the peak over what a process of its own holds that has read the samples, what the contender
imports included. `--program` names what `moe-zoo export --format executorch --trainable` wrote; without it, that is
done first. Needs the extra `export`, and Linux for the memory.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from tasks.customization.characters import merge
from tasks.customization.customizer import customize
from tasks.customization.data import to_float
from tasks.customization.evaluate import accuracy
from tasks.customization.model import CustomizedLeNet
from tasks.customization.on_device import DeviceBackend, customize_on_device, samples_of, to_learn_from
from zoo import hub
from zoo.export import export, training_path
from zoo.report import print_table

CONTENDERS = ("executorch", "pytorch")
EXPERT_BATCH = 64

Progress = Callable[[str, int, int], None]
# From images to logits.
Classifier = Callable[[Tensor], Tensor]


def learner(name: str, checkpoint: str, program: Path) -> Callable[[Tensor, Tensor, Progress], Classifier]:
    """What customises on one backend, loaded."""
    if name == "executorch":
        backend = DeviceBackend(program)

        def learn(images: Tensor, labels: Tensor, progress: Progress) -> Classifier:
            learned = customize_on_device(backend, images, labels, progress=progress)
            return lambda seen: backend.classify(seen, learned)[0]

        return learn
    model = hub.load_as(checkpoint, CustomizedLeNet)
    return lambda images, labels, progress: customize(model, images, labels, progress=progress)


def measure(checkpoint: str, program: Path, user: str, rounds: int) -> list[dict[str, Any]]:
    """Medians over rounds in which both take turns: a whole customization, and an epoch of it."""
    samples = samples_of(None, user, 0)
    images, labels = to_learn_from(samples)
    test_images, test_labels = to_float(samples.test.images), merge(samples.test.labels)
    learners = {name: learner(name, checkpoint, program) for name in CONTENDERS}
    whole: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    steps: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    right: dict[str, float] = {}
    for _ in range(rounds):
        for name, learn in learners.items():
            times: list[float] = []
            start = time.process_time()
            classify = learn(images, labels, steps_of("local expert", times))
            whole[name].append(time.process_time() - start)
            right[name] = accuracy(classify(test_images), test_labels)
            steps[name] += [after - before for before, after in pairwise(times)]
    batches = math.ceil(len(labels) / EXPERT_BATCH)
    seconds = {
        "customization": {name: statistics.median(values) for name, values in whole.items()},
        "epoch": {name: batches * statistics.median(values) for name, values in steps.items()},
    }
    case = {"case": f"{user}, {len(labels)} samples", "test accuracy": right}
    return [{**case, "mode": mode, "seconds": row} for mode, row in seconds.items()]


def steps_of(phase: str, times: list[float]) -> Progress:
    """A progress function that notes when each step of a phase was over."""

    def note(now: str, step: int, steps: int) -> None:
        if now == phase:
            times.append(time.process_time())

    return note


def peak_memory(name: str, checkpoint: str, program: Path, user: str) -> float:
    """MiB by which a contender, its imports and one customization exceed what this process holds before."""
    images, labels = to_learn_from(samples_of(None, user, 0))
    before = resident("VmRSS")
    # Reading all writers took more than is held now: the peak counts from here.
    Path("/proc/self/clear_refs").write_text("5")
    learner(name, checkpoint, program)(images, labels, lambda phase, step, steps: None)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of this process in memory, as Linux tells: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) / 1024


def in_a_process_of_its_own(name: str, options: argparse.Namespace, program: Path) -> float:
    """As `peak_memory`, where nothing else has been in memory."""
    words = ["--peak", name, "--checkpoint", options.checkpoint, "--user", options.user, "--program", str(program)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.on_device", *words]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure, print one table, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--checkpoint", default="customization/lenet5-emnist")
    parser.add_argument("--program", type=Path, help="inference program that was exported before")
    parser.add_argument("--user", default="apa-04", help="writer of unipen.npz, or synthetic-N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_memory(options.peak, options.checkpoint, options.program, options.user))
        return
    with tempfile.TemporaryDirectory() as scratch:
        program = options.program
        if program is None:
            program = Path(scratch) / "program.pte"
            export(options.checkpoint, "executorch", program, trainable=True)
        sizes = {
            "executorch": program.stat().st_size + training_path(program).stat().st_size,
            "pytorch": hub.info(options.checkpoint).size,
        }
        memory = {name: in_a_process_of_its_own(name, options, program) for name in CONTENDERS}
        rows = measure(options.checkpoint, program, options.user, options.rounds)
    lines = [
        {
            "runs on": name,
            "test accuracy (%)": rows[0]["test accuracy"][name],
            "s per customization": rows[0]["seconds"][name],
            "over PyTorch": rows[0]["seconds"][name] / rows[0]["seconds"]["pytorch"],
            "s per epoch": rows[1]["seconds"][name],
            "peak memory, MiB": memory[name],
            "bytes of files": sizes[name],
        }
        for name in CONTENDERS
    ]
    print_table(f"Customising {options.checkpoint} for {rows[0]['case']}, one thread", lines)
    if options.json:
        options.json.write_text(json.dumps({"rows": [{**row, "peak_mib": memory} for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
