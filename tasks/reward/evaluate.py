"""How often a reward model agrees with people, by category and with intervals; routing; a baseline without parameters.

Consistency (Quan 2024) is the share of pairs whose chosen answer has the higher reward, in percent; a tie counts half.
Pairs that share a prompt are not independent, and neither are runs that share data: intervals are bootstraps over
prompts and seeds, and two models are compared on the same prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoo.errors import UnknownNameError

if TYPE_CHECKING:
    from tasks.reward.examples import Pair

PERCENT = 100
RESAMPLES = 2000
POOLED, BALANCED = "consistency", "consistency_length_balanced"

Array = NDArray[np.float64]
Places = NDArray[np.intp]
Row = dict[str, Any]


class Interval(NamedTuple):
    """A mean and the 95 % bootstrap interval around it; the bounds are NaN where there is a single prompt."""

    mean: float
    low: float
    high: float


def agreement(differences: Array) -> Array:
    """100 where the chosen answer's reward is higher, 0 where it is lower, 50 for a tie.

    Args:
        differences: Reward of the chosen answer less that of the rejected one, any shape.

    Raises:
        ValueError: One is not a number, which would count as wrong.
    """
    if np.isnan(differences).any():
        raise ValueError(f"{int(np.isnan(differences).sum())} of {differences.size} rewards are not a number.")
    return PERCENT * (1 + np.sign(differences)) / 2


def length_differences(pairs: "Sequence[Pair]") -> Array:
    """By how many characters the chosen answer is the longer one, `(n,)`: the rewards of picking the longer answer."""
    return np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs], dtype=np.float64)


def length_balanced(lengths: Array, categories: Sequence[str], seed: int = 0) -> Places:
    """Positions of a subset in which picking the longer answer is right in exactly half of each category's pairs.

    Of each category are kept as many pairs whose longer answer was chosen as pairs whose shorter one was: all of the
    smaller kind, and so many of the other, drawn at random. Pairs of equally long answers are left out.

    Args:
        lengths: `length_differences`.
        categories: Of each pair.
        seed: Draws them.
    """
    generator = np.random.default_rng(seed)
    names = np.array(categories, dtype=object)
    kept: list[Places] = []
    for name in dict.fromkeys(categories):
        sides = [np.flatnonzero((names == name) & (np.sign(lengths) == sign)) for sign in (1, -1)]
        count = min(map(len, sides))
        kept += [generator.permutation(side)[:count] for side in sides]
    return np.sort(np.concatenate(kept))


def confusion_matrix(wanted: Sequence[int], found: Sequence[int], count: int) -> NDArray[np.int64]:
    """How many prompts of each group (rows) were sent to each inner model (columns), `(count, count)`.

    Args:
        wanted: The group of each prompt.
        found: The inner model it was sent to.
        count: How many there are.
    """
    matrix = np.zeros((count, count), dtype=np.int64)
    np.add.at(matrix, (np.asarray(wanted), np.asarray(found)), 1)
    return matrix


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Report:
    """Several models on the same pairs.

    Its metrics are `consistency` over all pairs, `consistency_length_balanced` over the subset of `length_balanced`,
    `<goal>/consistency` and `<category>/consistency`. Where the subset is empty its metric is missing.

    Attributes:
        subsets: Positions of the pairs of each metric.
        prompts: `(n,)` number of each pair's prompt.
        draws: `(RESAMPLES, prompts)` how often each is drawn.
        scores: By model `(seeds, n)` of `agreement`.
    """

    subsets: dict[str, Places]
    prompts: Places
    draws: Array
    scores: dict[str, Array]

    @classmethod
    def of(
        cls,
        categories: Sequence[str],
        prompts: Sequence[int] | Places,
        lengths: Array,
        differences: Mapping[str, Array],
        goals: Mapping[str, Sequence[str]] | None = None,
    ) -> "Report":
        """Bring runs together.

        Args:
            categories: Of n pairs.
            prompts: The number of each pair's prompt, from 0.
            lengths: `length_differences` of the pairs.
            differences: Rewards of chosen less rejected answers by model, `(n,)` or `(seeds, n)`.
            goals: Categories to be taken together, by a name.

        Raises:
            ValueError: There is no pair, or a model has rewards of other pairs.
        """
        count = len(categories)
        if not count:
            raise ValueError("There are no pairs to report on.")
        stacked = {name: np.atleast_2d(values) for name, values in differences.items()}
        for name, values in stacked.items():
            if values.shape[1] != count:
                raise ValueError(f"The rewards of {name!r} are of {values.shape[1]} pairs; there are {count}.")
        names = np.array(categories, dtype=object)
        subsets = {POOLED: np.arange(count), BALANCED: length_balanced(lengths, categories)}
        for goal, members in (goals or {}).items():
            subsets[f"{goal}/{POOLED}"] = np.flatnonzero(np.isin(names, list(members)))
        for category in dict.fromkeys(categories):
            subsets[f"{category or 'unknown'}/{POOLED}"] = np.flatnonzero(names == category)
        numbers = np.asarray(prompts, dtype=np.intp)
        total = int(numbers.max()) + 1
        drawn = np.random.default_rng(0).multinomial(total, np.full(total, 1 / total), size=RESAMPLES)
        return cls(
            {name: places for name, places in subsets.items() if len(places)},
            numbers,
            drawn.astype(np.float64),
            {name: agreement(values) for name, values in stacked.items()},
        )

    def metric_names(self) -> list[str]:
        """Names of the metrics."""
        return list(self.subsets)

    def values(self, model: str, key: str) -> Array:
        """A metric of each of a model's runs, `(seeds,)`.

        Raises:
            UnknownNameError: There is no such model or metric.
        """
        scores, places = self._find(model, key)
        return scores[:, places].mean(axis=1)

    def interval(self, model: str, key: str) -> Interval:
        """A metric's mean with its 95 % interval: as many prompts, and as many seeds, are drawn with replacement."""
        resampled = draw_seeds(self._resample(model, key), np.random.default_rng(1))
        return self._interval(float(self.values(model, key).mean()), resampled, key)

    def difference(self, first: str, second: str, key: str) -> Interval:
        """How much a model is above another, as `interval`: prompts are drawn for both at once, seeds for each."""
        random = np.random.default_rng(1)
        ours = draw_seeds(self._resample(first, key), random)
        theirs = draw_seeds(self._resample(second, key), random)
        mean = float(self.values(first, key).mean() - self.values(second, key).mean())
        return self._interval(mean, ours - theirs, key)

    def metrics(self, model: str) -> dict[str, float]:
        """A model's metrics, means over its seeds."""
        return {key: float(self.values(model, key).mean()) for key in self.metric_names()}

    def all_metrics(self, model: str) -> dict[str, float]:
        """A model's metrics, and those of the others as `<other>/<metric>`: what `test` returns."""
        metrics = self.metrics(model)
        for other in self.scores:
            if other != model:
                metrics |= {f"{other}/{key}": value for key, value in self.metrics(other).items()}
        return metrics

    def rows(self, keys: Sequence[str] | None = None) -> list[Row]:
        """Metrics as a table: one row per model and, where it has several seeds, one of their deviation.

        Args:
            keys: The columns; all by default.
        """
        rows: list[Row] = []
        for model, scores in self.scores.items():
            values = {key: self.values(model, key) for key in keys or self.metric_names()}
            rows.append({"model": model} | {key: float(of.mean()) for key, of in values.items()})
            if len(scores) > 1:
                deviations = {key: float(of.std(ddof=1)) for key, of in values.items()}
                rows.append({"model": f"+- over {len(scores)} seeds"} | deviations)
        return rows

    def interval_rows(self, model: str) -> list[Row]:
        """A model metric by metric: number of pairs and prompts, and the interval."""
        return [
            {
                "metric": key,
                "pairs": len(places),
                "prompts": len(np.unique(self.prompts[places])),
                **self.interval(model, key)._asdict(),
            }
            for key, places in self.subsets.items()
        ]

    def difference_rows(self, first: str, second: str, keys: Sequence[str] | None = None) -> list[Row]:
        """How much a model is above another, a row for each metric."""
        return [{"metric": key, **self.difference(first, second, key)._asdict()} for key in keys or self.subsets]

    def _find(self, model: str, key: str) -> tuple[Array, Places]:
        if model not in self.scores:
            raise UnknownNameError("model", model, self.scores)
        if key not in self.subsets:
            raise UnknownNameError("metric", key, self.subsets)
        return self.scores[model], self.subsets[key]

    def _resample(self, model: str, key: str) -> Array:
        """`(RESAMPLES, seeds)` of a metric over drawn prompts; NaN where none of its prompts was drawn."""
        scores, places = self._find(model, key)
        numbers, total = self.prompts[places], self.draws.shape[1]
        sums = np.zeros((total, len(scores)))
        np.add.at(sums, numbers, scores[:, places].T)
        counts = self.draws @ np.bincount(numbers, minlength=total)[:, None]
        with np.errstate(invalid="ignore"):
            return self.draws @ sums / counts

    def _interval(self, mean: float, resampled: Array, key: str) -> Interval:
        if len(np.unique(self.prompts[self.subsets[key]])) < 2:
            return Interval(mean, float("nan"), float("nan"))
        low, high = np.nanquantile(resampled, (0.025, 0.975))
        return Interval(mean, float(low), float(high))


def draw_seeds(resampled: Array, random: np.random.Generator) -> Array:
    """`(RESAMPLES,)` means over as many drawn seeds as there are, of `(RESAMPLES, seeds)`."""
    seeds = random.integers(resampled.shape[1], size=resampled.shape)
    return np.take_along_axis(resampled, seeds, axis=1).mean(axis=1)
