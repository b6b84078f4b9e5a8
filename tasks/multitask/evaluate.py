"""How good answers are, task by task; methods compared on the same examples; and what routing has to do with tasks.

All metrics are in percent and functions of a confusion matrix, so that a bootstrap is a matrix product. Examples of a
task are taken as independent, seeds too; two methods are compared on the same examples.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zoo.comparison import Array, Comparison, Row, draw
from zoo.errors import UnknownNameError

PERCENT = 100
METRICS = ("accuracy", "matthews", "f1")
# Where it is not accuracy, as GLUE has it.
MAIN_METRICS = {"cola": "matthews", "mrpc": "f1", "qqp": "f1"}
# What F1 looks for.
POSITIVE = ("paraphrase", "equivalent", "duplicate")
GLUE = ("cola", "rte", "mrpc", "sst2")
AVERAGE, AVERAGE_GLUE = "average", "average_glue"
MAJORITY = "majority"

Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ScoredTask:
    """What is right for the examples of one task.

    Attributes:
        name: Of the task.
        metric: Its main metric.
        targets: `(n,)` numbers of the right classes, options or texts.
        positive: The class that F1 looks for.
    """

    name: str
    metric: str
    targets: Labels
    positive: int = 1

    def __post_init__(self) -> None:
        """Refuse unknown metrics and tasks without examples."""
        if self.metric not in METRICS:
            raise UnknownNameError(f"metric of the task {self.name!r}", self.metric, METRICS)
        if not len(self.targets):
            raise ValueError(f"The task {self.name!r} has no example to score.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is reported: the main metric and accuracy."""
        return tuple(dict.fromkeys((self.metric, "accuracy")))


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Report(Comparison):
    """Predictions of several methods for the same examples; intervals are over examples.

    Its metrics are `average`, the mean of the main metrics of all tasks; `average_glue`, that of cola, rte, mrpc and
    sst2, where all four are there; and `<task>/<metric>`.

    Attributes:
        tasks: By name.
        predictions: By method and task `(seeds, n)`.
        draws: By task `(RESAMPLES, n)`, how often each example is drawn.
    """

    noun = "method"
    tasks: dict[str, ScoredTask]
    predictions: dict[str, dict[str, Labels]]
    draws: dict[str, NDArray[np.float32]]

    @classmethod
    def of(cls, tasks: Sequence[ScoredTask], predictions: Mapping[str, Sequence[Mapping[str, Labels]]]) -> "Report":
        """Bring runs together; the majority class is added as a method of its own, `majority`.

        Args:
            tasks: What is right.
            predictions: By method, of each of its seeds: by task `(n,)` predicted numbers.

        Raises:
            ValueError: There is no task, or a run lacks one or predicts another number of examples.
        """
        if not tasks:
            raise ValueError("There is no task to report on.")
        for method, runs in predictions.items():
            for task in tasks:
                sizes = {len(run.get(task.name, ())) for run in runs}
                if sizes != {len(task.targets)}:
                    raise ValueError(
                        f"The runs of {method!r} predict {sorted(sizes)} examples of the task {task.name!r}; there are "
                        f"{len(task.targets)}."
                    )
        stacked = {
            method: {task.name: np.stack([run[task.name] for run in runs]) for task in tasks}
            for method, runs in predictions.items()
        }
        stacked[MAJORITY] = {task.name: majority(task.targets)[None] for task in tasks}
        random = np.random.default_rng(0)
        # In single precision, to be multiplied by large matrices.
        draws = {task.name: draw(len(task.targets), random).astype(np.float32) for task in tasks}
        return cls({task.name: task for task in tasks}, stacked, draws)

    def names(self) -> Collection[str]:
        """The methods."""
        return self.predictions

    def metric_names(self) -> list[str]:
        """Names of the metrics."""
        glue = [AVERAGE_GLUE] if self.tasks.keys() >= set(GLUE) else []
        return [AVERAGE, *glue, *(f"{task.name}/{metric}" for task in self.tasks.values() for metric in task.metrics)]

    def main_names(self) -> list[str]:
        """The averages, and the main metric of each task."""
        return [
            name for name in self.metric_names() if "/" not in name or name == self.main_name(name.rpartition("/")[0])
        ]

    def main_name(self, task: str) -> str:
        """Name of a task's main metric."""
        return f"{task}/{self.tasks[task].metric}"

    def task_rows(self, method: str) -> list[Row]:
        """A method task by task, with its interval and the majority class beside it; the averages are the last rows.

        Args:
            method: Its name.
        """
        rows = []
        for key in sorted(self.main_names(), key=lambda key: "/" not in key):
            task, _, metric = key.rpartition("/")
            count = len(self.tasks[task].targets) if task else sum(len(of.targets) for of in self.tasks.values())
            found = self.interval(method, key)
            row: Row = {"task": task or metric, "metric": metric if task else "", "n": count, method: found.mean}
            row |= {"low": found.low, "high": found.high, MAJORITY: float(self.values(MAJORITY, key).mean())}
            rows.append(row)
        return rows

    def values(self, model: str, key: str) -> Array:
        """As `Comparison.values`."""
        return np.mean([self._score(model, task, metric, None) for task, metric in self._find(model, key)], axis=0)

    def _find(self, method: str, key: str) -> list[tuple[ScoredTask, str]]:
        """The tasks whose mean a metric is, and which of their metrics."""
        self.check(method, key)
        if "/" in key:
            name, _, metric = key.rpartition("/")
            return [(self.tasks[name], metric)]
        names = GLUE if key == AVERAGE_GLUE else self.tasks
        return [(self.tasks[name], self.tasks[name].metric) for name in names]

    def _score(self, method: str, task: ScoredTask, metric: str, draws: NDArray[np.float32] | None) -> Array:
        """`(seeds,)`, or over drawn examples `(RESAMPLES, seeds)`."""
        runs = [
            score(confusion(task.targets, predicted, metric, draws), metric, task.positive)
            for predicted in self.predictions[method][task.name]
        ]
        return np.stack(runs, axis=-1)

    def resample(self, model: str, key: str) -> Array:
        """As `Comparison.resample`: examples of each task are drawn."""
        pairs = self._find(model, key)
        return np.mean([self._score(model, task, metric, self.draws[task.name]) for task, metric in pairs], axis=0)


def confusion(targets: Labels, predictions: Labels, metric: str, draws: NDArray[np.float32] | None = None) -> Array:
    """Counts of examples by right and predicted class, of all or of drawn ones.

    Args:
        targets: `(n,)`.
        predictions: `(n,)`.
        metric: What they are for; accuracy needs to know right from wrong alone, whatever the number of classes.
        draws: `(draws, n)` how often each example counts.

    Returns:
        `(C, C)` or `(draws, C, C)`.
    """
    if metric == "accuracy":
        targets, predictions = np.zeros_like(targets), (targets != predictions).astype(np.int64)
    classes = max(2, int(targets.max()) + 1, int(predictions.max()) + 1)
    cells = np.eye(classes**2, dtype=np.float32)[targets * classes + predictions]
    counts = cells.sum(axis=0) if draws is None else draws @ cells
    return counts.reshape(*counts.shape[:-1], classes, classes).astype(np.float64)


def score(counts: Array, metric: str, positive: int = 1) -> Array:
    """A metric of confusion matrices, in percent; 0 where it is undefined.

    Args:
        counts: `(..., C, C)`, right classes by predicted ones.
        metric: `accuracy`; `matthews`, the correlation coefficient of Matthews (1975) as Gorodkin (2004) has it for any
            number of classes; or `f1`.
        positive: The class that F1 looks for.
    """
    total, right = counts.sum(axis=(-2, -1)), counts.trace(axis1=-2, axis2=-1)
    true, predicted = counts.sum(axis=-1), counts.sum(axis=-2)
    if metric == "accuracy":
        return PERCENT * right / total
    if metric == "f1":
        if positive >= counts.shape[-1]:
            # Neither right nor predicted anywhere.
            return np.zeros_like(total)
        return PERCENT * ratio(2 * counts[..., positive, positive], true[..., positive] + predicted[..., positive])
    above = right * total - (true * predicted).sum(axis=-1)
    spread = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (predicted**2).sum(axis=-1))
    return PERCENT * ratio(above, np.sqrt(spread))


def ratio(above: Array, below: Array) -> Array:
    """Their ratio, 0 where there is none."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def majority(targets: Labels) -> Labels:
    """The best constant answer: the most frequent class of what is scored, for every example.

    Args:
        targets: `(n,)`.
    """
    return np.full_like(targets, np.bincount(targets).argmax())


def normalise_loads(loads: Mapping[str, Array]) -> dict[str, Array]:
    """Loads in which every example weighs as much as another, however long it is: its row sums to 1.

    Args:
        loads: `(examples, E)` by module, of `expert_loads`.
    """
    return {module: load / load.sum(axis=1, keepdims=True) for module, load in loads.items()}
