"""Tests in two processes: starting them, and how each leaves."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def run_ranks(script: Path, folder: Path) -> None:
    """Run a script as `script RANK FOLDER` in two processes, and see both end well."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))}
    ranks = [subprocess.Popen([sys.executable, script, str(rank), folder], env=environment) for rank in range(2)]
    assert [rank.wait(timeout=110) for rank in ranks] == [0, 0]


def leave(results: dict[str, torch.Tensor], rank: int, folder: str) -> None:
    """Write what this process found, wait for the other to do so, and end."""
    torch.save(results, f"{folder}/{rank}.part")
    Path(f"{folder}/{rank}.part").rename(f"{folder}/{rank}.pt")
    deadline = time.monotonic() + 60
    while not all(Path(f"{folder}/{other}.pt").is_file() for other in range(2)):
        if time.monotonic() > deadline:
            raise TimeoutError("the other process left no result")
        time.sleep(0.01)
    # Gloo's threads now and then abort a process that tears them down; what is tested is written.
    os._exit(0)
