"""How often each task is learned from: exact shares of every epoch, seeded, whatever they are in equally many steps."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from zoo.data import EpochSampler, epoch_seed
from zoo.errors import UnknownNameError

SAMPLINGS = ("proportional", "temperature", "uniform")
# Batches whose examples are sorted by length together; more pad less, and mix less.
POOL = 16


def task_probabilities(
    counts: Sequence[int], sampling: str, temperature: float = 2.0, rows: Sequence[float] | None = None
) -> NDArray[np.float64]:
    """Probability of each task: its number of examples to the power 1 / T, normalised (mBERT, T5).

    Args:
        counts: Examples of each task.
        sampling: `proportional` is T = 1, `uniform` is T = infinity, `temperature` any between.
        temperature: T.
        rows: How many rows an example of each task takes. These are then drawn with that probability, and examples the
            more seldom the more of them they take.

    Returns:
        `(tasks,)`, summing to 1.

    Raises:
        UnknownNameError: There is no such sampling.
        ValueError: T is below 1.
    """
    if sampling not in SAMPLINGS:
        raise UnknownNameError("sampling", sampling, SAMPLINGS)
    if temperature < 1:
        raise ValueError(f"temperature={temperature}: must be at least 1, which is proportional.")
    power = {"proportional": 1.0, "temperature": 1 / temperature, "uniform": 0.0}[sampling]
    weights = np.asarray(counts, dtype=np.float64) ** power
    if rows is not None:
        weights = weights / np.asarray(rows, dtype=np.float64)
    return weights / weights.sum()


def allot(probabilities: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Whole numbers that add up to `size` and are as near to its shares as they can be (largest remainders).

    Args:
        probabilities: `(tasks,)`, summing to 1.
        size: Examples of an epoch.
    """
    exact = probabilities * size
    whole = np.floor(exact).astype(np.int64)
    missing = size - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:missing]] += 1
    return whole


class TaskSampler(EpochSampler):
    """Examples of an epoch: of each task exactly its number, shuffled, those of similar length in the same batches.

    A task's examples come round after round, each round in a new order, and an epoch goes on where the last one ended,
    so all are seen equally often. An epoch depends on the seed and its number alone.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        probabilities: NDArray[np.float64],
        size: int,
        costs: Sequence[int],
        batch: int,
        seed: int,
    ) -> None:
        """Store what orders them.

        Args:
            tasks: Of each example.
            probabilities: Of the tasks, in the order in which they first appear.
            size: Examples of an epoch.
            costs: Tokens of each example's longest row.
            batch: Examples per batch.
            seed: Of the run.
        """
        super().__init__(size, seed)
        names = list(dict.fromkeys(tasks))
        places: dict[str, list[int]] = {name: [] for name in names}
        for place, name in enumerate(tasks):
            places[name].append(place)
        self.places = [np.array(places[name], dtype=np.int64) for name in names]
        self.allotted = allot(probabilities, size)
        self.costs = costs
        self.batch = batch

    def __iter__(self) -> Iterator[int]:
        drawn = np.concatenate([self.turns(task, int(count)) for task, count in enumerate(self.allotted)])
        random = np.random.default_rng(epoch_seed(self.seed, self.epoch))
        order = [int(drawn[place]) for place in random.permutation(len(drawn))]
        pools = (order[first : first + POOL * self.batch] for first in range(0, len(order), POOL * self.batch))
        alike = [place for pool in pools for place in sorted(pool, key=self.costs.__getitem__)]
        batches = [alike[first : first + self.batch] for first in range(0, len(alike), self.batch)]
        # An incomplete batch has to be the last one.
        whole = len(alike) // self.batch
        for number in [*random.permutation(whole), *range(whole, len(batches))]:
            yield from batches[number]

    def turns(self, task: int, count: int) -> NDArray[np.int64]:
        """Which examples of a task are those of this epoch, `(count,)`."""
        places = self.places[task]
        begin, end = self.epoch * count, (self.epoch + 1) * count
        rounds = range(begin // len(places), -(-end // len(places)))
        stream = [np.random.default_rng((self.seed, task, number)).permutation(places) for number in rounds]
        first = begin - rounds.start * len(places)
        return np.concatenate([*stream, places[:0]])[first : first + count]
