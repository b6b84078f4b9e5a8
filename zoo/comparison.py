"""Models compared on the same data, with bootstrap intervals over that and over seeds: what reports share."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoo.errors import UnknownNameError

RESAMPLES = 2000

Array = NDArray[np.float64]
Row = dict[str, Any]


class Interval(NamedTuple):
    """A mean and the 95 % bootstrap interval around it; the bounds are NaN where there is nothing to draw from."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much a model is above another, its 95 % bootstrap interval, and twice the share of resamples beyond 0."""

    mean: float
    low: float
    high: float
    p_value: float


class Comparison(ABC):
    """Metrics of several models, each of which may have several seeds, on the same data.

    In each resample, as many units of the data (documents, prompts, examples) as there are, and as many seeds, are
    drawn with replacement, and the metric is computed anew: the percentile bootstrap (Efron and Tibshirani 1993,
    chapter 13).

    Attributes:
        noun: What the compared ones are called in tables and errors.
    """

    __slots__ = ()
    noun: ClassVar[str] = "model"

    @abstractmethod
    def names(self) -> Collection[str]:
        """The compared models."""

    @abstractmethod
    def metric_names(self) -> list[str]:
        """Names of the metrics."""

    @abstractmethod
    def values(self, model: str, key: str) -> Array:
        """A metric of each of a model's seeds, `(seeds,)`.

        Args:
            model: Its name.
            key: One of `metric_names()`.

        Raises:
            UnknownNameError: There is no such model or metric.
        """

    @abstractmethod
    def resample(self, model: str, key: str) -> Array:
        """The same over drawn units, `(RESAMPLES, seeds)`; the draws are the same for all models.

        Args:
            model: Its name.
            key: One of `metric_names()`.
        """

    def main_names(self) -> list[str]:
        """The metrics that tables show by default."""
        return self.metric_names()

    def check(self, model: str, key: str) -> None:
        """Refuse unknown names.

        Args:
            model: Of a model.
            key: Of a metric.

        Raises:
            UnknownNameError: There is no such model or metric.
        """
        if model not in self.names():
            raise UnknownNameError(self.noun, model, self.names())
        if key not in self.metric_names():
            raise UnknownNameError("metric", key, self.metric_names())

    def interval(self, model: str, key: str) -> Interval:
        """A metric's mean with its 95 % interval over units and seeds.

        Args:
            model: Its name.
            key: One of `metric_names()`.
        """
        resampled = draw_seeds(self.resample(model, key), np.random.default_rng(1))
        return Interval(float(self.values(model, key).mean()), *bounds(resampled))

    def difference(self, first: str, second: str, key: str) -> Difference:
        """How much a model is above another, as `interval`: units are drawn for both at once, seeds for each.

        Args:
            first: A model.
            second: The other; it may have another number of seeds.
            key: One of `metric_names()`.
        """
        random = np.random.default_rng(1)
        found = draw_seeds(self.resample(first, key), random) - draw_seeds(self.resample(second, key), random)
        mean = float(self.values(first, key).mean() - self.values(second, key).mean())
        return Difference(mean, *bounds(found), tail_probability(found))

    def metrics(self, model: str) -> dict[str, float]:
        """A model's metrics, means over its seeds.

        Args:
            model: Its name.

        Raises:
            UnknownNameError: There is no such model.
        """
        return {key: float(self.values(model, key).mean()) for key in self.metric_names()}

    def all_metrics(self, model: str) -> dict[str, float]:
        """A model's metrics, and those of the others as `<other>/<metric>`: what `test` returns.

        Args:
            model: The one that is reported on.
        """
        others = (other for other in self.names() if other != model)
        rivals = {
            f"{other}/{key}": float(self.values(other, key).mean()) for other in others for key in self.metric_names()
        }
        return self.metrics(model) | rivals

    def rows(self, keys: Sequence[str] | None = None) -> list[Row]:
        """One row per model and, where it has several seeds, one of their deviation.

        Args:
            keys: The columns; `main_names()` by default.
        """
        rows: list[Row] = []
        for model in self.names():
            values = {key: self.values(model, key) for key in keys or self.main_names()}
            rows.append({self.noun: model} | {key: float(of.mean()) for key, of in values.items()})
            seeds = max(map(len, values.values()))
            if seeds > 1:
                deviations = {key: float(of.std(ddof=1)) for key, of in values.items()}
                rows.append({self.noun: f"+- over {seeds} seeds"} | deviations)
        return rows

    def difference_rows(self, first: str, second: str, keys: Sequence[str] | None = None) -> list[Row]:
        """How much a model is above another, a row for each metric.

        Args:
            first: A model.
            second: The other.
            keys: Metrics; `main_names()` by default.
        """
        return [{"metric": key, **self.difference(first, second, key)._asdict()} for key in keys or self.main_names()]


def draw(count: int, random: np.random.Generator) -> Array:
    """How often each of so many units is drawn in each resample, `(RESAMPLES, count)`.

    Args:
        count: Number of units.
        random: Draws them.
    """
    return random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)


def draw_seeds(resampled: Array, random: np.random.Generator) -> Array:
    """`(RESAMPLES,)` means over as many drawn seeds as there are, of `(RESAMPLES, seeds)`."""
    seeds = random.integers(resampled.shape[1], size=resampled.shape)
    means: Array = np.take_along_axis(resampled, seeds, axis=1).mean(axis=1)
    return means


def bounds(resampled: Array) -> tuple[float, float]:
    """The bounds of the 95 % interval of `(RESAMPLES,)`; resamples without a value (NaN) are left out."""
    if np.isnan(resampled).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return float(low), float(high)


def tail_probability(resampled: Array) -> float:
    """Twice the share of `(RESAMPLES,)` differences on the rarer side of 0, the observed one among them; at most 1."""
    known = resampled[~np.isnan(resampled)]
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (1 + len(known))) if len(known) else float("nan")
