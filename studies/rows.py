"""What the studies share: one JSON file per run, written whole, and never mistaken for that of another setting."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_whole(path: Path, value: Any) -> None:
    """Write JSON so that a killed run leaves no half of it; a number that is not finite becomes `null`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(finite(value), indent=1) + "\n")
    partial.replace(path)


def finite(value: Any) -> Any:
    """The same with None in place of numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_done(path: Path, wanted: Row) -> bool:
    """Whether a run has its row.

    Raises:
        ValueError: It has one of another setting.
    """
    if not path.is_file():
        return False
    row = json.loads(path.read_text())
    for key, value in wanted.items():
        if row[key] != value:
            raise ValueError(f"{path} has {key}={row[key]!r}, not {value!r}: name another --folder, or delete it.")
    return True


def mean_and_std(rows: Sequence[Row], key: str) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of a single run) over seeds."""
    values = [row[key] for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
