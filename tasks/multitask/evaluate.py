"""How good answers are, task by task; methods compared on the same examples; and what routing has to do with tasks.

All metrics are in percent and functions of a confusion matrix, so that a bootstrap is a matrix product. Examples of a
task are taken as independent, seeds too; two methods are compared on the same examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import UnknownNameError
from zoo.moe import RoutingOutput

PERCENT = 100
RESAMPLES = 1000
METRICS = ("accuracy", "matthews", "f1")
# Where it is not accuracy, as GLUE has it.
MAIN_METRICS = {"cola": "matthews", "mrpc": "f1", "qqp": "f1"}
# What F1 looks for.
POSITIVE = ("paraphrase", "equivalent", "duplicate")
GLUE = ("cola", "rte", "mrpc", "sst2")
AVERAGE, AVERAGE_GLUE = "average", "average_glue"
MAJORITY = "majority"

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Row = dict[str, Any]


class Interval(NamedTuple):
    """A mean and the 95 % bootstrap interval around it."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much a method is above another, its 95 % bootstrap interval, and twice the share of resamples beyond 0."""

    mean: float
    low: float
    high: float
    p_value: float


class Dependence(NamedTuple):
    """How much the task says about the expert.

    Attributes:
        explained: Share of the entropy of the experts that the task explains: 0 where tokens of all tasks go to the
            same experts in the same shares, 1 where the task decides which expert a token goes to.
        chance: The mean of that if examples are dealt out to the tasks at random.
        p_value: How often chance explains as much.
    """

    explained: float
    chance: float
    p_value: float


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
class Report:
    """Predictions of several methods for the same examples.

    Its metrics are `average`, the mean of the main metrics of all tasks; `average_glue`, that of cola, rte, mrpc and
    sst2, where all four are there; and `<task>/<metric>`.

    Attributes:
        tasks: By name.
        predictions: By method and task `(seeds, n)`.
        draws: By task `(RESAMPLES, n)`, how often each example is drawn.
    """

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
        draws = {task.name: draw(len(task.targets), random) for task in tasks}
        return cls({task.name: task for task in tasks}, stacked, draws)

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

    def metrics(self, method: str) -> dict[str, float]:
        """A method's metrics, means over its seeds.

        Args:
            method: Its name.

        Raises:
            UnknownNameError: There is no such method.
        """
        return {key: float(self.values(method, key).mean()) for key in self.metric_names()}

    def rows(self, keys: Sequence[str] | None = None) -> list[Row]:
        """One row per method and, where it has several seeds, one of their deviation.

        Args:
            keys: The columns; the main metrics by default.
        """
        rows: list[Row] = []
        for method, of_tasks in self.predictions.items():
            values = {key: self.values(method, key) for key in keys or self.main_names()}
            rows.append({"method": method} | {key: float(of.mean()) for key, of in values.items()})
            seeds = len(next(iter(of_tasks.values())))
            if seeds > 1:
                deviations = {key: float(of.std(ddof=1)) for key, of in values.items()}
                rows.append({"method": f"+- over {seeds} seeds"} | deviations)
        return rows

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

    def values(self, method: str, key: str) -> Array:
        """A metric of each of a method's runs, `(seeds,)`.

        Args:
            method: Its name.
            key: One of `metric_names()`.

        Raises:
            UnknownNameError: There is no such method or metric.
        """
        return np.mean([self._score(method, task, metric, None) for task, metric in self._find(method, key)], axis=0)

    def interval(self, method: str, key: str) -> Interval:
        """A metric's mean with its 95 % interval over examples and seeds.

        In each resample, as many examples of each task as there are, and as many seeds, are drawn with replacement, and
        the metric is computed anew.

        Args:
            method: Its name.
            key: One of `metric_names()`.
        """
        resampled = draw_seeds(self._resample(method, key), np.random.default_rng(1))
        low, high = np.quantile(resampled, (0.025, 0.975))
        return Interval(float(self.values(method, key).mean()), float(low), float(high))

    def difference(self, first: str, second: str, key: str) -> Difference:
        """How much a method is above another, as `interval`: examples are drawn for both at once, seeds for each.

        Args:
            first: A method.
            second: The other; it may have another number of seeds.
            key: One of `metric_names()`.
        """
        random = np.random.default_rng(1)
        found = draw_seeds(self._resample(first, key), random) - draw_seeds(self._resample(second, key), random)
        low, high = np.quantile(found, (0.025, 0.975))
        tail = min(int((found <= 0).sum()), int((found >= 0).sum()))
        mean = float(self.values(first, key).mean() - self.values(second, key).mean())
        return Difference(mean, float(low), float(high), min(1.0, 2 * (1 + tail) / (1 + RESAMPLES)))

    def difference_rows(self, first: str, second: str, keys: Sequence[str] | None = None) -> list[Row]:
        """How much a method is above another, a row for each metric.

        Args:
            first: A method.
            second: The other.
            keys: Metrics; the main ones by default.
        """
        return [{"metric": key, **self.difference(first, second, key)._asdict()} for key in keys or self.main_names()]

    def _find(self, method: str, key: str) -> list[tuple[ScoredTask, str]]:
        """The tasks whose mean a metric is, and which of their metrics."""
        if method not in self.predictions:
            raise UnknownNameError("method", method, self.predictions)
        if key not in self.metric_names():
            raise UnknownNameError("metric", key, self.metric_names())
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

    def _resample(self, method: str, key: str) -> Array:
        """`(RESAMPLES, seeds)` of a metric."""
        pairs = self._find(method, key)
        return np.mean([self._score(method, task, metric, self.draws[task.name]) for task, metric in pairs], axis=0)


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


def draw(count: int, random: np.random.Generator) -> NDArray[np.float32]:
    """How often each of so many examples is drawn, `(RESAMPLES, count)`."""
    return random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float32)


def draw_seeds(resampled: Array, random: np.random.Generator) -> Array:
    """`(RESAMPLES,)` means over as many drawn seeds as there are, of `(RESAMPLES, seeds)`."""
    seeds = random.integers(resampled.shape[1], size=resampled.shape)
    return np.take_along_axis(resampled, seeds, axis=1).mean(axis=1)


# --- experts ---------------------------------------------------------------------------------------------------------


def expert_loads(routing: Mapping[str, RoutingOutput], owners: Tensor, count: int) -> dict[str, NDArray[np.float32]]:
    """How much each expert did for each example of a batch: its weights, summed over the example's real tokens.

    Args:
        routing: By layer; `sample_index` names the batch's row of each token.
        owners: `(R,)`, the example of each row.
        count: Number of examples.

    Returns:
        `(count, E)` by layer.

    Raises:
        ValueError: The routing does not say which row a token is of.
    """
    loads = {}
    for layer, decided in routing.items():
        if decided.sample_index is None:
            raise ValueError(f"The routing of {layer!r} has no sample_index: pass it to the layer.")
        weights = decided.dense_weight().detach().float()
        if decided.mask is not None:
            weights = weights * decided.mask[:, None]
        of_rows = weights.new_zeros(len(owners), weights.shape[1]).index_add(0, decided.sample_index, weights)
        loads[layer] = weights.new_zeros(count, weights.shape[1]).index_add(0, owners, of_rows).cpu().numpy()
    return loads


def expert_shares(loads: Mapping[str, NDArray[np.float32]], tasks: Sequence[str]) -> dict[str, dict[str, Array]]:
    """Which experts work for which task.

    Args:
        loads: `(examples, E)` by layer, of `expert_loads`.
        tasks: Of each example.

    Returns:
        By layer and task, in the order of the examples: `(E,)`, the mean over examples of the shares of their weights.
    """
    names, dealt = membership(tasks)
    return {layer: dict(zip(names, dealt @ shares(load), strict=True)) for layer, load in loads.items()}


def task_dependence(
    loads: Mapping[str, NDArray[np.float32]], tasks: Sequence[str], permutations: int = 200, seed: int = 0
) -> dict[str, Dependence]:
    """Whether routing follows tasks: the mutual information of expert and task over the entropy of the expert.

    Both are those of a token of an example of a task, each task as likely as another. A few examples always differ, so
    chance is above 0: it is measured by dealing the examples out to the tasks anew, as many to each as it had.

    Args:
        loads: `(examples, E)` by layer, of `expert_loads`.
        tasks: Of each example.
        permutations: How often chance is tried.
        seed: Of the permutations.

    Returns:
        By layer.
    """
    if not loads:
        return {}
    _, dealt = membership(tasks)
    stacked = np.concatenate([shares(load) for load in loads.values()], axis=1)
    ends = np.cumsum([0, *(load.shape[1] for load in loads.values())])[:-1]
    found = explained(dealt @ stacked, ends)
    random = np.random.default_rng(seed)
    chance = np.stack([explained(random.permutation(dealt, axis=1) @ stacked, ends) for _ in range(permutations)])
    # The observed dealing is one of the possible ones.
    p_values = (1 + (chance >= found).sum(axis=0)) / (1 + permutations)
    return {
        layer: Dependence(*map(float, of))
        for layer, of in zip(loads, zip(found, chance.mean(axis=0), p_values, strict=True), strict=True)
    }


def membership(tasks: Sequence[str]) -> tuple[list[str], Array]:
    """The tasks, and of each the means over its examples as a matrix `(tasks, examples)`."""
    names = list(dict.fromkeys(tasks))
    dealt = (np.array(names)[:, None] == np.array(tasks)[None]).astype(np.float64)
    return names, dealt / dealt.sum(axis=1, keepdims=True)


def shares(load: NDArray[np.float32]) -> Array:
    """Each example's weights as shares that sum to 1."""
    return load.astype(np.float64) / load.sum(axis=1, keepdims=True)


def explained(table: Array, begins: NDArray[np.int64]) -> Array:
    """Share of the columns' entropy that the rows explain, all rows as likely, of tables side by side.

    Args:
        table: `(tasks, columns of all layers)`, shares.
        begins: First column of each layer.

    Returns:
        `(layers,)`; 0 where one column has everything.
    """
    whole = np.add.reduceat(entropy(table.mean(axis=0)), begins)
    within = np.add.reduceat(entropy(table).mean(axis=0), begins)
    return ratio(whole - within, whole)


def entropy(probabilities: Array) -> Array:
    """`- p log p` of each number, 0 where it is 0."""
    return np.asarray(torch.special.entr(torch.from_numpy(probabilities)).numpy(), dtype=np.float64)
